"""Where losses have logarithms, ratios and directions, and what methods take them to be elsewhere."""

import torch
from torch import Tensor


def alive(losses: Tensor) -> Tensor:
    """Where a loss is above zero; one below the smallest normal number counts as zero, since its inverse overflows."""
    return losses >= torch.finfo(losses.dtype).tiny


def inverse(losses: Tensor) -> Tensor:
    """``1 / losses``, 0 for a loss of zero."""
    return torch.where(alive(losses), 1 / losses, 0.0)


def ratio(losses: Tensor, before: Tensor) -> Tensor:
    """``losses / before`` for non-negative losses, 1 where ``before`` is zero. The bound keeps it from overflowing."""
    return torch.where(alive(before), losses / before, 1.0).clamp(max=1e30)


def unit(vector: Tensor) -> Tensor:
    """The vector divided by its length, whatever its scale; a zero vector as it is."""
    size = vector.abs().max()
    scaled = vector / torch.where(size > 0, size, 1.0)
    length: Tensor = torch.linalg.vector_norm(scaled)
    return scaled / length.clamp(min=1.0)
