"""Fair resource allocation."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting
from mtlweight.solvers import alpha_fair


@dataclass(frozen=True)
class FairGrad(Weighting):
    """Shares the decrease of the losses alpha-fairly among tasks, between the largest sum and the best worst case.

    ``(G w)_i = w_i^(-1/α)`` for all ``i``, ``w > 0``, with ``G = J Jᵀ``: the direction ``d = Jᵀ w`` maximises ``Σ_i
    <g_i, d>^(1-α) / (1-α)`` over a ball. ``α → 0`` is the sum of the losses, ``α = 1`` is :class:`NashMTL`
    (proportional fairness), ``α = 2`` minimises the potential delay, ``α → ∞`` serves the task that gains the least.
    Solved exactly, by Newton's method.

    *Reads* the Gramian. *Writes* ``[m]``, non-negative, with ``G w >= 0``. *State* none. *Cost* the gradients of all
    tasks; the solver is negligible.

    Where a convex combination of gradients vanishes, the step is a limit, as for :class:`NashMTL`: the tasks in it keep
    their losses to first order, the others share the rest. A zero gradient has nothing to gain: its weight is 0.

    Args:
        alpha: ``α``. Default 2, as in the authors' scripts for all of their benchmarks; the default of their code is 1.

    Raises:
        MTLWeightError: if ``alpha`` is not positive and finite: for 0, ``Equal()`` is the limit.

    >>> FairGrad()(gramian=torch.tensor([[16.0, 0.0], [0.0, 1.0]]))
    tensor([0.1575, 1.0000])

    *Differs from the paper* in nothing: multiplying the losses by ``c`` multiplies the weights by ``c^(-2α / (1+α))``,
    so that for ``α > 1`` small losses make large steps; ``normalize(FairGrad())`` removes that. The official code
    minimises the equation's squared residual by a general solver from a start without scale, and need not reach 0; it
    multiplies the shared gradient by ``m`` and leaves heads unweighted, as ``heads="unweighted"`` does.

    References:
        Ban, Ji, "Fair Resource Allocation in Multi-Task Learning", ICML 2024, arXiv 2402.15638, eq. 4 and Algorithm 1.
    """

    alpha: float = 2.0

    needs = Needs.GRAMIAN

    def __post_init__(self) -> None:
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise MTLWeightError(
                f"FairGrad: expected a positive, finite alpha, found {self.alpha}. For 0 use Equal(), its limit."
            )

    @property
    def traits(self) -> Traits:
        """The power of the losses' scale is ``-2α / (1+α)``: an integer for ``α = 1`` alone."""
        degree = -1 if self.alpha == 1 else None
        return Traits(nonnegative=True, nonconflicting=True, stationary="strong", scale_degree=degree)

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """The alpha-fair weights."""
        solution = alpha_fair(view.gramian.cpu().numpy(), self.alpha)
        view.note("fairgrad_residual", solution.residual)
        return torch.from_numpy(solution.weights).to(view.device, view.dtype), state
