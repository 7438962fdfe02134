"""Weights with a fixed sum."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mtlweight._checks import expect
from mtlweight._errors import MTLWeightError
from mtlweight._weighting import Traits, Weighting
from mtlweight.compose._combinator import Wrapper


@dataclass(frozen=True, repr=False)
class _Normalize(Wrapper):
    total: float

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self, "> 0", "total")
        if self.inner.writes == "entry":
            raise MTLWeightError(
                f"normalize divides weights per task or per sample by their sum; found {self.inner!r}, which writes "
                "one per gradient entry. Wrap a weighting per task or per sample."
            )

    @property
    def traits(self) -> Traits:
        inner = self.inner.traits
        return replace(
            inner,
            total=self.total if inner.nonnegative else None,
            scale_degree=None if inner.scale_degree is None else 0,
        )

    def changed(self, weights: Tensor) -> Tensor:
        size = weights.abs().amax()
        weights = weights / torch.where(size > 0, size, 1.0)  # so that tiny and huge weights can be summed
        sum_ = weights.abs().sum()
        return self.total * weights / torch.where(sum_ > 0, sum_, 1.0)

    def __repr__(self) -> str:
        return f"normalize({self.inner!r}, total={self.total})"


def normalize(inner: Weighting, total: float = 1.0) -> Weighting:
    """Scales weights so that their absolute values sum to ``total``, over tasks or over tasks and samples.

    If all weights are zero they stay zero.

    Args:
        inner: a weighting per task or per sample.
        total: the sum. Our default: 1, one objective's worth.

    Raises:
        MTLWeightError: if ``total`` is not positive and finite or ``inner`` writes weights per gradient entry.

    >>> from mtlweight import Constant
    >>> normalize(Constant([1.0, 3.0]), total=2.0)(losses=torch.tensor([1.0, 1.0]))
    tensor([0.5000, 1.5000])
    """
    return _Normalize(inner, total)
