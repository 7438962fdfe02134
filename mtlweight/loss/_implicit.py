"""The step on a task's log-variance that stays stable for losses of any size."""

import math

import torch
from torch import Tensor


def implicit_step(s: Tensor, losses: Tensor, step_size: float) -> Tensor:
    """The root ``s'`` of ``s' = s - η (1 - exp(-s') ℓ)`` for each task.

    For small ``η`` it equals a step of gradient descent on ``exp(-s) ℓ + s``, and it never overshoots ``log ℓ``. At a
    loss of exactly 0, where the objective has no minimum, ``s`` stays.
    """
    # With w = exp(-s') η ℓ the equation is w + log w = -a: Lambert's function. Winitzki's approximation is off by 2% at
    # most, and each round of Iacono and Boyd's iteration squares that.
    log_scaled = math.log(step_size) + losses.log()
    a = s - step_size - log_scaled
    b = a.clamp(max=80.0)  # beyond, w is negligible beside a
    near = torch.nn.functional.softplus(-b)
    w = near * (1 - near.log1p() / (2 + near))
    for _ in range(3):
        w = w / (1 + w) * (1 - b - w.log())
    root = log_scaled + torch.where(a > 0, a + w, -w.log())  # equal; each where it loses no digits
    return torch.where(losses > 0, root, s)
