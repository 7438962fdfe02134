"""Constant weights."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting
from mtlweight.loss._per_task import PerTask, frozen, numbers, row


@dataclass(frozen=True)
class Constant(Weighting):
    """Weights fixed by hand or found by a search: the strongest baseline when they are tuned.

    ``w_t = c_t``.

    *Reads* nothing. *Writes* ``[m]``. *State* none. *Cost* none.

    Args:
        weights: one number for all tasks, one a task in the order of their places (that of the first batch), or a
            mapping from each task's name to its number. Default: 1, which makes ``Constant()`` the identity of ``>>``.

    Raises:
        MTLWeightError: if a weight is not a finite number, or a task has none.

    >>> Constant({"depth": 2.0, "normals": 0.5})
    Constant({'depth': 2.0, 'normals': 0.5})
    >>> Constant([2.0, 0.5])(losses=torch.tensor([1.0, 1.0]))
    tensor([2.0000, 0.5000])
    """

    weights: PerTask = 1.0

    needs = Needs.NOTHING

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", frozen("Constant", "weights", self.weights))

    @property
    def traits(self) -> Traits:
        """Depends on the weights."""
        values = self.weights
        total: float | Literal["m"] | None = (
            "m" if values == 1.0 else float(sum(values)) if isinstance(values, tuple) else None
        )
        return Traits(nonnegative=min(numbers(values), default=0.0) >= 0, total=total, scale_degree=0)

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """The given numbers."""
        return row("Constant", "weights", self.weights, view), state

    def __repr__(self) -> str:
        return f"Constant({self.weights!r})"
