"""Coefficient of variation weighting."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mtlweight._checks import expect, nonnegative
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting
from mtlweight.loss._domain import ratio


@dataclass(frozen=True)
class CoV(Weighting):
    """CoV-Weighting: weighs a loss by how much it varies relative to its mean, so that one that is constant drops out.

    With the ratios ``r_t = ℓ_t / mean(ℓ_t before)``, whose mean ``μ_t`` and standard deviation ``σ_t`` over all steps
    are kept up to date, ``w_t = c_t / Σ_u c_u``, ``c_t = σ_t / μ_t``: the coefficients of variation before this step.

    *Reads* the losses, which must be >= 0. *Writes* ``[m]``, on the simplex. *State* per task: number of steps, mean
    loss, mean ratio, sum of the ratio's squared deviations. *Cost* none.

    A task has weight ``1 / m`` in its first two steps; the others share the rest. Where no ratio has varied at all, the
    weights are equal. Against a mean of exactly zero, the ratio is taken as 1.

    Args:
        variance_floor: added to the ratio's variance. Default 0, the paper's; the official code adds 1e-8.

    Raises:
        MTLWeightError: if ``variance_floor`` is negative, or a loss is negative.

    >>> CoV()(losses=torch.tensor([3.0, 0.5]))
    tensor([0.5000, 0.5000])

    *Differs from the paper* in nothing.

    References:
        Groenendijk, Karaoglu, Gevers, Mensink, "Multi-Loss Weighting with Coefficient of Variations", WACV 2021, arXiv
        2009.01717, section 3: coefficient of variation, loss ratio, and Welford's updates.
    """

    variance_floor: float = 0.0

    needs = Needs.LOSSES
    traits = Traits(nonnegative=True, total=1.0, scale_degree=0, losses="nonnegative")

    def __post_init__(self) -> None:
        expect(self, ">= 0", "variance_floor")

    def init(self, view: View) -> State:
        """No history."""
        return {"count": {}, "loss": {}, "ratio": {}, "deviation": {}}

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """The coefficients of variation up to the last step; the statistics take this batch in."""
        losses = nonnegative("CoV", view)
        m = len(losses)
        count, mean_loss = view.gather(state["count"]), view.gather(state["loss"])
        mean, deviation = view.gather(state["ratio"]), view.gather(state["deviation"])

        known = count >= 2
        spread = (deviation / count.clamp(min=1) + self.variance_floor).sqrt()
        variation = torch.where(known, spread / mean, 0.0)  # the mean ratio is above 0: the first one is 1
        total = variation.sum()
        share = torch.where(total > 0, variation / total, 1 / known.sum())
        weights = torch.where(known, known.sum() / m * share, 1 / m)

        now = torch.where(count == 0, 1.0, ratio(losses, mean_loss))
        new_mean = mean + (now - mean) / (count + 1)
        return weights, {
            "count": view.scatter(state["count"], count + 1),
            "loss": view.scatter(state["loss"], mean_loss + (losses - mean_loss) / (count + 1)),
            "ratio": view.scatter(state["ratio"], new_mean),
            "deviation": view.scatter(state["deviation"], deviation + (now - mean) * (now - new_mean)),
        }
