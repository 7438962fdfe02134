"""Independent component alignment."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting

_ROUNDING = 1e-13  # of a sum of the entries of a unit vector


@dataclass(frozen=True)
class AlignedMTL(Weighting):
    """Turns and stretches the gradients as little as makes them orthogonal and equally long, then takes their mean.

    With the eigenvalues ``λ_1 >= ... >= λ_R > 0`` and eigenvectors ``v_k`` of ``G = J Jᵀ``, of rank ``R``, all singular
    values of the gradients' matrix become ``σ = √λ_R``, so that its condition number is 1: ``w = σ Σ_k v_k v_kᵀ u /
    √λ_k`` with ``u = (1/m, ..., 1/m)``. The step is no longer than ``σ / √m``.

    *Reads* the Gramian. *Writes* ``[m]``, of any sign. *State* none. *Cost* the gradients of all tasks, and the
    eigenvectors of an ``m × m`` matrix.

    Eigenvalues up to ``m · 1.2e-7 · λ_1`` count as zero, as in the official code: float32 cannot tell them from
    rounding. Duplicates share; where opposed gradients leave the mean no component, the step is zero. If all gradients
    are zero, the weights are ``1 / m``.

    Args:
        scale: ``σ²``: ``"min"``, ``λ_R``; ``"median"``, the lower median of ``λ_1, ..., λ_R``; or ``"rmse"``, their
            mean. Default ``"min"``, the paper's.

    Raises:
        MTLWeightError: if ``scale`` is something else.

    >>> AlignedMTL()(gramian=torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
    tensor([0.2500, 0.5000])

    *Differs from the paper* in offering uniform importance ``u`` alone, which all its experiments take. Its official
    code sums (``u = 1``): ``AlignedMTL() >> Constant(m)``.

    References:
        Senushkin, Patakin, Kuznetsov, Konushin, "Independent Component Alignment for Multi-Task Learning", CVPR 2023,
        arXiv 2305.19000, Algorithm 1.
    """

    scale: Literal["min", "median", "rmse"] = "min"

    needs = Needs.GRAMIAN
    traits = Traits(scale_degree=0)

    def __post_init__(self) -> None:
        if self.scale not in {"min", "median", "rmse"}:
            raise MTLWeightError(
                f"AlignedMTL: expected scale 'min' (the paper's), 'median' or 'rmse', found {self.scale!r}."
            )

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """The mean of the aligned gradients, in terms of the given ones."""
        gramian = view.gramian
        m = len(gramian)
        size = gramian.diagonal().amax()
        values, vectors = torch.linalg.eigh(gramian / torch.where(size > 0, size, 1.0))
        kept = values > m * torch.finfo(torch.float32).eps * values[-1]
        count = kept.sum()  # the last ones, as eigenvalues rise
        if self.scale == "rmse":
            scale = values.clamp(min=0).where(kept, 0.0).sum() / count.clamp(min=1)
        else:
            scale = values[m - torch.where(count > 0, count if self.scale == "min" else count // 2 + 1, 1)]
        shares = vectors.sum(dim=0)
        shares = torch.where(shares.abs() > _ROUNDING * m, shares / m, 0.0)
        inverse = torch.where(kept, scale / torch.where(kept, values, 1.0), 0.0).sqrt()
        weights = vectors @ (inverse * shares)
        return torch.where(size > 0, weights, 1 / m), state
