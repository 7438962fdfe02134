"""The step on a task's log-variance that stays stable for losses of any size."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def implicit_step(s: Tensor, losses: Tensor, step_size: float) -> Tensor:
    """The root ``s'`` of ``s' = s - η (1 - exp(-s') ℓ)`` for each task.

    For small ``η`` it equals a step of gradient descent on ``exp(-s) ℓ + s``, and it never overshoots ``log ℓ``. At a
    loss of exactly 0, where the objective has no minimum, ``s`` rests.

    Args:
        s: log-variances, ``[m]``.
        losses: ``[m]``, not negative.
        step_size: ``η``.

    Returns:
        Tensor: ``[m]``, without a graph. The host waits for the numbers.
    """
    # One after the other: for few numbers an operation on a tensor takes longer than all of this.
    pairs = zip(s.tolist(), losses.tolist(), strict=True)
    roots = [_root(x, loss, step_size) if loss > 0 else x for x, loss in pairs]
    return torch.tensor(roots, dtype=s.dtype, device=s.device)


def _root(s: float, loss: float, step_size: float) -> float:
    # With w = exp(-s') η ℓ the equation is w + log w = -a: Lambert's function. Winitzki's approximation is off by 2% at
    # most, and each round of Iacono and Boyd's iteration squares that.
    log_scaled = math.log(step_size) + math.log(loss)
    a = s - step_size - log_scaled
    b = min(a, 80.0)  # beyond, w is nothing beside a
    near = math.log1p(math.exp(-b)) if b > 0 else math.log1p(math.exp(b)) - b
    w = near * (1 - math.log1p(near) / (2 + near))
    for _ in range(3):
        w = w / (1 + w) * (1 - b - math.log(w))
    return log_scaled + (a + w if a > 0 else -math.log(w))  # the same, each where it loses no digits
