"""Impartial multi-task learning, its gradient part."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting
from mtlweight.solvers import equal_projection


@dataclass(frozen=True)
class IMTLG(Weighting):
    """The combination of gradients that has the same projection on each of them, so that no task is favoured.

    ``<d, g_i> / |g_i| = κ`` for all ``i`` with ``d = Jᵀ w`` and ``Σ w = 1``. In closed form ``w = v / Σ v`` with ``G v
    = (|g_1|, ..., |g_m|)`` and ``G = J Jᵀ``.

    *Reads* the Gramian. *Writes* ``[m]``, of any sign, with sum 1. *State* none. *Cost* the gradients of all tasks; the
    solver is negligible.

    Where gradients depend on each other, the weights are the limit of those with a small independent part added to each
    gradient: duplicates share, and the step is zero where a combination of all gradients with positive coefficients
    vanishes. A zero gradient has no direction: its weight is 0. If all are zero, the weights are uniform.

    Args:
        normalization: ``"sum"`` scales weights to sum to 1. If they cancel, no scale does, and all weights are zero.
            ``"absolute"`` scales the sum of their absolute values to 1, which always works and keeps ``κ >= 0``, so
            that the step raises no task's loss. Default ``"sum"``, the paper's.

    Raises:
        MTLWeightError: if ``normalization`` is something else.

    >>> IMTLG()(gramian=torch.tensor([[4.0, 0.0], [0.0, 0.25]]))
    tensor([0.2000, 0.8000])

    *Differs from the paper* in nothing where gradients are independent; the paper leaves the other case open, and the
    official equations divide by zero there. With the paper's ``"sum"`` and three or more tasks ``Σ v`` can be negative,
    and the step then *raises all losses* (``κ < 0``), or near 0, and the step is huge; ``"absolute"`` does neither.

    References:
        Liu, Li, Kuang, Xue, Chen, Yang, Liao, Zhang, "Towards Impartial Multi-Task Learning", ICLR 2021, section 3.1.
    """

    normalization: Literal["sum", "absolute"] = "sum"

    needs = Needs.GRAMIAN

    def __post_init__(self) -> None:
        if self.normalization not in {"sum", "absolute"}:
            raise MTLWeightError(
                f"IMTLG: expected normalization 'sum' (the paper's) or 'absolute', found {self.normalization!r}."
            )

    @property
    def traits(self) -> Traits:
        """A sum of one does not tell the sign of the common projection."""
        if self.normalization == "sum":
            return Traits(total=1.0, stationary="strong", scale_degree=0)
        return Traits(nonconflicting=True, stationary="strong", scale_degree=0)

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """The combination with equal projections."""
        solution = equal_projection(view.gramian.cpu().numpy(), self.normalization)
        view.note("imtlg_residual", solution.residual)
        return torch.from_numpy(solution.weights).to(view.device, view.dtype), state
