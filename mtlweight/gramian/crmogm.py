"""Correlation-reduced stochastic multi-objective gradient manipulation."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting, evaluate
from mtlweight.gramian.mgda import MGDA


@dataclass(frozen=True)
class CRMOGM(Weighting):
    """Smooths the weights of another method over steps, so that they do not follow the noise of one batch.

    ``λ_k = α λ_{k-1} + (1 - α) λ̂_k``, with ``λ̂_k`` the weights that ``inner`` finds at step ``k``, and ``λ_0 =
    λ̂_1``. Weights of one batch are correlated with the gradients that they multiply, which biases the step and can
    keep the method from converging; the average breaks that.

    *Reads* what ``inner`` reads. *Writes* ``[m]``, as ``inner`` does. *State* per task: ``λ``; and the state of
    ``inner``. *Cost* that of ``inner``.

    A task's average starts at its first weight, and rests while the task is absent. What holds for each step of
    ``inner``, such as that no task's loss rises, need not hold for the averages.

    Args:
        inner: a weighting per task. Default ``MGDA()``, the first of the paper's; it smooths PCGrad and CAGrad too.
        decay: ``α`` in ``[0, 1)``, held constant. Default 0.9, TorchJD's; the paper wants it to approach 1 while the
            learning rate falls, and names no number here.

    Raises:
        MTLWeightError: if ``decay`` is out of range, or ``inner`` writes weights per sample or per entry, or uses a
            reference or the losses after the step.

    >>> CRMOGM()(gramian=torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    tensor([0.7500, 0.2500])

    *Differs from the paper*: ``α`` is one constant, a case of the paper's ``α_k``; the schedule of its Corollary 1
    needs the learning rate, which a weighting does not see. It is :func:`~mtlweight.ema` by its published name.

    References:
        Zhou, Zhang, Jiang, Zhong, Gu, Zhu, "On the Convergence of Stochastic Multi-Objective Gradient Manipulation and
        Beyond", NeurIPS 2022, Algorithm 1.
    """

    inner: Weighting = field(default_factory=MGDA)
    decay: float = 0.9

    layout = ("inner",)

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise MTLWeightError(f"CRMOGM: expected decay in [0, 1), found {self.decay}. 0 is no averaging.")
        if self.inner.writes != "task" or self.inner.observes or self.inner.reference is not None:
            raise MTLWeightError(
                f"CRMOGM: expected a weighting per task that uses no reference and no losses after the step, found "
                f"{self.inner!r}. For those, use ema(...)."
            )

    @property
    def parts(self) -> tuple[Weighting, ...]:
        """The smoothed weighting."""
        return (self.inner,)

    @property
    def needs(self) -> Needs:
        """What the smoothed weighting reads."""
        return self.inner.needs

    def needs_at(self, step: int) -> Needs:
        """What the smoothed weighting reads at this step."""
        return self.inner.needs_at(step)

    @property
    def traits(self) -> Traits:
        """What an average keeps."""
        return replace(self.inner.traits, nonconflicting=False, stationary=None)  # an average keeps the rest

    def init(self, view: View) -> State:
        """No average."""
        return {"average": {}}

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """The average with this batch's weights."""
        inner: Any = state.get("inner")
        weights, inner = evaluate(self.inner, view, inner)
        average = view.gather(state["average"], torch.full((), torch.nan, dtype=view.dtype))
        average = torch.where(average.isnan(), weights, self.decay * average + (1 - self.decay) * weights)
        return average, {"average": view.scatter(state["average"], average), "inner": inner}
