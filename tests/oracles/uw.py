"""Uncertainty weighting, arXiv 1705.07115, with s = log σ²: eq. 7 doubled is Σ_t exp(-s_t) ℓ_t + s_t.

The step on s is the implicit one of the class's docstring, s' = s - η (1 - exp(-s') ℓ), solved by bisection.
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
        history.append(torch.tensor([exp(-s[t]) for t in range(len(s))], dtype=torch.float64))  # 1 / σ²
        s = [implicit_step(s[t], losses[t], step_size) for t in range(len(s))]
    return history


def implicit_step(s, loss, step_size):
    if loss == 0:
        return s  # the objective has no minimum there
    # The slope is -η (1 - exp(-s) ℓ) at s' = s and (s - log ℓ) at s' = log ℓ: of opposite sign, so the root is between.
    low, high = min(s, math.log(loss)), max(s, math.log(loss))
    for _ in range(200):
        middle = (low + high) / 2
        if middle - s + step_size * (1 - exp(math.log(loss) - middle)) > 0:
            high = middle
        else:
            low = middle
    return (low + high) / 2


def exp(x):
    return math.exp(x) if x < 700 else math.inf
