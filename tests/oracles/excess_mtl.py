"""ExcessMTL, arXiv 2402.02009: eq. 6 and 7 (excess risk), section 3.2 (scale), eq. 9 (weights), appendix C.1."""

import torch


def weights(steps, generators, step_size=1.0, warmup=1):
    history = []
    S = w = None
    first = []
    for step in steps:
        J = step["jacobian"]
        m, n = J.shape
        if S is None:
            S, w = torch.zeros(m, n, dtype=torch.float64), torch.full((m,), 1 / m, dtype=torch.float64)
            first = [[] for _ in range(m)]
        S = S + J**2  # eq. 7: the running sum of squared gradients
        scaled = torch.zeros(m, dtype=torch.float64)
        for t in range(m):
            e = sum(J[t, j] ** 2 / S[t, j].sqrt() for j in range(n) if S[t, j] > 0)  # eq. 6
            if len(first[t]) < warmup:
                if e > 0:
                    first[t].append(e)  # ours: a gradient of zero tells nothing of the scale
            else:
                scaled[t] = e / (sum(first[t]) / warmup)  # section 3.2
        w = w * torch.exp(step_size * (scaled - scaled.max()))  # eq. 9; a common factor cancels
        w = w / w.sum()
        history.append(w)
    return history
