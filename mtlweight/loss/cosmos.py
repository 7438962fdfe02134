"""Conditioned one-shot multi-objective search."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtlweight._checks import expect
from mtlweight._errors import MTLWeightError
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Weighting
from mtlweight.loss._domain import alive, unit
from mtlweight.loss._per_task import PerTask, frozen, row


@dataclass(frozen=True)
class COSMOS(Weighting):
    """Weighs losses by a preference, and pulls their vector towards the preference's direction.

    The scalar is ``f = Σ_t r_t ℓ_t - λ cos(r, ℓ)``, written as the weights ``w_t = ∂f/∂ℓ_t = r_t - (λ / |ℓ|) (r_t / |r|
    - cos(r, ℓ) ℓ_t / |ℓ|)`` for the preference ``r``. A weight may be negative: that task is too far ahead.

    *Reads* the losses. *Writes* ``[m]``. *State* none. *Cost* none.

    Where all losses are exactly zero, the cosine has no slope and ``w = r``.

    Args:
        preference: ``r >= 0``: one number for all tasks, one a task, a mapping from task name, or a callable that
            returns one of these and is asked once a step. Default ``None``: ``1 / m`` for ``m`` tasks present.
        penalty: ``λ >= 0``. Default 2, the official code's; the paper's range from 0.01 to 8 with the data.

    Raises:
        MTLWeightError: if ``penalty`` is negative, or the preference is negative or zero for all tasks present.

    >>> COSMOS({"0": 0.8, "1": 0.2}, penalty=1.0)(losses=torch.tensor([1.0, 1.0]))
    tensor([0.5428, 0.4572])

    *Differs from the paper*: COSMOS draws ``r`` from a Dirichlet distribution for each batch and feeds it to the
    network beside the data, so that one network learns the whole Pareto front. A weighting comes after the network and
    cannot do that. This is the paper's objective: draw ``r`` yourself, compute the losses with it, and pass a callable
    that returns the same ``r``. With a fixed preference it is a scalarization for a single trade-off.

    References:
        Ruchte, Grabocka, "Scalable Pareto Front Approximation for Deep Multi-Objective Learning", ICDM 2021, arXiv
        2103.13392, the objective with cosine penalty, and Algorithm 1.
    """

    preference: PerTask | Callable[[], PerTask] | None = None
    penalty: float = 2.0

    needs = Needs.LOSSES

    def __post_init__(self) -> None:
        expect(self, ">= 0", "penalty")
        if isinstance(self.preference, (int, float, str, Sequence, Mapping)):
            object.__setattr__(self, "preference", frozen("COSMOS", "preference", self.preference, low=0.0))

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """The penalised sum's partial derivatives."""
        losses = view.losses
        given = self.preference() if callable(self.preference) else self.preference
        values = 1 / len(losses) if given is None else frozen("COSMOS", "preference", given, low=0.0)
        preference = row("COSMOS", "preference", values, view)
        if not (preference > 0).any():
            raise MTLWeightError(
                f"COSMOS: expected a preference > 0 for one of the tasks {', '.join(view.tasks)} at least, found 0. "
                "Direction zero has no cosine; raise one of them."
            )
        direction = unit(preference)
        size = losses.abs().max()
        if not alive(size):
            return preference, state
        scaled = losses / size
        length = torch.linalg.vector_norm(scaled)
        at = scaled / length
        slope = (direction - (direction @ at) * at) / length
        return preference - self.penalty * slope / size, state
