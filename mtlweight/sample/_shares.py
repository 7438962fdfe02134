"""From alignments to weights per sample."""

from typing import Literal

import torch
from torch import Tensor

Among = Literal["all", "task"]
"""Whose weights have one sum: those of all tasks and samples, or each task's by themselves."""


def shares_of_help(alignment: Tensor, among: Among) -> Tensor:
    """``max(0, a) / Σ max(0, a)`` of the alignment ``a``, ``[m, b]``; all 0 where nothing helps."""
    dim = _dim(among)
    helpful = _scaled(alignment.clamp(min=0), dim)
    return helpful / helpful.sum(dim, keepdim=True).clamp(min=1.0)


def softmax_of_help(alignment: Tensor, among: Among, temperature: float, labelled: Tensor) -> Tensor:
    """``softmax(a / (T s))`` over the labelled samples, 0 for others; ``a``, ``[m, b]``, has root mean square ``s``."""
    dim = _dim(among)
    unit = _scaled(alignment, dim)
    size = (unit.square().sum(dim, keepdim=True) / labelled.sum(dim, keepdim=True)).sqrt()
    logits = (unit / (temperature * torch.where(size > 0, size, 1.0))).where(labelled, -torch.inf)
    return (logits - logits.logsumexp(dim, keepdim=True)).exp()


def _scaled(values: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Divided by the largest absolute value, so that sums neither overflow nor vanish."""
    largest = values.abs().amax(dim, keepdim=True)
    return values / torch.where(largest > 0, largest, 1.0)


def _dim(among: Among) -> tuple[int, ...]:
    return (0, 1) if among == "all" else (1,)
