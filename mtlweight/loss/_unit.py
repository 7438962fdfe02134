"""Directions."""

from __future__ import annotations

import torch
from torch import Tensor


def unit(vector: Tensor) -> Tensor:
    """The vector divided by its length, whatever its scale; a zero vector as it is."""
    size = vector.abs().max()
    scaled = vector / torch.where(size > 0, size, 1.0)
    length: Tensor = torch.linalg.vector_norm(scaled)
    return scaled / length.clamp(min=1.0)
