"""Conflict-averse gradient descent."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting
from mtlweight.solvers import conflict_averse


@dataclass(frozen=True)
class CAGrad(Weighting):
    """Within a ball around the mean gradient, the step that is best for the task that it serves worst.

    ``d = argmax_d min_i <g_i, d>`` subject to ``|d - g_0| <= c |g_0|``, with ``g_0 = (1/m) Σ_i g_i`` and the radius
    ``c``. As weights, ``w_i = 1/m + (c |g_0| / |g_p|) p_i``, with ``g_p = Jᵀ p`` and ``p`` the minimiser of ``<g_p,
    g_0> + c |g_0| |g_p|`` over the simplex. ``c = 0`` is the mean; ``c < 1`` still finds its minima; the larger ``c``,
    the more like :class:`MGDA`. Solved exactly.

    *Reads* the Gramian. *Writes* ``[m]``, each at least ``1 / m`` before rescaling. *State* none. *Cost* the gradients
    of all tasks; the solver is negligible.

    Where a convex combination of gradients vanishes, many steps can be equally good in the worst case: the one nearest
    to ``g_0`` is taken. A zero gradient is left out of the minimum, which it would hold at 0, and keeps ``1 / m``.

    Args:
        radius: ``c``. Default 0.4, as in the authors' scripts for NYUv2 and Cityscapes; the default of their functions
            is 0.5, and their scripts for Meta-World take 0.9 for 10 tasks and 0.5 for 50.
        rescale: 0 for the paper's step; 1 divides it by ``1 + c²``; 2 divides it by ``1 + c``. Default 0, the paper's;
            the official experiments run with 1.

    Raises:
        MTLWeightError: if ``radius`` is negative or ``rescale`` is not 0, 1 or 2.

    >>> CAGrad(radius=0.5)(gramian=torch.tensor([[1.0, -0.5], [-0.5, 0.5]]))
    tensor([0.5000, 0.7500])

    *Differs from the paper* in nothing. Its official code rescales, multiplies the shared gradient by ``m`` to compare
    with summed losses, adds absolute constants (1e-8, in reinforcement learning 1e-4) so that small gradients are
    weighted otherwise than large ones, minimises by SLSQP or 20 steps of gradient descent, and leaves heads unweighted,
    as ``heads="unweighted"`` does.

    References:
        Liu, Liu, Jin, Stone, Liu, "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS 2021, arXiv
        2110.14048, Algorithm 1 and the dual problem that it solves.
    """

    radius: float = 0.4
    rescale: Literal[0, 1, 2] = 0

    needs = Needs.GRAMIAN

    def __post_init__(self) -> None:
        if not (self.radius >= 0 and math.isfinite(self.radius)):
            raise MTLWeightError(f"CAGrad: expected radius >= 0, found {self.radius}. The paper takes 0.4.")
        if self.rescale not in {0, 1, 2}:
            raise MTLWeightError(f"CAGrad: expected rescale 0, 1 or 2, found {self.rescale!r}. 0 is the paper's step.")

    @property
    def traits(self) -> Traits:
        """From a radius of 1 on the ball contains the origin, and the step harms no task."""
        wide = self.radius >= 1
        return Traits(
            nonnegative=True,
            total=None if self.radius > 0 else 1.0,
            nonconflicting=wide,
            stationary="strong" if wide else None,
            scale_degree=0,
        )

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """The mean, and the multipliers of the worst-off tasks."""
        solution = conflict_averse(view.gramian.cpu().numpy(), self.radius)
        view.note("cagrad_residual", solution.residual)
        divisor = (1.0, 1.0 + self.radius**2, 1.0 + self.radius)[self.rescale]
        return torch.from_numpy(solution.weights / divisor).to(view.device, view.dtype), state
