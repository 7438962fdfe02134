"""Stochastic direction-oriented multi-objective gradient descent."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mtlweight._checks import expect_count
from mtlweight._errors import MTLWeightError
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Level, Traits, Weighting
from mtlweight.jacobian._parts import gramian_of_parts, parts
from mtlweight.jacobian._rows import gather_simplex
from mtlweight.solvers import min_norm
from mtlweight.solvers._simplex import project_simplex


@dataclass(frozen=True)
class SDMGrad(Weighting):
    """The min-norm combination of gradients, held near their mean, from estimates that noise does not bias.

    With the mean gradient ``g_0`` and ``g_w = Jᵀ w`` the weights minimise ``½ |g_w + λ g_0|²`` over the simplex, and
    the step is ``(g_w + λ g_0) / (1 + λ)``: ``λ = 0`` is :class:`MGDA`, a large ``λ`` the mean. From the last weights,
    ``S`` steps ``w ← Π(w - β (J_1 J_2ᵀ w + λ J_1 J_2ᵀ 1/m) / s²)`` with heavy-ball momentum approach the minimum; ``Π``
    projects on the simplex. ``J_1`` and ``J_2`` come from independent batches, so that the slope has no bias, and the
    step is taken with a third, ``J_3``. The unit ``s² = mean_t |g_t| · mean_t |g'_t|``, with rows ``g_t`` of ``J_1``
    and ``g'_t`` of ``J_2``, makes ``β`` a plain number.

    The three batches are parts of one, drawn as for :class:`MoDo`: give batches three times as large as for another
    method.

    *Reads* the losses per sample and the Jacobians of two parts; with ``independent=False`` the Gramian. *Writes* ``[m,
    b]``: ``(w_t + λ / m) / (1 + λ)`` divided by the size of the third part for its samples, 0 for all others; with
    ``independent=False`` that number, ``[m]``. *State* per task: ``w_t``; none with ``independent=False``. *Cost* two
    gradients a task, kept as ``[2 m, n]``, and one ordinary backward; with ``independent=False`` the gradients of all
    tasks.

    The present tasks' ``w`` are rescaled to the simplex; a task joins with ``1 / m``. Heads are trained on the third
    part alone; on all samples, unweighted, with ``heads="unweighted"``.

    Args:
        pull: ``λ``. Default 0.3, that of the authors' scripts for NYUv2 and Cityscapes; for Meta-World they take 0.6.
        iterations: ``S``. Default 20, that of the authors' code.
        step_size: ``β``. Default 10, that of the authors' code; LibMTL's is 5.
        momentum: in ``[0, 1)``. Default 0.5, that of the authors' code.
        independent: whether the three batches are independent, as in the paper. Default true. False takes the whole
            batch for all three, and the exact minimum. The authors' code takes one batch too: for reinforcement
            learning on purpose, for NYUv2 and Cityscapes because its three gradients are one tensor, overwritten twice.

    Raises:
        MTLWeightError: if a hyperparameter is out of range; if ``independent``, for scalar losses or fewer than three
            samples.

    >>> SDMGrad(pull=1.0, independent=False)(gramian=torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    tensor([0.7500, 0.2500])
    >>> J = torch.tensor([[1.0, 0.0], [0.0, 3.0]])[:, None].expand(2, 3, 2)  # three samples, for once without noise
    >>> SDMGrad(pull=1.0, step_size=0.5)(losses=torch.ones(2, 3), jacobian=J).sum(dim=1)
    tensor([0.7500, 0.2500])

    *Differs from the paper* in that the batches are parts of one, and the same two serve all ``S`` steps, as in the
    code. The code's unit is ``s = mean_t √<g_t, g'_t>``, the same for one batch, but without a value where two noisy
    gradients oppose each other; it adds an absolute 1e-4, multiplies the step by ``m`` and clips its norm at 1. At its
    ``β`` the descent need not settle: from eight equally long gradients in equal conflict it makes two that count, and
    rounding picks them. Take 0.5 for one that does. The paper's equations are from memory; its variant that samples
    objectives is left out.

    References:
        Xiao, Ban, Ji, "Direction-oriented Multi-objective Learning: Simple and Provable Stochastic Algorithms", NeurIPS
        2023, arXiv 2305.18409, Algorithm 1. Code: OptMN-Lab/sdmgrad, and ``SDMGrad`` in LibMTL.
    """

    pull: float = 0.3
    iterations: int = 20
    step_size: float = 10.0
    momentum: float = 0.5
    independent: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.pull < math.inf:
            raise MTLWeightError(f"SDMGrad: expected a finite pull >= 0, found {self.pull}. 0 is MGDA.")
        expect_count("SDMGrad", "iterations", self.iterations)
        if not 0 < self.step_size < math.inf:
            raise MTLWeightError(f"SDMGrad: expected a finite step_size > 0, found {self.step_size}.")
        if not 0 <= self.momentum < 1:
            raise MTLWeightError(f"SDMGrad: expected momentum in [0, 1), found {self.momentum}. 0 is none.")

    @property
    def needs(self) -> Needs:
        """Gradients of parts of the batch, or inner products of the whole batch's."""
        return Needs.LOSSES | Needs.JACOBIAN | Needs.SAMPLES if self.independent else Needs.GRAMIAN

    @property
    def writes(self) -> Level:
        """Per sample if the step is taken with some of them."""
        return "sample" if self.independent else "task"

    @property
    def traits(self) -> Traits:
        """A convex combination, found in units of the gradients."""
        count = 3 if self.independent else 1
        return Traits(nonnegative=True, total=1.0, scale_degree=0, random=self.independent, samples=count)

    def init(self, view: View) -> State:
        """No weights."""
        return {"weight": {}}

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """The descent's or the exact solution, mixed with equal weights."""
        if not self.independent:
            return self._mixed(self._solve(view)), state
        means = parts("SDMGrad", view, 3)
        weights = self._descend(gramian_of_parts(view, means[:2]).cpu(), gather_simplex(view, state["weight"]).cpu())
        weights = weights.to(view.device)
        view.note("sdmgrad_weights", weights)
        return self._mixed(weights)[:, None] * means[2], {"weight": view.scatter(state["weight"], weights)}

    def _mixed(self, weights: Tensor) -> Tensor:
        return (weights + self.pull / len(weights)) / (1 + self.pull)

    def _descend(self, products: Tensor, weights: Tensor) -> Tensor:
        """``S`` steps from the given weights, along slopes from two parts."""
        squares = products.diagonal(dim1=0, dim2=1).diagonal()  # [2, m]
        unit = squares.sqrt().mean(dim=1).prod()
        cross = products[0, 1] / torch.where(unit > 0, unit, 1.0)
        velocity = torch.zeros_like(weights)
        for _ in range(self.iterations):
            velocity = self.momentum * velocity + cross @ (weights + self.pull / len(weights))
            weights = project_simplex(weights - self.step_size * velocity)
        return weights

    def _solve(self, view: View) -> Tensor:
        """The min-norm point of the gradients moved by ``λ g_0``: its distance to zero is ``|g_w + λ g_0|``."""
        m = len(view.tasks)
        moved = torch.eye(m, dtype=view.dtype, device=view.device) + self.pull / m
        solution = min_norm((moved @ view.gramian @ moved).cpu().numpy())
        view.note("sdmgrad_residual", solution.residual)
        return torch.from_numpy(solution.weights).to(view.device, view.dtype)
