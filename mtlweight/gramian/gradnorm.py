"""Gradient normalisation."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mtlweight._checks import nonnegative
from mtlweight._errors import MTLWeightError
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting


@dataclass(frozen=True)
class GradNorm(Weighting):
    """Weights that learn to bring all tasks' gradient norms, and so their training rates, to a common scale.

    With ``n_t = w_t |g_t|``, the mean ``n̄``, and the relative inverse training rate ``r_t = (ℓ_t / ℓ_t(0)) /
    mean_u(ℓ_u / ℓ_u(0))``, the weights take one step of size ``η`` down on ``Σ_t |n_t - n̄ r_t^α|`` (target held
    fixed), are cut at 0 and rescaled to sum to ``m``; a step that would cut all of them is not taken.

    *Reads* the losses and the Gramian's diagonal. *Writes* ``[m]``, non-negative, with sum ``m`` while all tasks are
    present. *State* per task: weight and first loss. *Cost* the gradients of all tasks.

    Args:
        alpha: ``α``, the pull towards equal training rates; 0 asks for equal gradient norms. Default 1.5, the paper's
            for NYUv2 with related tasks (0.12 for its toy problem).
        step_size: ``η``. Default 0.025, the rate of the authors' released experiments.

    Raises:
        MTLWeightError: if ``alpha`` is negative, ``step_size`` is not positive, either is not finite, or a loss is
            negative (its rate is not defined).

    >>> GradNorm()(losses=torch.tensor([1.0, 1.0]), gramian=torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
    tensor([1., 1.])

    *Differs from the paper*: the step is divided by the mean unweighted norm ``mean_t |g_t|``, so that the weights do
    not depend on the losses' units, as the paper's do (its authors let Adam absorb it). Norms are over all shared
    parameters; the paper takes the last shared layer: pass that layer as ``shared``.

    References:
        Chen, Badrinarayanan, Lee, Rabinovich, "GradNorm", ICML 2018, arXiv 1711.02257, eq. 1 and 2, Algorithm 1.
    """

    alpha: float = 1.5
    step_size: float = 0.025

    needs = Needs.LOSSES | Needs.GRAMIAN
    traits = Traits(nonnegative=True, total="m", scale_degree=0, losses="nonnegative")

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < math.inf:
            raise MTLWeightError(f"GradNorm: expected a finite alpha >= 0, found {self.alpha}.")
        if not 0 < self.step_size < math.inf:
            raise MTLWeightError(f"GradNorm: expected a finite step_size > 0, found {self.step_size}.")

    def init(self, view: View) -> State:
        """No task is known."""
        return {"weight": {}, "first": {}}

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """The committed weights; the state takes one step."""
        losses = nonnegative("GradNorm", view)
        weights = view.gather(state["weight"], 1.0)
        first = view.gather(state["first"], torch.nan)
        first = torch.where(first.isnan(), losses, first)

        norms = view.gramian.diagonal().sqrt()
        progress = torch.where(first > 0, losses / first, 1.0)
        rate = progress / torch.where(progress.sum() > 0, progress.mean(), 1.0)
        weighted = weights * norms
        gap = weighted - weighted.mean() * rate**self.alpha
        slope = norms * gap.sign() * (gap.abs() > 1e-12 * weighted.mean())  # rounding alone has no sign
        unit = norms.mean()
        stepped = (weights - self.step_size * slope / torch.where(unit > 0, unit, 1.0)).clamp(min=0)
        # The present tasks keep the sum that they had, so that absent ones keep their share of m.
        stepped = torch.where(stepped.sum() > 0, stepped * (weights.sum() / stepped.sum()), weights)
        return weights, {
            "weight": view.scatter(state["weight"], stepped),
            "first": view.scatter(state["first"], first),
        }
