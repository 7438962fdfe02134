"""Hyperparameters with one number a task."""

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight._view import View

PerTask: TypeAlias = float | Sequence[float] | Mapping[str, float]
"""One number for all tasks, one a task in the order of their places, or a mapping from task name to number."""


def numbers(values: PerTask) -> list[float]:
    """The numbers alone."""
    if isinstance(values, Mapping):
        return list(values.values())
    return list(values) if isinstance(values, Sequence) else [values]


def frozen(name: str, what: str, values: PerTask, *, low: float = -math.inf) -> PerTask:
    """A copy, which the user cannot change later. Raises if a number is not finite or below ``low``."""
    fine = not isinstance(values, str) and all(
        isinstance(x, (int, float)) and math.isfinite(x) and x >= low for x in numbers(values)
    )
    if not fine:
        bound = "" if low == -math.inf else f" >= {low:g}"
        raise MTLWeightError(
            f"{name}: expected {what} as a finite number{bound}, a sequence of them or a mapping from task to number, "
            f"found {values!r}."
        )
    if isinstance(values, Mapping):
        return dict(values)
    return tuple(values) if isinstance(values, Sequence) else values


def row(name: str, what: str, values: PerTask, view: View) -> Tensor:
    """The present tasks' numbers, ``[m]``. Raises if a task has none, or a sequence is not one number a known task."""
    tasks = view.tasks
    if isinstance(values, Mapping):
        missing = [task for task in tasks if task not in values]
        if missing:
            raise MTLWeightError(
                f"{name}: expected {what} for each task, found none for {', '.join(missing)}. Add it to the mapping "
                f"{dict(values)}."
            )
        chosen = [values[task] for task in tasks]
    elif isinstance(values, Sequence):
        known = view.known
        if len(values) != len(known):
            raise MTLWeightError(
                f"{name}: expected {len(values)} tasks, one for each number in {what}, found {len(known)} "
                f"({', '.join(known)}). Give a mapping by name; or mention all tasks in the first batch, absent ones "
                "with None."
            )
        chosen = [values[place] for place in view.places]
    else:
        chosen = [values] * len(tasks)
    return torch.tensor(chosen, dtype=view.dtype, device=view.device)
