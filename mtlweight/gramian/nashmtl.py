"""Multi-task learning as a bargaining game."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting
from mtlweight.solvers import alpha_fair


@dataclass(frozen=True)
class NashMTL(Weighting):
    """The Nash bargaining solution: the direction in which no task can gain a share that costs another a larger one.

    ``(G w)_i = 1 / w_i`` for all ``i``, ``w > 0``, with ``G = J Jᵀ``: the direction ``d = Jᵀ w`` maximises ``Σ_i log
    <g_i, d>`` among all of its norm, which is ``√m``. ``w_i |g_i|`` depends on the angles between gradients only, not
    on their lengths. Solved exactly, by Newton's method.

    *Reads* the Gramian. *Writes* ``[m]``, non-negative, with ``G w >= 0``. *State* none. *Cost* the gradients of all
    tasks; the solver is negligible. The paper renews weights every few steps to share the cost: ``every(25,
    NashMTL())``.

    Where a convex combination of gradients vanishes, the tasks in it cannot all gain, and their weights would grow
    without bound. The step is then the limit: it leaves the losses of all tasks in such combinations as they are to
    first order, and the others bargain about the rest; it is zero if there are no others. The former tasks get finite
    weights, of at least ``1 / |g_i|``. A zero gradient has nothing to gain: its weight is 0.

    Args:
        max_norm: the greatest norm of ``Jᵀ w``; weights are scaled down to it. Default ``None``, the paper's: no bound.
            The official code clips at 1, which, since the norm is ``√m``, divides by ``√m``.

    Raises:
        MTLWeightError: if ``max_norm`` is not positive.

    >>> NashMTL()(gramian=torch.tensor([[4.0, -1.0], [-1.0, 1.0]]))
    tensor([0.7071, 1.4142])
    >>> NashMTL(max_norm=1.0)(gramian=torch.tensor([[4.0, -1.0], [-1.0, 1.0]]))
    tensor([0.5000, 1.0000])

    *Differs from the paper*, which approximates the solution by at most 20 convex problems, started from the last
    step's weights; this is the solution itself, so that no state is needed. Where that solver fails, the official code
    goes on with older weights without a word. It clips the gradient of shared parameters alone; here heads follow the
    weights. Multiplying the losses by ``c`` multiplies the weights by ``1 / c``: the step does not get smaller as
    training converges; ``normalize(NashMTL())`` makes it.

    References:
        Navon, Shamsian, Achituve, Maron, Kawaguchi, Chechik, Fetaya, "Multi-Task Learning as a Bargaining Game", ICML
        2022, arXiv 2202.01017, Claim 3.1 and Algorithm 1.
    """

    max_norm: float | None = None

    needs = Needs.GRAMIAN
    traits = Traits(nonnegative=True, nonconflicting=True, stationary="strong", scale_degree=-1)

    def __post_init__(self) -> None:
        if self.max_norm is not None and not self.max_norm > 0:
            raise MTLWeightError(f"NashMTL: expected max_norm > 0 or None, found {self.max_norm}. None sets no bound.")

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """The bargaining solution."""
        gramian = view.gramian.cpu().numpy()
        solution = alpha_fair(gramian)
        view.note("nashmtl_residual", solution.residual)
        weights = solution.weights
        if self.max_norm is not None:
            norm = math.sqrt(max(float(weights @ gramian @ weights), 0.0))
            if norm > self.max_norm:
                weights = weights * (self.max_norm / norm)
        return torch.from_numpy(weights).to(view.device, view.dtype), state
