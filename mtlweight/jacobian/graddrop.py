"""Gradient sign dropout."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting


@dataclass(frozen=True)
class GradDrop(Weighting):
    """Where gradients disagree in sign, one sign is drawn by its share and the others' entries are dropped.

    For each of the ``n`` entries: purity ``P = (1 + Σ_t g_t / Σ_t |g_t|) / 2``, ``u ~ U(0, 1)``; positive entries stay
    if ``P > u``, negative ones if ``P <= u``. A task with leak ``λ`` keeps the share ``λ`` of what it would lose.

    *Reads* the Jacobian and ``view.generator``. *Writes* ``[m, n]``, in ``[0, 1]``. *State* none. *Cost* the gradients
    of all tasks, kept as ``[m, n]``, and weights of the same size.

    Args:
        leak: ``λ`` in ``[0, 1]``, the same for all tasks. Default 0, the paper's.

    Raises:
        MTLWeightError: if ``leak`` is outside ``[0, 1]``.

    >>> GradDrop()(jacobian=torch.tensor([[1.0, 2.0], [3.0, 1.0]]))
    tensor([[1., 1.],
            [1., 1.]])

    *Differs from the paper*: it drops entries of the parameters' gradients (as its appendix allows, and as LibMTL and
    TorchJD do); the paper's main text drops entries of the gradient at a layer's activations, summed over the batch.

    References:
        Chen et al., "Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout", NeurIPS 2020,
        arXiv 2010.06808, eq. 1 and Algorithm 1.
    """

    leak: float = 0.0

    needs = Needs.JACOBIAN
    writes = "entry"
    traits = Traits(nonnegative=True, scale_degree=0, random=True)

    def __post_init__(self) -> None:
        if not 0 <= self.leak <= 1:
            raise MTLWeightError(f"GradDrop: expected leak in [0, 1], found {self.leak}.")

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """1 for entries of the drawn sign, ``leak`` for the others."""
        jacobian = view.jacobian
        size = jacobian.abs().amax(dim=0)
        unit = jacobian / torch.where(size > 0, size, 1.0)  # entrywise scale: sums can neither overflow nor vanish
        purity = (1 + unit.sum(dim=0) / unit.abs().sum(dim=0).clamp(min=1.0)) / 2
        u = torch.rand(purity.shape, dtype=purity.dtype, device=purity.device, generator=view.generator)
        lost = (jacobian > 0) != (purity > u)  # u lies in [0, 1): a sign that all entries have always stays
        return torch.ones_like(jacobian).masked_fill(lost & (jacobian != 0), self.leak), state
