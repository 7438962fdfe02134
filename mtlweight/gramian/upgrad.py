"""Unconflicting projections of all gradients."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting
from mtlweight.solvers import dual_cone


@dataclass(frozen=True)
class UPGrad(Weighting):
    """The mean of the gradients after each gave up what conflicts with any other: no task's loss rises.

    ``d = (1/m) Σ_i π(g_i)`` with ``π(g)`` the point of the dual cone ``{d: J d >= 0}`` nearest to ``g``. As weights,
    ``w = Σ_i argmin vᵀ G v`` subject to ``v >= e_i / m``, with ``e_i`` the ``i``-th unit vector and ``G = J Jᵀ``. Each
    gradient keeps an influence in proportion to its norm. Solved exactly, all rows at once.

    *Reads* the Gramian. *Writes* ``[m]``, each at least ``1 / m``, with ``G w >= 0``. *State* none. *Cost* the
    gradients of all tasks; the solver takes some milliseconds for 64 tasks.

    Without conflicts this is the mean. Where a combination of all gradients with positive coefficients vanishes, so
    does the step. A zero gradient keeps the weight ``1 / m`` and changes nothing.

    >>> UPGrad()(gramian=torch.tensor([[1.0, -1.0], [-1.0, 2.0]]))
    tensor([1.0000, 0.7500])

    *Differs from the paper* in nothing: it projects exactly, without the constants that the official library adds to
    the Gramian. The paper's preference vector ``u``, which replaces ``1 / m``, is a chain: ``Constant([...]) >>
    UPGrad()`` projects ``u_i g_i`` for ``u = [...] / m``, since the cone does not depend on the lengths of gradients.

    References:
        Quinton, Rey, "Jacobian Descent for Multi-Objective Optimization", arXiv 2406.16232, eq. 3 and 4,
        Proposition 1.
    """

    needs = Needs.GRAMIAN
    traits = Traits(nonnegative=True, nonconflicting=True, stationary="strong", scale_degree=0)

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """The sum of the projections' coefficients."""
        gramian = view.gramian.cpu().numpy()
        m = len(gramian)
        solution = dual_cone(gramian, np.eye(m) / m)
        view.note("upgrad_residual", solution.residual)
        return torch.from_numpy(solution.weights.sum(axis=0)).to(view.device, view.dtype), state
