"""Constant weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting


@dataclass(frozen=True)
class Constant(Weighting):
    """Weights fixed by hand or found by a search: the strongest baseline when they are tuned.

    ``w_t = c_t``.

    *Reads* nothing. *Writes* ``[m]``. *State* none. *Cost* none.

    Args:
        weights: one number for all tasks, one a task in the order of the losses, or a mapping from each task's name
            to its number. Default: 1, which makes ``Constant()`` the identity of ``>>``.

    Raises:
        MTLWeightError: if a weight is not a finite number, or a task has none.

    >>> Constant({"depth": 2.0, "normals": 0.5})
    Constant({'depth': 2.0, 'normals': 0.5})
    >>> Constant([2.0, 0.5])(losses=torch.tensor([1.0, 1.0]))
    tensor([2.0000, 0.5000])
    """

    weights: float | Sequence[float] | Mapping[str, float] = 1.0

    needs = Needs.NOTHING

    def __post_init__(self) -> None:
        values = self.weights
        numbers = (
            values.values() if isinstance(values, Mapping) else values if isinstance(values, Sequence) else [values]
        )
        if isinstance(values, str) or not all(isinstance(x, (int, float)) and math.isfinite(x) for x in numbers):
            raise MTLWeightError(
                f"Constant: expected a finite number, a sequence of them or a mapping from task to number, found "
                f"{values!r}."
            )
        # A private copy, so that the value cannot change under the optimizer.
        frozen = (
            dict(values) if isinstance(values, Mapping) else tuple(values) if isinstance(values, Sequence) else values
        )
        object.__setattr__(self, "weights", frozen)

    @property
    def traits(self) -> Traits:
        """Depends on the signs of the weights."""
        values = self.weights
        numbers = (
            values.values() if isinstance(values, Mapping) else values if isinstance(values, Sequence) else [values]
        )
        return Traits(nonnegative=all(x >= 0 for x in numbers), scale_degree=0)

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """The given numbers."""
        return torch.tensor(self._row(view.tasks), dtype=view.dtype, device=view.device), state

    def _row(self, tasks: tuple[str, ...]) -> list[float]:
        if isinstance(self.weights, Mapping):
            missing = [task for task in tasks if task not in self.weights]
            if missing:
                raise MTLWeightError(
                    f"Constant: expected a weight for each task, found none for {', '.join(missing)}. Add it to the "
                    f"mapping {dict(self.weights)}."
                )
            return [self.weights[task] for task in tasks]
        if isinstance(self.weights, Sequence):
            if len(self.weights) != len(tasks):
                raise MTLWeightError(
                    f"Constant: expected {len(self.weights)} tasks, one for each weight, found {len(tasks)} "
                    f"({', '.join(tasks)}). Where tasks may be absent, give the weights as a mapping by name."
                )
            return list(self.weights)
        return [self.weights] * len(tasks)

    def __repr__(self) -> str:
        return f"Constant({self.weights!r})"
