"""Dual balancing."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mtlweight._checks import nonnegative
from mtlweight._errors import MTLWeightError
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting
from mtlweight.jacobian._rows import combination, gather_rows, smallest_weights

_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class DBMTL(Weighting):
    """Balances losses by taking their logarithm, and gradients by making all as long as the longest one.

    With the gradient ``h_t = ∇ log ℓ_t = g_t / ℓ_t``, tracked from zero over the steps ``k`` of a task by ``y_t ← β_k
    y_t + (1 - β_k) h_t``, ``β_k = β / k^σ``, the step is ``d = max_u |y_u| · Σ_t y_t / |y_t|``.

    Weights multiply this batch's gradients ``J``, not ``y_t``. As for :class:`MoCo`, they are the smallest whose step
    is ``d``, ``W_{t,j} = d_j J_{t,j} / Σ_u J_{u,j}²``.

    *Reads* the losses, which must be >= 0, and the Jacobian. *Writes* ``[m, n]``. *State* per task: ``y_t`` of size
    ``[n]``, and the number of its steps. *Cost* the gradients of all tasks, kept as ``[m, n]``, and as much memory
    again for the state and for the weights.

    A loss of exactly zero counts as having no gradient. A task whose ``y_t`` is zero adds nothing.

    Args:
        tracking: ``β`` in ``[0, 1)``, the share of the past. Default 0.9, that of the authors' code.
        fading: ``σ``, how fast the past's share falls. Default 0, that of the authors' code: not at all.
        logarithm: whether to take the losses' logarithm. Default true, the paper's. Pass false where the losses given
            are logarithms already.

    Raises:
        MTLWeightError: if a hyperparameter is out of range, a loss is negative, or the number of shared parameters
            changes.

    >>> J = torch.tensor([[4.0, 0.0], [0.0, 1.0]])
    >>> (DBMTL(tracking=0.0)(losses=torch.tensor([2.0, 1.0]), jacobian=J) * J).sum(dim=0)
    tensor([2., 2.])

    *Differs from the paper* in what weights of the shared gradients cannot do. Heads get the gradient of the plain sum,
    not of the logarithms: for that, give ``loss.log()`` to the optimizer and pass ``logarithm=False``. Where an entry
    of all tasks' gradients is exactly zero, ``d`` is not applied (it stays in ``y``).

    References:
        Lin, Jiang, Ye, Zhang, Chen, Chen, Liu, Kwok, "Dual-Balancing for Multi-Task Learning", arXiv 2308.12029,
        Algorithm 1, and the authors' code, ``DB_MTL`` in LibMTL.
    """

    tracking: float = 0.9
    fading: float = 0.0
    logarithm: bool = True

    writes = "entry"

    def __post_init__(self) -> None:
        if not 0 <= self.tracking < 1:
            raise MTLWeightError(f"DBMTL: expected tracking in [0, 1), found {self.tracking}.")
        if not 0 <= self.fading < math.inf:
            raise MTLWeightError(f"DBMTL: expected a finite fading >= 0, found {self.fading}.")

    @property
    def needs(self) -> Needs:
        """The logarithm's gradient is relative to the loss."""
        return Needs.LOSSES | Needs.JACOBIAN if self.logarithm else Needs.JACOBIAN

    @property
    def traits(self) -> Traits:
        """Logarithms forget the losses' unit."""
        if self.logarithm:
            return Traits(scale_degree=-1, losses="nonnegative")
        return Traits(scale_degree=0)

    def init(self, view: View) -> State:
        """No history."""
        return {"gradient": {}, "count": {}}

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """One step of tracking, and the smallest weights that give the balanced direction."""
        jacobian = view.jacobian
        now = jacobian / self._losses(view).to(jacobian.dtype)[:, None] if self.logarithm else jacobian
        count = view.gather(state["count"]) + 1
        past = gather_rows("DBMTL", view, state["gradient"], jacobian)
        tracked = torch.lerp(now, past, (self.tracking / count**self.fading).to(now.dtype)[:, None])

        lengths = torch.linalg.vector_norm(tracked, dim=1, dtype=view.dtype)
        units = tracked / torch.where(lengths > 0, lengths, 1.0).to(tracked.dtype)[:, None]
        direction = lengths.amax().to(tracked.dtype) * combination(torch.ones_like(lengths), units)
        return smallest_weights(direction, jacobian), {
            "gradient": view.scatter(state["gradient"], tracked),
            "count": view.scatter(state["count"], count),
        }

    def _losses(self, view: View) -> Tensor:
        losses = nonnegative("DBMTL", view, what="losses >= 0, or logarithm=False")
        return torch.where(losses >= _TINY, losses, torch.inf)
