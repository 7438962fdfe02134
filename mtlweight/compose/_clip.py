"""Weights within bounds."""

import math
from dataclasses import dataclass, replace

from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight._weighting import Traits, Weighting
from mtlweight.compose._combinator import Wrapper


@dataclass(frozen=True, repr=False)
class _Clip(Wrapper):
    low: float
    high: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.low <= self.high:
            raise MTLWeightError(f"clip: expected low <= high, found low={self.low}, high={self.high}. Swap them.")

    @property
    def traits(self) -> Traits:
        inner = self.inner.traits
        return replace(
            inner,
            nonnegative=self.low >= 0 or (inner.nonnegative and self.high >= 0),
            total=None,
            nonconflicting=False,
            stationary=None,
            scale_degree=0 if inner.scale_degree == 0 else None,
        )

    def changed(self, weights: Tensor) -> Tensor:
        return weights.clamp(self.low, self.high)

    def __repr__(self) -> str:
        return f"clip({self.inner!r}, low={self.low}, high={self.high})"


def clip(inner: Weighting, low: float = -math.inf, high: float = math.inf) -> Weighting:
    """Keeps each weight of a weighting within ``[low, high]``.

    Args:
        inner: any weighting.
        low: the least weight. Default: no bound.
        high: the greatest weight. Default: no bound.

    Raises:
        MTLWeightError: if ``low > high``.

    >>> import torch
    >>> from mtlweight import Constant
    >>> clip(Constant([0.1, 9.0]), low=0.5, high=2.0)(losses=torch.ones(2))
    tensor([0.5000, 2.0000])
    """
    return _Clip(inner, low, high)
