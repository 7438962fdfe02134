"""Impartial multi-task learning by loss balance."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mtlweight._checks import expect, nonnegative
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting
from mtlweight.loss._domain import alive
from mtlweight.loss._implicit import implicit_step


@dataclass(frozen=True)
class IMTLL(Weighting):
    """IMTL-L: each loss gets a learned scale that pulls it towards 1, so that its unit does not matter.

    ``w_t = exp(s_t)``; the scales ``s_t`` descend on ``exp(s_t) ℓ_t - s_t``, whose minimum is ``exp(s_t) ℓ_t = 1``.
    Each step is implicit, ``s_t' = s_t - η (exp(s_t') ℓ_t - 1)``: for small ``η`` it equals gradient descent, and it
    stays stable for losses of any size.

    *Reads* the losses, which must be >= 0. *Writes* ``[m]``, positive. *State* ``s_t`` per task, which
    no weight decay or momentum touches. *Cost* none.

    With ``s = -log σ²`` this is :class:`UW`, and the weights are the same as long as no loss is zero. In the paper they
    differ by a factor of two. The scale of a loss of exactly zero stays: the objective has no minimum there.

    Args:
        step_size: ``η``. Default 0.02, ours, as in :class:`UW`; the paper trains ``s`` by the network's optimizer.
        initial: ``s_t`` of a new task. Default 0: weight 1, the paper's.

    Raises:
        MTLWeightError: if ``step_size`` is not positive, or a loss is negative.

    >>> IMTLL()(losses=torch.tensor([3.0, 0.5]))
    tensor([1., 1.])

    *Differs from the paper* in the implicit step.

    References:
        Liu, Li, Kuang, Xue, Chen, Yang, Liao, Zhang, "Towards Impartial Multi-task Learning", ICLR 2021, the objective
        ``exp(s) L - s`` of its section on loss balance (IMTL-L) and Algorithm 1.
    """

    step_size: float = 0.02
    initial: float = 0.0

    needs = Needs.LOSSES
    traits = Traits(nonnegative=True, losses="nonnegative")

    def __post_init__(self) -> None:
        expect(self, "> 0", "step_size")
        expect(self, "finite", "initial")

    def init(self, view: View) -> State:
        """No task is known."""
        return {"log_scale": {}}

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """The committed scales; the state takes one implicit step."""
        losses = nonnegative("IMTLL", view)
        s = view.gather(state["log_scale"], self.initial)
        stepped = torch.where(alive(losses), -implicit_step(-s, losses, self.step_size), s)
        return s.exp(), {"log_scale": view.scatter(state["log_scale"], stepped)}
