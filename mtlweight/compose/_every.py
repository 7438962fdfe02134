"""Weights that are renewed only every k-th step."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from mtlweight._checks import expect_count
from mtlweight._errors import MTLWeightError
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting, evaluate
from mtlweight.compose._combinator import Combinator, substate


@dataclass(frozen=True, repr=False)
class _Every(Combinator):
    k: int
    inner: Weighting

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_count("every", "k", self.k)
        if self.inner.writes == "entry":
            raise MTLWeightError(
                f"every keeps weights per task between steps: expected a weighting per task or sample, found "
                f"{self.inner!r}, which writes one per entry, and the next gradients have other ones. Wrap another."
            )

    @property
    def parts(self) -> tuple[Weighting, ...]:
        return (self.inner,)

    @property
    def traits(self) -> Traits:
        inner = self.inner.traits
        return replace(inner, nonconflicting=False, stationary=None)  # kept weights were made for other gradients

    def needs_at(self, step: int) -> Needs:
        return self.inner.needs_at(step) if step % self.k == 0 else Needs.NOTHING

    def observes_at(self, step: int) -> bool:
        return step % self.k == 0 and self.inner.observes_at(step)

    def init(self, view: View) -> State:
        return {"kept": {}}

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        table = state["kept"]
        if view.step % self.k and all(task in table for task in view.tasks):
            kept = view.gather(table)
            if self.writes == "task":
                return kept, state
            return kept[:, None] * view.shares, state
        weights, inner = evaluate(self.inner, view, substate(state, 0))
        totals = weights if self.writes == "task" else weights.sum(dim=1)
        return weights, {"kept": view.scatter(table, totals), "0": inner}

    def __repr__(self) -> str:
        return f"every({self.k}, {self.inner!r})"


def every(k: int, inner: Weighting) -> Weighting:
    """Renews a weighting's weights at every ``k``-th step and keeps them in between, to share its cost.

    In between nothing is measured, so that the step costs as much as a plain one; but a reference that teaches
    (``learn_reference=True``) does so at each step. A task without kept weights (it is
    new, or was absent so far) makes the weights be renewed at once. A weighting that looks at the losses again after
    the step does so after each ``k``-th alone.

    Of a weighting per sample each task's total is kept, since the next batch has other samples: in between it is spread
    evenly over them. So tasks stay weighted, but samples are told apart at every ``k``-th step alone.

    Args:
        k: number of steps that share one set of weights.
        inner: a weighting per task or per sample.

    Raises:
        MTLWeightError: if ``k < 1`` or ``inner`` writes weights per entry.

    >>> import torch
    >>> from mtlweight import MGDA
    >>> every(10, MGDA())(gramian=torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    tensor([0.7500, 0.2500])
    """
    return _Every(k, inner)
