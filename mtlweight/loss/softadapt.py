"""SoftAdapt."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mtlweight._checks import expect, expect_count, expect_one_of, nonnegative
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting


@dataclass(frozen=True)
class SoftAdapt(Weighting):
    """More weight for tasks whose loss rises, or falls slowly, over the last steps.

    With the slopes ``s_t``, the derivative of the polynomial through the last ``order + 1`` losses of task ``t``:

    - ``variant="original"``: ``w = softmax(β s)``;
    - ``"normalized"``: ``w = softmax(β s / Σ_u |s_u|)``;
    - ``"loss-weighted"``: ``w_t = f_t exp(β s_t) / Σ_u f_u exp(β s_u)`` with ``f_t`` the mean of those losses.

    *Reads* the losses. *Writes* ``[m]``, on the simplex. *State* per task: the last ``order + 1`` losses and their
    number. *Cost* none.

    A task with fewer losses has slope 0, so the weights start equal (or proportional to the losses). If all losses are
    zero, the weights are equal.

    Args:
        sharpness: ``β``; negative values prefer tasks that improve fast. Default 0.1, the paper's.
        variant: as above. Default ``"original"``.
        order: accuracy of the slope. Default 1: ``s_t = ℓ_t - ℓ_t(before)``.
        slope_at: where in the window the derivative is taken: ``"newest"``, the default, is its present rate of change;
            ``"oldest"`` is what the official code computes, whose coefficients are those of a forward difference. For
            ``order=1`` they are the same.

    Raises:
        MTLWeightError: if ``sharpness`` is not finite, ``order < 1``, or a name is unknown; for
            ``variant="loss-weighted"`` if a loss is negative.

    >>> SoftAdapt()(losses=torch.tensor([3.0, 0.5]))
    tensor([0.5000, 0.5000])

    *Differs from the paper* in nothing but its small constants in denominators. Its official code computes weights once
    in so many epochs: ``every(k, SoftAdapt(...))``; and divides the normalized slopes by their plain sum, which
    vanishes where slopes cancel.

    References:
        Heydari, Thompson, Mehmood, "SoftAdapt: Techniques for Adaptive Loss Weighting of Neural Networks with
        Multi-Part Loss Functions", arXiv 1912.12355, section 3.1 on the three variants.
    """

    sharpness: float = 0.1
    variant: Literal["original", "normalized", "loss-weighted"] = "original"
    order: int = 1
    slope_at: Literal["newest", "oldest"] = "newest"

    needs = Needs.LOSSES
    layout = ("order",)

    def __post_init__(self) -> None:
        expect(self, "finite", "sharpness")
        expect_count("SoftAdapt", "order", self.order)
        expect_one_of(self, "variant", "original", "normalized", "loss-weighted")
        expect_one_of(self, "slope_at", "newest", "oldest")

    @property
    def traits(self) -> Traits:
        """Depends on the variant."""
        return Traits(
            nonnegative=True,
            total=1.0,
            scale_degree=0 if self.variant == "normalized" else None,
            losses="nonnegative" if self.variant == "loss-weighted" else "real",
        )

    def init(self, view: View) -> State:
        """No history."""
        return {"window": {}, "count": {}}

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """Softmax of the slopes of the window that ends with this batch."""
        weighted = self.variant == "loss-weighted"
        losses = nonnegative("SoftAdapt", view) if weighted else view.losses
        points = self.order + 1
        empty = torch.zeros(points, dtype=view.dtype)
        window = torch.cat([view.gather(state["window"], empty)[:, 1:], losses[:, None]], dim=1)
        count = (view.gather(state["count"]) + 1).clamp(max=points)

        coefficients = torch.tensor(self._coefficients(), dtype=view.dtype, device=view.device)
        slope = torch.where(count == points, window @ coefficients, 0.0)
        if self.variant == "normalized":
            size = slope.abs().max()
            unit = slope / torch.where(size > 0, size, 1.0)  # so that the sum cannot overflow
            slope = unit / unit.abs().sum().clamp(min=1.0)
        scores = self.sharpness * slope
        if weighted:
            mean = window.sum(dim=1) / count
            scores = scores + mean.log() if (mean > 0).any() else torch.zeros_like(scores)
        return scores.softmax(dim=0), {
            "window": view.scatter(state["window"], window),
            "count": view.scatter(state["count"], count),
        }

    def _coefficients(self) -> list[float]:
        """Of the losses in the window, oldest first, in the derivative of the polynomial through them."""
        order = self.order
        # f'(newest) = Σ_k ∇^k f / k, backward differences; f'(oldest) = Σ_k (-1)^(k - 1) Δ^k f / k, forward ones.
        backward = [sum((-1) ** j * math.comb(k, j) / k for k in range(max(j, 1), order + 1)) for j in range(order + 1)]
        return backward[::-1] if self.slope_at == "newest" else [-x for x in backward]
