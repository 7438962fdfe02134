"""The step on a task's log-variance that stays stable for losses of any size."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def implicit_step(s: Tensor, losses: Tensor, step_size: float) -> Tensor:
    """The root ``s'`` of ``s' = s - η (1 - exp(-s') ℓ)`` for each task.

    For small ``η`` it equals a step of gradient descent on ``exp(-s) ℓ + s``, and it never overshoots ``log ℓ``.

    Args:
        s: log-variances, ``[m]``.
        losses: positive, ``[m]``; where one is not, the result means nothing.
        step_size: ``η``.
    """
    # In w = exp(-s') η ℓ the equation is w + log w = -a: Lambert's function. Winitzki's approximation is off by 2% at
    # most, and each round of Iacono and Boyd's iteration squares that.
    log_scaled = math.log(step_size) + torch.log(losses)
    a = s - step_size - log_scaled
    b = a.clamp(max=80)  # beyond, w is nothing beside a
    near = nn.functional.softplus(-b)
    w = near * (1 - torch.log1p(near) / (2 + near))
    for _ in range(3):
        w = w / (1 + w) * (1 - b - torch.log(w))
    return log_scaled + torch.where(a > 0, a + w, -torch.log(w))  # the same, each where it loses no digits
