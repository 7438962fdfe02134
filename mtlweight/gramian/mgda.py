"""Multiple gradient descent algorithm."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting
from mtlweight.solvers import min_norm


@dataclass(frozen=True)
class MGDA(Weighting):
    """The step of least norm among all convex combinations of the gradients: no task's loss rises to first order.

    ``w = argmin wᵀ G w`` over the simplex ``{w >= 0, Σ w = 1}``, with ``G = J Jᵀ``. Solved exactly by an active set.
    The step is zero only where a convex combination of the gradients vanishes (Pareto stationary). It favours tasks
    with small gradients: the smallest gradient gets the most weight.

    *Reads* the Gramian. *Writes* ``[m]``, on the simplex, with ``G w >= 0``. *State* none. *Cost* the gradients of all
    tasks; the solver is negligible.

    Where gradients are zero, they share the weight equally and the step is zero. Equal gradients share as well; of two
    that are equal up to rounding, the shorter one is nearer to zero and may get all of it, for the same step.

    >>> MGDA()(gramian=torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    tensor([0.7500, 0.2500])

    *Differs from the paper*: Sener & Koltun run Frank-Wolfe for a number of iterations; this is its limit. They also
    offer the gradients at the shared representation as an upper bound (MGDA-UB): pass ``engine="features"``.

    References:
        Désidéri, "Multiple-gradient descent algorithm (MGDA) for multiobjective optimization", Comptes Rendus
        Mathematique 350 (2012). Sener, Koltun, "Multi-Task Learning as Multi-Objective Optimization", NeurIPS 2018,
        arXiv 1810.04650, eq. 3 and, for two tasks, eq. 5.
    """

    needs = Needs.GRAMIAN
    traits = Traits(nonnegative=True, total=1.0, nonconflicting=True, stationary="weak", scale_degree=0)

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """The min-norm point."""
        solution = min_norm(view.gramian.cpu().numpy())
        view.note("mgda_residual", solution.residual)
        return torch.from_numpy(solution.weights).to(view.device, view.dtype), state
