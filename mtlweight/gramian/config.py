"""Conflict-free inverse gradients."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting
from mtlweight.solvers import conflict_free


@dataclass(frozen=True)
class ConFIG(Weighting):
    """The direction at the same acute angle to all gradients, as long as the sum of their projections on it.

    ``d = (Σ_i <g_i, e>) e`` with ``e = x / |x|``, ``x = U⁺ 1``, where the rows of ``U`` are the gradients scaled to
    length one, ``U⁺`` is the pseudo-inverse and ``1`` the vector of ones. With the cosines ``C = U Uᵀ``, ``w_i ∝ (C⁺
    1)_i / |g_i|``. The step shrinks as gradients come to oppose each other. It was made for physics-informed networks,
    whose losses share all parameters.

    *Reads* the Gramian. *Writes* ``[m]``, of any sign. *State* none. *Cost* the gradients of all tasks; the solver is
    negligible.

    Independent gradients never conflict with the step. Where they depend on each other, and always if there are more
    tasks than parameters, the angles are equal only in the sense of least squares, and the step can conflict. Where not
    even that is possible, as between opposed gradients, all weights are zero. A zero gradient has weight 0.

    >>> ConFIG()(gramian=torch.tensor([[4.0, 0.0], [0.0, 0.25]]))
    tensor([0.6250, 2.5000])

    *Differs from the paper* in nothing. Rows count as dependent where a combination of them is shorter than about 1e-6
    times its coefficients, as far as the Gramian can tell; the official code takes float32's rounding. Its other models
    of weights and length, and the variant that renews one gradient a step (M-ConFIG), are not offered.

    References:
        Liu, Chu, Thuerey, "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks", ICLR 2025,
        arXiv 2408.11104, eq. 2 and 3.
    """

    needs = Needs.GRAMIAN
    traits = Traits(scale_degree=0)

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """The coefficients of the direction, times its length."""
        solution = conflict_free(view.gramian.cpu().numpy())
        view.note("config_residual", solution.residual)
        return torch.from_numpy(solution.weights).to(view.device, view.dtype), state
