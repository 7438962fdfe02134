"""Dynamic weight average."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mtlweight._checks import expect_count
from mtlweight._errors import MTLWeightError
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting


@dataclass(frozen=True)
class DWA(Weighting):
    """More weight for tasks whose loss falls slowly.

    ``w_t(e) = m · softmax_t(r_t(e - 1) / T)`` with ``r_t(e - 1) = ℓ_t(e - 1) / ℓ_t(e - 2)``; ``e`` counts periods,
    ``ℓ_t(e)`` is the mean loss of task ``t`` over period ``e``, ``T`` is ``temperature``. A task without two finished
    periods has ``r_t = 1``, so that the weights start equal.

    *Reads* the losses. *Writes* ``[m]``, non-negative, with sum ``m``. *State* per task: the losses' sums over the last
    period but one, the last and the running one, and the running one's steps, in this order. *Cost* none.

    Args:
        temperature: ``T``; large values make the weights equal. Default 2, the paper's.
        period: number of steps (in which the task is present) that are averaged into one loss. Default 1. The paper
            averages over an epoch: pass its number of steps.

    Raises:
        MTLWeightError: if ``temperature`` is not positive or ``period < 1``.

    >>> DWA()(losses=torch.tensor([3.0, 0.5]))
    tensor([1., 1.])

    *Differs from the paper* in the default period, since a weighting does not know how long an epoch is. The ratio to a
    loss of exactly zero is taken as 1.

    References:
        Liu, Johns, Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019, arXiv 1803.10704, eq. 7.
    """

    temperature: float = 2.0
    period: int = 1

    needs = Needs.LOSSES
    traits = Traits(nonnegative=True, total="m", scale_degree=0)

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise MTLWeightError(f"DWA: expected temperature > 0, found {self.temperature}.")
        expect_count("DWA", "period", self.period)

    def init(self, view: View) -> State:
        """No history."""
        return {"history": {}}

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """Softmax of the loss ratios of the two last finished periods."""
        history = view.gather(state["history"], torch.zeros(4, dtype=view.dtype))
        before, last, total, count = history.unbind(dim=1)
        # Periods are equally long, so the ratio of the sums is that of the means. Divided by 0 it is not finite.
        ratio = (last / before).nan_to_num(1.0, 1.0, 1.0)
        weights = len(view.tasks) * (ratio / self.temperature).softmax(dim=0)
        total, count, zero = total + view.losses, count + 1, torch.zeros_like(total)
        running = torch.stack([before, last, total, count], dim=1)
        finished = torch.stack([last, total, zero, zero], dim=1)
        history = torch.where(count[:, None] >= self.period, finished, running)
        return weights, {"history": view.scatter(state["history"], history)}
