"""Projection on the probability simplex."""

import torch
from torch import Tensor


def project_simplex(point: Tensor) -> Tensor:
    """The nearest point of ``{w >= 0, Σ w = 1}`` to ``point``, ``[m]``: ``w = max(point - τ, 0)`` for the right ``τ``.

    >>> from mtlweight.solvers._simplex import project_simplex
    >>> project_simplex(torch.tensor([0.9, 0.5, -1.0]))
    tensor([0.7000, 0.3000, 0.0000])

    References:
        Held, Wolfe, Crowder, "Validation of subgradient optimization", Mathematical Programming 6, 1974.
    """
    point = point - point.max()  # moves τ alone, and keeps the 1 from drowning in large numbers
    ordered = point.sort(descending=True).values
    ranks = torch.arange(1, len(point) + 1, dtype=point.dtype, device=point.device)
    thresholds = (ordered.cumsum(dim=0) - 1) / ranks
    support = (ordered > thresholds).sum()
    return (point - thresholds[support - 1]).clamp(min=0)
