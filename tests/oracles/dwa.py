"""Dynamic weight average, arXiv 1803.10704, eq. 7. One period stands for the paper's epoch."""

import math

import torch


def weights(steps, generators, temperature=2.0, period=1):
    history = []
    for now in range(len(steps)):
        losses = [step["losses"] for step in steps]
        losses = [(row.mean(dim=1) if row.ndim == 2 else row).tolist() for row in losses]
        m = len(losses[0])
        e = now // period  # the running period; the last finished ones are e - 1 and e - 2

        def loss(t, e, losses=losses):
            return sum(losses[k][t] for k in range(e * period, (e + 1) * period)) / period

        r = []
        for t in range(m):
            if e < 2:
                r.append(1.0)  # "for t = 1, 2, we simply initialise w_k(t) = 1"
            elif loss(t, e - 2) == 0:
                r.append(1.0)  # ours: the ratio to nothing
            else:
                r.append(loss(t, e - 1) / loss(t, e - 2))  # eq. 7, right: w_k(t - 1) = L_k(t - 1) / L_k(t - 2)
        top = max(r)  # a common factor of numerator and denominator, so that exp cannot overflow
        total = sum(math.exp((r[u] - top) / temperature) for u in range(m))
        row = [m * math.exp((r[t] - top) / temperature) / total for t in range(m)]  # eq. 7, left
        history.append(torch.tensor(row, dtype=torch.float64))
    return history
