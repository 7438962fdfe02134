"""SLAW, arXiv 2109.08218: s = sqrt(a - b²) with moving averages a of L² and b of L, then eq. 9. In exact fractions."""

from fractions import Fraction

import torch


def weights(steps, generators, decay=0.99, floor=1e-5):
    history = []
    a = b = None
    decay_exact = Fraction(decay)
    for k, step in enumerate(steps, start=1):
        losses = step["losses"]
        losses = [Fraction(x) for x in (losses.mean(dim=1) if losses.ndim == 2 else losses).tolist()]
        m = len(losses)
        if a is None:
            a, b = [Fraction(0)] * m, [Fraction(0)] * m
        # An arithmetic mean at first, as the official code has it
        beta = Fraction(k - 1, k) if k <= round(1 / (1 - decay)) else decay_exact
        a = [beta * a[t] + (1 - beta) * losses[t] ** 2 for t in range(m)]
        b = [beta * b[t] + (1 - beta) * losses[t] for t in range(m)]
        s = [max(float(a[t] - b[t] ** 2) ** 0.5, floor * float(a[t]) ** 0.5) for t in range(m)]
        known = [t for t in range(m) if k > 1 and s[t] > 0]
        row = [1.0] * m
        for t in known:
            row[t] = len(known) * (1 / s[t]) / sum(1 / s[u] for u in known)  # eq. 9
        history.append(torch.tensor(row, dtype=torch.float64))
    return history
