"""Robust multi-task learning with excess risks."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mtlweight._checks import expect_count
from mtlweight._errors import MTLWeightError
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting
from mtlweight.jacobian._rows import gather_rows


@dataclass(frozen=True)
class ExcessMTL(Weighting):
    """More weight for tasks that are far from the best that they can reach, whatever noise their labels have.

    A task's excess risk is estimated as ``e_t = g_tᵀ H_t⁻¹ g_t`` with the diagonal ``H_t = sqrt(Σ g_t²)``, summed over
    the steps so far, and is taken relative to ``e_t(0)``, its mean over the warm-up. The weights follow by
    exponentiated gradient ascent, ``w_t ∝ w_t exp(η e_t / e_t(0))``.

    *Reads* the Jacobian. *Writes* ``[m]``, on the simplex. *State* per task: ``sqrt(Σ g²)`` of size ``[n]``, the log of
    the weight, ``e_t(0)``, and the number of steps up to ``warmup``. *Cost* the gradients of all tasks, kept as ``[m,
    n]``, and as much memory again for the state.

    A weight rests during its task's warm-up, in which steps with a zero gradient do not count. A task joins with the
    mean weight, and the weights of absent tasks rest: the present ones share what they had together.

    Args:
        step_size: ``η``. Default 1, the paper's; the official code's default is 0.01, and its README sets 1.
        warmup: number of a task's steps that ``e_t(0)`` averages. Default 1, the official code's; the paper recommends
            those of the first three epochs.

    Raises:
        MTLWeightError: if ``step_size`` is not positive, ``warmup < 1``, or the number of shared parameters changes.

    >>> ExcessMTL()(jacobian=torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    tensor([0.5000, 0.5000])

    *Differs from the paper* in nothing. Its official code starts from weights 1 and keeps their sum at ``m``:
    ``normalize(ExcessMTL(), total=m)``. It also adds 1e-7 to ``Σ g²``, which makes the estimate depend on the losses'
    units; here an entry that was always zero counts as zero.

    References:
        He, Zhou, Zhang, Yue, Li, Wang, Zhao, "Robust Multi-Task Learning with Excess Risks", ICML 2024, arXiv
        2402.02009, eq. 6, 7 and 9, section 3.2 and appendix C.1.
    """

    step_size: float = 1.0
    warmup: int = 1

    needs = Needs.JACOBIAN
    traits = Traits(nonnegative=True, total=1.0, scale_degree=0)

    def __post_init__(self) -> None:
        if not 0 < self.step_size < math.inf:
            raise MTLWeightError(f"ExcessMTL: expected a finite step_size > 0, found {self.step_size}.")
        expect_count("ExcessMTL", "warmup", self.warmup)

    def init(self, view: View) -> State:
        """No history."""
        return {"curvature": {}, "logit": {}, "baseline": {}, "count": {}}

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """One step of exponentiated gradient ascent on the relative excess risks."""
        jacobian = view.jacobian
        curvature = torch.hypot(gather_rows("ExcessMTL", view, state["curvature"], jacobian), jacobian)
        share = jacobian.abs() / torch.where(curvature > 0, curvature, 1.0)
        # |g|² / H of an entry, summed over entries of like size: no square of an entry is formed.
        excess = (jacobian.abs() * share).sum(dim=1, dtype=view.dtype)

        baseline, count = view.gather(state["baseline"]), view.gather(state["count"])
        known = (count >= self.warmup) & (baseline > 0)
        relative = torch.where(known, excess / torch.where(known, baseline, 1.0), 0.0)
        logits = view.gather(state["logit"])
        # Absent tasks rest, so the present ones keep the sum that they had.
        stepped = (logits + self.step_size * relative).log_softmax(dim=0) + logits.logsumexp(dim=0)

        warms = ~known & (excess > 0)
        count = count + warms.to(view.dtype)
        mean = baseline + (excess - baseline) / count.clamp(min=1)
        return stepped.softmax(dim=0), {
            "curvature": view.scatter(state["curvature"], curvature),
            "logit": view.scatter(state["logit"], stepped),
            "baseline": view.scatter(state["baseline"], torch.where(warms, mean, baseline)),
            "count": view.scatter(state["count"], count),
        }
