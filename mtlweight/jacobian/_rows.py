"""Tables of gradients: one row of ``n`` numbers per task."""

from typing import Any

import torch
from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight._view import View


def gather_rows(name: str, view: View, table: Any, like: Tensor) -> Tensor:
    """The present tasks' rows of ``table``, ``[n]`` each, in the dtype of ``like``, ``[m, n]``; zeros for new tasks.

    Raises:
        MTLWeightError: if a row has another length.
    """
    n = like.shape[1]
    for task in view.tasks:
        if task in table and table[task].shape != (n,):
            raise MTLWeightError(
                f"{name} remembers each task's gradient: expected {len(table[task])} shared parameters as in the steps "
                f"before, found {n}. Freezing or adding parameters changes their number; start a new optimizer then."
            )
    return view.gather(table, torch.zeros(n, dtype=like.dtype)).to(like.dtype)


def gather_simplex(view: View, table: Any) -> Tensor:
    """The present tasks' remembered weights, ``[m]``, rescaled to add up to one; a task joins with ``1 / m``."""
    m = len(view.tasks)
    weights = view.gather(table, 1 / m)
    total = weights.sum()
    return torch.where(total > 0, weights / torch.where(total > 0, total, 1.0), 1 / m)


def smallest_weights(direction: Tensor, jacobian: Tensor) -> Tensor:
    """The weights of least squares among those whose weighted rows add up to the direction, column by column."""
    size = jacobian.abs().amax(dim=0)
    unit = jacobian / torch.where(size > 0, size, 1.0)
    share = unit / unit.square().sum(dim=0).clamp(min=1.0)
    weights = torch.where(size > 0, direction / torch.where(size > 0, size, 1.0), 0.0) * share
    return torch.where(weights.isfinite(), weights, 0.0)  # entries so small that nothing can be made of them


def combination(weights: Tensor, rows: Tensor) -> Tensor:
    """``Σ_t w_t y_t``, ``[n]``, with exact zeros where only rounding is left, which has no direction."""
    weights = weights.to(rows.dtype)
    total, size = weights @ rows, weights.abs() @ rows.abs()
    return torch.where(total.abs() > 8 * len(rows) * torch.finfo(rows.dtype).eps * size, total, 0.0)
