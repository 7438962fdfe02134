"""Projection of the mean gradient."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting
from mtlweight.solvers import dual_cone


@dataclass(frozen=True)
class DualProj(Weighting):
    """The step nearest to the mean gradient that raises no task's loss.

    ``d = π(g_0)`` with ``g_0 = (1/m) Σ_i g_i`` and ``π`` the projection on the dual cone ``{d: J d >= 0}``. As weights,
    ``w = argmin vᵀ G v`` subject to ``v >= 1 / m``, with ``G = J Jᵀ``. Solved exactly.

    *Reads* the Gramian. *Writes* ``[m]``, each at least ``1 / m``, with ``G w >= 0``. *State* none. *Cost* the
    gradients of all tasks; the solver is negligible.

    Without conflicts this is the mean. Where a combination of all gradients with positive coefficients vanishes, so
    does the step. A zero gradient keeps the weight ``1 / m`` and changes nothing.

    >>> DualProj()(gramian=torch.tensor([[1.0, -2.0], [-2.0, 9.0]]))
    tensor([1.0000, 0.5000])

    *Differs from the paper* in nothing: it projects exactly, without the constants that the official library adds to
    the Gramian. Other coefficients than ``1 / m`` are a chain: ``Constant([...]) >> DualProj()``. In continual learning
    this projection, of one gradient on the cone of all others, is known as GEM.

    References:
        Quinton, Rey, "Jacobian Descent for Multi-Objective Optimization", arXiv 2406.16232, eq. 3 and Proposition 1.
        Lopez-Paz, Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017, eq. 11.
    """

    needs = Needs.GRAMIAN
    traits = Traits(nonnegative=True, nonconflicting=True, stationary="strong", scale_degree=0)

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """The projection's coefficients."""
        gramian = view.gramian.cpu().numpy()
        m = len(gramian)
        solution = dual_cone(gramian, np.full(m, 1.0 / m))
        view.note("dualproj_residual", solution.residual)
        return torch.from_numpy(solution.weights).to(view.device, view.dtype), state
