"""The domain of methods that take logarithms or ratios of losses, and what they answer at its edge."""

from __future__ import annotations

import torch
from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight._view import View


def nonnegative(name: str, view: View, losses: Tensor | None = None, what: str = "losses >= 0") -> Tensor:
    """The view's losses, or the given ones.

    Args:
        name: the weighting, for the message.
        view: names the tasks.
        losses: ``[m]``; the view's if left out.
        what: what was expected.

    Raises:
        MTLWeightError: if one is negative.
    """
    losses = view.losses if losses is None else losses
    if (losses < 0).any():
        found = ", ".join(f"{t} = {x:.4g}" for t, x in zip(view.tasks, losses.tolist(), strict=True) if x < 0)
        raise MTLWeightError(
            f"{name}: expected {what}, since it takes logarithms or ratios of them; found {found}. Shift the loss by a "
            "lower bound, or use a weighting that accepts negative losses."
        )
    return losses


def alive(losses: Tensor) -> Tensor:
    """Where a loss is above zero; below the smallest normal number it counts as zero, as its inverse is not finite."""
    return losses >= torch.finfo(losses.dtype).tiny


def ratio(losses: Tensor, before: Tensor) -> Tensor:
    """``losses / before`` for non-negative losses; 1 where ``before`` is zero, as in :class:`~mtlweight.DWA`."""
    known = alive(before)
    # The bound is far above any ratio of numbers that mean something, and keeps what follows from overflowing.
    return torch.where(known, losses / torch.where(known, before, 1.0), 1.0).clamp(max=1e30)
