"""GradNorm, arXiv 1711.02257, eq. 1 and 2, Algorithm 1; the step is ours: divided by the mean unweighted norm."""

import torch


def weights(steps, generators, alpha=1.5, step_size=0.025):
    history = []
    w = first = None
    for step in steps:
        losses = step["losses"]
        losses = losses.mean(dim=1) if losses.ndim == 2 else losses
        m = len(losses)
        if w is None:
            w = torch.ones(m, dtype=torch.float64)  # Algorithm 1: w_i(0) = 1
            first = losses
        history.append(w)

        w = w.clone().requires_grad_()
        norms = [step["gramian"][t, t].sqrt() for t in range(m)]
        G = [w[t] * norms[t] for t in range(m)]  # G_W^(i) = |∇_W w_i L_i|
        mean = sum(G) / m
        progress = [losses[t] / first[t] if first[t] > 0 else torch.tensor(1.0) for t in range(m)]  # L~_i
        mean_progress = sum(progress) / m
        rate = [p / mean_progress if mean_progress > 0 else p for p in progress]  # r_i
        target = [(mean * r**alpha).detach() for r in rate]  # eq. 1, held fixed
        gaps = [G[t] - target[t] for t in range(m)]
        gaps = [gap for gap in gaps if abs(gap) > 1e-12 * mean]  # at the kink: of its subgradients, 0
        L_grad = sum((gap.abs() for gap in gaps), 0.0 * w.sum())  # eq. 2
        (slope,) = torch.autograd.grad(L_grad, w)

        mean_norm = sum(norms) / m
        w = w.detach() - step_size * slope / (mean_norm if mean_norm > 0 else 1.0)
        w = w.clamp(min=0)
        w = m * w / w.sum() if w.sum() > 0 else history[-1]  # "renormalize so that Σ_i w_i(t + 1) = T"
    return history
