"""Weights that are renewed only every k-th step."""

from dataclasses import dataclass, replace

from torch import Tensor

from mtlweight._checks import expect_count
from mtlweight._errors import MTLWeightError
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting
from mtlweight.compose._combinator import Wrapper


@dataclass(frozen=True, repr=False)
class _Every(Wrapper):
    k: int

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_count("every", "k", self.k)
        if self.inner.writes == "entry":
            raise MTLWeightError(
                f"every keeps weights per task between steps: expected a weighting per task or sample, found "
                f"{self.inner!r}, which writes one per entry, and the next gradients have other ones. Wrap another."
            )

    @property
    def traits(self) -> Traits:
        # Kept weights come from other gradients.
        return replace(self.inner.traits, nonconflicting=False, stationary=None)

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
            return (kept if self.writes == "task" else kept[:, None] * view.shares), state
        weights, inner = super().weigh(view, state)
        totals = weights if self.writes == "task" else weights.sum(dim=1)
        return weights, {**inner, "kept": view.scatter(table, totals)}

    def __repr__(self) -> str:
        return f"every({self.k}, {self.inner!r})"


def every(k: int, inner: Weighting) -> Weighting:
    """Computes a weighting's weights at every ``k``-th step and keeps them in between, to share its cost.

    In between nothing is measured, so a step costs as much as a plain one; but a reference that joins the step
    (``learn_reference=True``) joins each. If a task has no kept weight, because it was absent so far, all weights are
    computed at once. A weighting that reads the losses after the step does so after every ``k``-th step only.

    A weighting per sample keeps each task's total, since the next batch has other samples. In between the total is
    spread evenly over the task's samples.

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
    return _Every(inner, k)
