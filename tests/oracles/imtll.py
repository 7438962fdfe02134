"""IMTL-L, ICLR 2021: w_t = e^(s_t) for the loss Σ_t e^(s_t) ℓ_t - s_t, in which s is learned.

The step on s is the implicit one of the class's docstring, s' = s - η (e^(s') ℓ - 1), solved by bisection.
"""

import math

import torch


def weights(steps, generators, step_size=0.02, initial=0.0):
    history = []
    s = None
    for step in steps:
        losses = step["losses"]
        losses = (losses.mean(dim=1) if losses.ndim == 2 else losses).tolist()
        if s is None:
            s = [initial for _ in losses]
        history.append(torch.tensor([math.exp(s_t) for s_t in s], dtype=torch.float64))
        s = [implicit_step(s_t, loss, step_size) for s_t, loss in zip(s, losses, strict=True)]
    return history


def implicit_step(s, loss, step_size):
    if loss == 0:
        return s  # ours: there is no minimum to step to
    # s' - s + η (e^(s') ℓ - 1) increases in s'; it has opposite signs at s and at the minimum, -log ℓ.
    low, high = sorted([s, -math.log(loss)])
    for _ in range(200):
        middle = (low + high) / 2
        if middle - s + step_size * (math.exp(middle + math.log(loss)) - 1) > 0:
            high = middle
        else:
            low = middle
    return (low + high) / 2
