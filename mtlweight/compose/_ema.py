"""Exponential moving average of weights."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mtlweight._checks import expect
from mtlweight._errors import MTLWeightError
from mtlweight._view import State, View
from mtlweight._weighting import Traits, Weighting
from mtlweight.compose._combinator import Wrapper


@dataclass(frozen=True, repr=False)
class _EMA(Wrapper):
    decay: float

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self, "in [0, 1)", "decay")
        if self.inner.writes != "task":
            raise MTLWeightError(
                f"ema averages weights per task over steps: expected a weighting per task, found {self.inner!r}, "
                f"which writes one per {self.inner.writes}, and the next batch has other ones. Wrap one per task."
            )

    @property
    def traits(self) -> Traits:
        return replace(self.inner.traits, nonconflicting=False, stationary=None)  # an average keeps the other claims

    def init(self, view: View) -> State:
        return {"average": {}}

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        weights, inner = super().weigh(view, state)
        average = self._averaged(weights, view, state)
        return average, {**inner, "average": view.scatter(state["average"], average)}

    def ahead(self, view: View, state: State) -> Tensor:
        return self._averaged(super().ahead(view, state), view, state)

    def _averaged(self, weights: Tensor, view: View, state: State) -> Tensor:
        table: Any = state["average"]
        old = view.gather(table, default=torch.nan)
        return torch.where(old.isnan(), weights, self.decay * old + (1 - self.decay) * weights)

    def __repr__(self) -> str:
        return f"ema({self.inner!r}, decay={self.decay})"


def ema(inner: Weighting, decay: float = 0.9) -> Weighting:
    """Smooths a weighting's weights over steps: ``v ← decay·v + (1 - decay)·w``, per task.

    A task's average starts at its first weight, and rests while the task is absent.

    Args:
        inner: a weighting per task.
        decay: share of the old average, in ``[0, 1)``. Our default: 0.9.

    Raises:
        MTLWeightError: if ``decay`` is out of range or ``inner`` writes weights per sample or per entry.

    >>> from mtlweight import DWA
    >>> ema(DWA(), decay=0.5)(losses=torch.tensor([1.0, 2.0]))
    tensor([1., 1.])
    """
    return _EMA(inner, decay)
