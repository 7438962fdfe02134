"""Geometric loss strategy."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mtlweight._checks import nonnegative
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting
from mtlweight.loss._domain import alive


@dataclass(frozen=True)
class GLS(Weighting):
    """Minimises the geometric mean of the losses, so that relative changes of a loss matter, not absolute ones.

    The scalar is ``f = (∏_t ℓ_t)^(1/m)``, written as the weights ``w_t = ∂f/∂ℓ_t = f / (m ℓ_t)``; ``m`` is the number
    of tasks present.

    *Reads* the losses, which must be >= 0. *Writes* ``[m]``, non-negative; ``Σ w_t ℓ_t = f``. *State* none. *Cost*
    none.

    A loss of exactly zero has weight 0 and is left out of the mean: it is at its minimum, and ``f`` has no slope there.

    Raises:
        MTLWeightError: if a loss is negative.

    >>> GLS()(losses=torch.tensor([8.0, 2.0]))
    tensor([0.2500, 1.0000])

    *Differs from the paper* in nothing: products are computed as sums of logarithms, so that they neither overflow nor
    vanish. The paper's focused variant, which multiplies by a second mean over chosen tasks, is another method.

    References:
        Chennupati, Sistu, Yogamani, Rawashdeh, "MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss
        Strategy for Multi-Task Learning", CVPR workshops 2019, arXiv 1904.08492, the geometric loss strategy of its
        section on losses.
    """

    needs = Needs.LOSSES
    traits = Traits(nonnegative=True, scale_degree=0, losses="nonnegative")

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """The geometric mean's partial derivatives."""
        losses = nonnegative("GLS", view)
        counts = alive(losses)
        m = counts.sum().clamp(min=1)
        logs = torch.where(counts, losses, 1.0).log()
        return torch.where(counts, (logs.sum() / m - logs).exp() / m, 0.0), state
