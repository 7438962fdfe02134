"""Auxiliary tasks weighted by how much their gradients helped the main task over the last steps."""

from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from torch import Tensor

from mtlweight._checks import expect, expect_count
from mtlweight._view import Needs, State, View
from mtlweight._weighting import ReferenceUse, Traits, Weighting


@dataclass(frozen=True)
class OLAUX(Weighting):
    """Auxiliary weights descend on the main task's loss some steps later.

    Every ``N`` steps ``w_t ← max(0, w_t + η Σ_j <g_t(j), g_ref(j)>)`` for each auxiliary task, with the sum over the
    last ``N`` steps ``j`` in which the task was present; the main task has weight 1. To first order ``-<g_t, g_ref>``
    is how the main task's loss changes with the weight of task ``t``. ``g_t`` is the task's gradient over the scope,
    ``g_ref`` the gradient of the reference: the main task's loss on this batch, as in the paper, or on held-out data.

    *Reads* the alignment. *Writes* ``[m]``, non-negative. *State* per task: the weight, the running sum and its count.
    *Cost* the reference's forward and backward, and about one more forward if losses come as a callable.

    Args:
        main: name of the task that the reference belongs to; or several, with a reference for each, whose sum counts.
        step_size: ``η``, the product of the paper's two rates, the network's and the weights'. Its unit is that of one
            over a squared gradient, so there is no default that fits all. Default 0.1, ours.
        horizon: ``N``. Default 5, from memory the paper's.
        initial: an auxiliary task's first weight. Default 1, as in the code of vub-dl/SLGrad, which has a version.
        scope: parameters over which gradients are compared: ``"shared"``, the default and the paper's; ``"main"`` and
            ``"all"`` as in :class:`SLGrad`.

    Raises:
        MTLWeightError: if ``step_size`` is not positive and finite, ``horizon < 1``, or ``initial`` is negative.

    >>> OLAUX("0")(alignment=torch.tensor([4.0, 2.0, -1.0]))
    tensor([1., 1., 1.])

    *Differs from the paper*: weights are kept from becoming negative, which would make a task's loss rise. The step on
    the weights is plain gradient descent.

    References:
        Lin, Baweja, Kantor, Held, "Adaptive Auxiliary Task Weighting for Reinforcement Learning", NeurIPS 2019,
        algorithm 1, from memory.
    """

    main: str | tuple[str, ...]
    _: KW_ONLY
    step_size: float = 0.1
    horizon: int = 5
    initial: float = 1.0
    scope: Literal["shared", "main", "all"] = "shared"

    needs = Needs.ALIGNMENT
    traits = Traits(nonnegative=True)

    def __post_init__(self) -> None:
        expect(self, "> 0", "step_size")
        expect(self, ">= 0", "initial")
        expect_count("OLAUX", "horizon", self.horizon)
        ReferenceUse.of("OLAUX", self.main, scope=self.scope)

    @property
    def reference(self) -> ReferenceUse:
        """The main tasks' loss, over the scope."""
        return ReferenceUse.of("OLAUX", self.main, scope=self.scope)

    def init(self, view: View) -> State:
        """No task is known."""
        return {"weight": {}, "sum": {}, "count": {}}

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """The committed weights; after ``horizon`` steps the state's move by the sum of the alignments."""
        weight = view.gather(state["weight"], self.initial)
        total = view.gather(state["sum"]) + view.alignment
        count = view.gather(state["count"]) + 1
        done = count == self.horizon
        moved = (weight + self.step_size * total).clamp(min=0)
        main = torch.tensor([task in self.reference.main for task in view.tasks], device=view.device)
        return torch.where(main, 1.0, weight), {
            "weight": view.scatter(state["weight"], torch.where(done, moved, weight)),
            "sum": view.scatter(state["sum"], torch.where(done, 0.0, total)),
            "count": view.scatter(state["count"], torch.where(done, 0.0, count)),
        }
