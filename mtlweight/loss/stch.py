"""Smooth Tchebycheff scalarization."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mtlweight._checks import expect, expect_count, expect_one_of, nonnegative
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting
from mtlweight.loss._domain import alive, inverse
from mtlweight.loss._per_task import PerTask, frozen, row


@dataclass(frozen=True)
class STCH(Weighting):
    """Minimises a smooth maximum of the weighted losses: the task that is worst off counts most.

    The scalar is ``f = μ log Σ_t exp(λ_t (ℓ_t - z_t) / μ)``, written as the weights ``w_t = ∂f/∂ℓ_t = λ_t softmax_t(λ
    (ℓ - z) / μ)``. ``λ`` is the preference, ``z`` the ideal point, ``μ`` the smoothing: as ``μ → 0`` all weight goes to
    the largest ``λ_t (ℓ_t - z_t)``, and every weakly Pareto optimal point minimises ``f`` for some ``λ``.

    *Reads* the losses. *Writes* ``[m]``, non-negative. *State* none; for ``form="official"`` the sum and the number of
    the first losses per task. *Cost* none.

    Args:
        smoothing: ``μ``, in the losses' unit. Default 1, the official code's; the paper tries 0.01 to 1.
        preference: ``λ >= 0``: one number for all tasks, one a task, or a mapping from task name. Default ``None``: ``1
            / m`` for ``m`` tasks present, the paper's.
        ideal: ``z``, in the same forms. Default 0: losses have no lower value.
        form: ``"paper"``, as above; or ``"official"``, as in the official code for multi-task learning: ``f = m μ log
            Σ_t (ℓ_t / n_t)^(1/μ)`` with each task's first mean loss ``n_t``, and ``f = Σ_t log ℓ_t`` before that is
            known. It reads neither ``preference`` nor ``ideal``, needs losses >= 0, and gives a loss of exactly zero
            weight 0.
        period: for ``form="official"``, the number of steps that ``n_t`` averages. Default 1. The official code takes
            the fifth epoch's mean; a weighting knows no epochs.

    Raises:
        MTLWeightError: if ``smoothing`` is not positive, ``preference`` is negative or not finite, or ``period < 1``;
            for ``form="official"`` if a loss is negative.

    >>> STCH()(losses=torch.tensor([3.0, 1.0]))
    tensor([0.3655, 0.1345])

    *Differs from the paper* in nothing; its official code for multi-task learning does: ``form``. There all epochs
    before the fifth count as warm-up without entering ``n_t``.

    References:
        Lin, Zhang, Yang, Liu, Zhang, "Smooth Tchebycheff Scalarization for Multi-Objective Optimization", ICML 2024,
        arXiv 2402.19078: the definition of STCH scalarization, and its gradient as a convex combination.
    """

    smoothing: float = 1.0
    preference: PerTask | None = None
    ideal: PerTask = 0.0
    form: Literal["paper", "official"] = "paper"
    period: int = 1

    needs = Needs.LOSSES
    layout = ("form",)

    def __post_init__(self) -> None:
        expect(self, "> 0", "smoothing")
        expect_one_of(self, "form", "paper", "official")
        expect_count("STCH", "period", self.period)
        if self.preference is not None:
            object.__setattr__(self, "preference", frozen("STCH", "preference", self.preference, low=0.0))
        object.__setattr__(self, "ideal", frozen("STCH", "ideal", self.ideal))

    @property
    def traits(self) -> Traits:
        """The official form needs non-negative losses, and is invariant to their scale."""
        if self.form == "official":
            return Traits(nonnegative=True, scale_degree=-1, losses="nonnegative")
        return Traits(nonnegative=True)

    def init(self, view: View) -> State:
        """No history."""
        return {"sum": {}, "count": {}} if self.form == "official" else {}

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """The smooth maximum's partial derivatives."""
        if self.form == "official":
            return self._official(view, state)
        losses = view.losses
        preference = 1 / len(losses) if self.preference is None else self.preference
        scale = row("STCH", "preference", preference, view)
        gap = scale * (losses - row("STCH", "ideal", self.ideal, view))
        return scale * ((gap - gap.max()) / self.smoothing).softmax(dim=0), state

    def _official(self, view: View, state: State) -> tuple[Tensor, State]:
        losses = nonnegative("STCH", view)
        total, count = view.gather(state["sum"]), view.gather(state["count"])
        known = (count >= self.period) & alive(total)
        relative = losses / (total / count)
        part = known & alive(losses) & alive(relative)
        shares = torch.where(part, relative.log() / self.smoothing, -math.inf).softmax(dim=0)  # NaN if none is part
        weights = inverse(losses) * torch.where(known, known.sum() * torch.where(part, shares, 0.0), 1.0)

        more = (~known).to(losses.dtype)
        return weights, {
            "sum": view.scatter(state["sum"], total + more * losses),
            "count": view.scatter(state["count"], count + more),
        }
