"""Scaled loss approximate weighting."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mtlweight._checks import expect
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting


@dataclass(frozen=True)
class SLAW(Weighting):
    """Brings all tasks' gradients to about the same norm, with the norms estimated from how much the losses vary.

    ``w_t = m (1 / s_t) / Σ_u (1 / s_u)`` with the running standard deviation ``s_t = sqrt(a_t - b_t²)``, where ``a_t``
    and ``b_t`` are moving averages of ``ℓ_t²`` and ``ℓ_t`` with decay ``β``. An optimizer's step changes a loss in
    proportion to its gradient's norm, so ``s_t`` estimates that norm without a backward pass.

    *Reads* the losses. *Writes* ``[m]``, positive, with sum ``m``. *State* per task: moving average and variance, and
    the number of steps up to ``1 / (1 - β)``. *Cost* none.

    The estimate needs losses that move: a task in its first step, and one whose losses have all been exactly zero, has
    weight 1, and the others share the rest.

    Args:
        decay: ``β``. Default 0.99, the official code's. The first ``1 / (1 - β)`` steps count equally, as there.
        floor: smallest ``s_t``, relative to the root mean square ``sqrt(a_t)`` of the loss. Default 1e-5. The official
            code's floor is 1e-5 absolutely, which depends on the losses' unit.

    Raises:
        MTLWeightError: if ``decay`` or ``floor`` is out of range.

    >>> SLAW()(losses=torch.tensor([3.0, 0.5]))
    tensor([1., 1.])

    *Differs from the paper* in ``floor``. The variance is updated directly instead of as the difference ``a - b²``, the
    same number without its rounding.

    References:
        Crawshaw, Košecká, "SLAW: Scaled Loss Approximate Weighting for Efficient Multi-Task Learning", arXiv
        2109.08218, eq. 9 and the estimate ``s_i`` before it.
    """

    decay: float = 0.99
    floor: float = 1e-5

    needs = Needs.LOSSES
    traits = Traits(nonnegative=True, total="m", scale_degree=0)

    def __post_init__(self) -> None:
        expect(self, "in [0, 1)", "decay")
        expect(self, "in (0, 1)", "floor")

    def init(self, view: View) -> State:
        """No history."""
        return {"count": {}, "mean": {}, "deviation": {}}

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """The inverse standard deviations, this batch's losses included."""
        losses = view.losses
        count = view.gather(state["count"]) + 1
        share = torch.where(count <= round(1 / (1 - self.decay)), 1 / count, 1 - self.decay)
        mean, deviation = view.gather(state["mean"]), view.gather(state["deviation"])
        change = losses - mean
        # Standard deviations throughout, and not variances: their squares would overflow or vanish first.
        deviation = (1 - share).sqrt() * torch.hypot(deviation, share.sqrt() * change)
        mean = mean + share * change

        estimate = torch.maximum(deviation, self.floor * torch.hypot(deviation, mean))
        known = (count > 1) & (estimate > 0)
        least = torch.where(known, estimate, torch.inf).min()
        inverse = torch.where(known, least / estimate, 0.0)
        weights = torch.where(known, known.sum() * inverse / inverse.sum(), 1.0)
        return weights, {
            "count": view.scatter(state["count"], count.clamp(max=1 / (1 - self.decay) + 1)),
            "mean": view.scatter(state["mean"], mean),
            "deviation": view.scatter(state["deviation"], deviation),
        }
