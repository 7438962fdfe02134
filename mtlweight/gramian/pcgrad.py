"""Projecting conflicting gradients."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting
from mtlweight.gramian._orders import random_orders


@dataclass(frozen=True)
class PCGrad(Weighting):
    """Each gradient gives up what opposes another one: gradient surgery.

    For each task ``i``, ``g = g_i``; for all other tasks ``j`` in a random order, if ``<g, g_j> < 0`` then
    ``g ← g - (<g, g_j> / |g_j|²) g_j``. The step is the sum of all ``g``. Every ``g`` is a combination of the rows of
    ``J``, so that its coefficients, and the weights, need ``G = J Jᵀ`` alone.

    *Reads* the Gramian and ``view.generator``. *Writes* ``[m]``, at least 1 each. *State* none. *Cost* the gradients of
    all tasks, and ``m`` vectorised operations.

    >>> PCGrad()(gramian=torch.tensor([[1.0, -0.5], [-0.5, 1.0]]))
    tensor([1.5000, 1.5000])
    >>> PCGrad()(gramian=torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
    tensor([1., 1.])

    *Differs from the paper* in nothing. Its official code averages over tasks in one place and sums in another; this is
    the sum of Algorithm 1. A zero gradient projects nothing.

    References:
        Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, arXiv 2001.06782, Algorithm 1.
    """

    needs = Needs.GRAMIAN
    traits = Traits(nonnegative=True, scale_degree=0, random=True)

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """Coefficients of all projected gradients, summed."""
        gramian = view.gramian
        m = len(gramian)
        squares = gramian.diagonal()
        # Row i: the projected g_i in terms of J.
        coefficients = torch.eye(m, dtype=gramian.dtype, device=gramian.device)
        for others in random_orders(view).unbind(dim=1):  # one other task for each row at a time
            conflict = (coefficients * gramian[others]).sum(dim=1).clamp(max=0)
            share = torch.where(squares[others] > 0, conflict / squares[others], 0.0)
            coefficients = coefficients.scatter_add(1, others[:, None], -share[:, None])
        return coefficients.sum(dim=0), state
