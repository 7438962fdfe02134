"""Random loss weighting, arXiv 2111.10603: a softmax of standard normal draws."""

import math

import torch


def weights(steps, generators):
    history = []
    for step, generator in zip(steps, generators, strict=True):
        m = len(next(iter(step.values())))
        z = torch.randn(m, dtype=torch.float64, generator=generator).tolist()  # z_t ~ N(0, 1)
        total = sum(math.exp(z[u]) for u in range(m))
        history.append(torch.tensor([math.exp(z[t]) / total for t in range(m)], dtype=torch.float64))  # softmax
    return history
