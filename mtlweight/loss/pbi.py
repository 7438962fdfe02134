"""Penalty-based boundary intersection."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mtlweight._checks import expect
from mtlweight._errors import MTLWeightError
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting
from mtlweight.loss._domain import unit
from mtlweight.loss._per_task import PerTask, frozen, numbers, row


@dataclass(frozen=True)
class PBI(Weighting):
    """Moves the losses along a preferred line to the ideal point, and penalises their distance from the line.

    The scalar is ``f = d₁ + θ d₂`` with the unit direction ``u = λ / |λ|``, ``d₁ = <ℓ - z, u>`` and ``d₂ = |ℓ - z - d₁
    u|``, written as the weights ``w = ∂f/∂ℓ = u + θ (ℓ - z - d₁ u) / d₂``. A weight may be negative: that task is too
    far ahead.

    *Reads* the losses. *Writes* ``[m]``. *State* none. *Cost* none.

    On the line, ``d₂ = 0`` has a kink; of its subgradients 0 is taken: ``w = u``.

    Args:
        penalty: ``θ >= 0``. Default 5, the paper's.
        preference: ``λ >= 0``: one number for all tasks, one a task, or a mapping from task name. Default 1: equal
            losses are preferred.
        ideal: ``z``, a lower bound of the losses, in the same forms. Default 0.

    Raises:
        MTLWeightError: if ``penalty`` is negative, or the preference is negative or zero for all tasks present.

    >>> PBI(penalty=2.0)(losses=torch.tensor([2.0, 1.0]))
    tensor([ 2.1213, -0.7071])

    *Differs from the paper*, which is written for maximisation and takes ``d₁`` by its absolute value: with ``z`` a
    lower bound and losses to be minimised it is the same.

    References:
        Zhang, Li, "MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition", IEEE Transactions on
        Evolutionary Computation 11(6), 2007, section II on the boundary intersection approach.
    """

    penalty: float = 5.0
    preference: PerTask = 1.0
    ideal: PerTask = 0.0

    needs = Needs.LOSSES

    def __post_init__(self) -> None:
        expect(self, ">= 0", "penalty")
        object.__setattr__(self, "preference", frozen("PBI", "preference", self.preference, low=0.0))
        object.__setattr__(self, "ideal", frozen("PBI", "ideal", self.ideal))

    @property
    def traits(self) -> Traits:
        """Invariant to the losses' scale where the ideal point is 0."""
        return Traits(scale_degree=0 if not any(numbers(self.ideal)) else None)

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """The penalised distance's partial derivatives."""
        direction = unit(row("PBI", "preference", self.preference, view))
        if not direction.any():
            raise MTLWeightError(
                f"PBI: expected a preference > 0 for one of the tasks {', '.join(view.tasks)} at least, found 0. Raise "
                "one of them."
            )
        gap = unit(view.losses - row("PBI", "ideal", self.ideal, view))
        aside = gap - (gap @ direction) * direction
        # What rounding leaves of a vector on the line has no direction.
        off = torch.linalg.vector_norm(aside) > 8 * torch.finfo(aside.dtype).eps
        return direction + self.penalty * torch.where(off, unit(aside), 0.0), state
