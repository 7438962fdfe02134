"""SoftAdapt, arXiv 1912.12355, section 3.1. Slopes are those of the polynomial through the window, fitted exactly."""

from fractions import Fraction

import torch


def slope(points, at):
    """The derivative at ``at`` of the polynomial through (0, p_0), (1, p_1), ...: the sum of Lagrange's terms'."""
    total = 0.0
    for i, value in enumerate(points):
        derivative = Fraction(0)
        for k in range(len(points)):
            if k == i:
                continue
            term = Fraction(1, i - k)
            for j in range(len(points)):
                if j not in (i, k):
                    term *= Fraction(at - j, i - j)
            derivative += term
        total += value * float(derivative)
    return total


def weights(steps, generators, sharpness=0.1, variant="original", order=1, slope_at="newest"):
    history = []
    seen = []
    for step in steps:
        losses = step["losses"]
        losses = (losses.mean(dim=1) if losses.ndim == 2 else losses).tolist()
        seen.append(losses)
        m = len(losses)
        window = seen[-order - 1 :]
        if len(window) > order:
            s = [slope([row[t] for row in window], order if slope_at == "newest" else 0) for t in range(m)]
        else:
            s = [0.0] * m
        if variant == "normalized":
            size = sum(abs(s_t) for s_t in s)
            s = [s_t / size if size > 0 else 0.0 for s_t in s]
        f = [sum(row[t] for row in window) / len(window) if variant == "loss-weighted" else 1.0 for t in range(m)]
        s = torch.tensor([sharpness * s_t for s_t in s], dtype=torch.float64)
        alpha = torch.tensor(f, dtype=torch.float64) * torch.exp(s - s.max())  # the largest exponent is taken out
        if alpha.sum() == 0:
            alpha = torch.ones(m, dtype=torch.float64)  # ours: nothing to tell the tasks apart by
        history.append(alpha / alpha.sum())
    return history
