"""Relative loss balancing with random lookback."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mtlweight._checks import expect, nonnegative
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting
from mtlweight.loss._domain import ratio


@dataclass(frozen=True)
class ReLoBRaLo(Weighting):
    """More weight for tasks that have progressed little since the last step and, now and then, since the first.

    With the balance against an earlier loss, ``b_t(k') = m · softmax_t(ℓ_t / (T ℓ_t(k')))``, the weights at step ``k``
    are ``w(k) = α [ρ w(k - 1) + (1 - ρ) b(0)] + (1 - α) b(k - 1)``; ``ρ`` is 1 with probability ``memory`` and else 0,
    drawn at each step. Made for physics-informed networks.

    *Reads* the losses, which must be >= 0, and ``view.generator``. *Writes* ``[m]``, non-negative, with sum ``m`` while
    all tasks are present. *State* per task: weight, last loss, first loss and, up to 2, the number of steps. *Cost*
    none.

    A task's first weight is 1, its second is ``b(k - 1)``, as in the official code. The ratio to a loss of exactly zero
    is taken as 1.

    Args:
        decay: ``α``. Default 0.999, the official code's.
        temperature: ``T``; large values make the weights equal. Default 1, the official code's.
        memory: the expectation of ``ρ``. Default 0.999, ours: close to 1, as the paper advises. The official script's
            default is 1, with which it never looks back.

    Raises:
        MTLWeightError: if a hyperparameter is out of range, or a loss is negative.

    >>> ReLoBRaLo()(losses=torch.tensor([3.0, 0.5]))
    tensor([1., 1.])

    *Differs from the paper* in nothing. Its official code remembers the second step's losses as the first, and adds
    1e-12 to denominators.

    References:
        Bischof, Kraus, "Multi-Objective Loss Balancing for Physics-Informed Deep Learning", arXiv 2110.09813, the three
        equations that define ReLoBRaLo.
    """

    decay: float = 0.999
    temperature: float = 1.0
    memory: float = 0.999

    needs = Needs.LOSSES

    def __post_init__(self) -> None:
        expect(self, "in [0, 1)", "decay")
        expect(self, "> 0", "temperature")
        expect(self, "in [0, 1]", "memory")

    @property
    def traits(self) -> Traits:
        """Random unless it never or always looks back."""
        return Traits(nonnegative=True, total="m", scale_degree=0, random=0 < self.memory < 1, losses="nonnegative")

    def init(self, view: View) -> State:
        """No history."""
        return {"weight": {}, "last": {}, "first": {}, "count": {}}

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """The smoothed balance, with this batch's losses in it."""
        losses = nonnegative("ReLoBRaLo", view)
        before, count = view.gather(state["weight"], 1.0), view.gather(state["count"])
        last, first = view.gather(state["last"]), view.gather(state["first"])

        draw = torch.rand((), dtype=view.dtype, device=view.device, generator=view.generator)
        history = torch.where(draw < self.memory, before, self._balance(losses, first))
        recent = self._balance(losses, last)
        smooth = self.decay * history + (1 - self.decay) * recent
        weights = torch.where(count == 0, 1.0, torch.where(count == 1, recent, smooth))
        return weights, {
            "weight": view.scatter(state["weight"], weights),
            "last": view.scatter(state["last"], losses),
            "first": view.scatter(state["first"], torch.where(count == 0, losses, first)),
            "count": view.scatter(state["count"], (count + 1).clamp(max=2)),
        }

    def _balance(self, losses: Tensor, before: Tensor) -> Tensor:
        return len(losses) * (ratio(losses, before) / self.temperature).softmax(dim=0)
