"""Gradient vaccine."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mtlweight._errors import MTLWeightError
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting
from mtlweight.gramian._orders import random_orders
from mtlweight.solvers._rows import NONE

_STEEPEST = 1 - 1e-12  # a cosine of 1 would need infinitely much of the other gradient


@dataclass(frozen=True)
class GradVac(Weighting):
    """Each gradient is turned towards another one until their cosine is what it has been on average.

    For each task ``i``, ``g = g_i``; for all other tasks ``j`` in a random order, with the cosine ``φ`` of ``g`` and
    ``g_j`` and the target ``φ̂_ij``: if ``φ < φ̂_ij`` then ``g ← g + |g| (φ̂_ij √(1-φ²) - φ √(1-φ̂_ij²)) / (|g_j|
    √(1-φ̂_ij²)) g_j``, which makes the cosine ``φ̂_ij``; and ``φ̂_ij ← (1-β) φ̂_ij + β φ``. The step is the sum of all
    ``g``. Targets start at 0, where it is :class:`PCGrad`; later, gradients that merely agree less than usual are
    turned too.

    *Reads* the Gramian and ``view.generator``. *Writes* ``[m]``, at least 1 each. *State* per task: its targets, one
    for each task known, and its place among these. *Cost* the gradients of all tasks, and ``m`` vectorised operations.

    A zero gradient has no cosines: nothing is added for it, or to it, and its targets rest; so do those of absent
    tasks. Targets stay below ``1 - 1e-12``, as a cosine of 1 could not be reached.

    Args:
        rate: ``β`` in ``(0, 1]``. Default 0.01, the paper's; LibMTL and TorchJD take 0.5.

    Raises:
        MTLWeightError: if ``rate`` is out of range.

    >>> GradVac()(gramian=torch.tensor([[1.0, -0.5], [-0.5, 1.0]]))
    tensor([1.5000, 1.5000])

    *Differs from the paper* in that cosines are over all shared parameters together; its best results take one a layer.
    Targets move even if the gradient was not turned, as in its Algorithm 1; LibMTL moves them only if it was.

    References:
        Wang, Tsvetkov, Firat, Cao, "Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively
        Multilingual Models", ICLR 2021, arXiv 2010.05874, Algorithm 1.
    """

    rate: float = 0.01

    needs = Needs.GRAMIAN
    traits = Traits(nonnegative=True, scale_degree=0, random=True)

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise MTLWeightError(f"GradVac: expected rate in (0, 1], found {self.rate}. The paper takes 0.01.")

    def init(self, view: View) -> State:
        """No task is known."""
        return {"place": {}, "target": {}}

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """Coefficients of all turned gradients, summed."""
        gramian = view.gramian
        m = len(gramian)
        norms = gramian.diagonal().sqrt()
        alive = norms > 0
        inverse = torch.where(alive, 1 / torch.where(alive, norms, 1.0), 0.0)
        cosines = inverse[:, None] * gramian * inverse

        places, rows = self._table(view, state)
        targets = rows.gather(1, places.expand(m, m))

        # Row i: the turned g_i in terms of the gradients scaled to length one, in units of |g_i|.
        turned = eye = torch.eye(m, dtype=gramian.dtype, device=gramian.device)
        for others in random_orders(view).unbind(dim=1):  # one other task for each row at a time
            column = others[:, None]
            square = ((turned @ cosines) * turned).sum(dim=1)
            defined = (square > (NONE * turned.abs().sum(dim=1)).square()) & alive & alive[others]
            length = torch.where(defined, square, 1.0).sqrt()
            cosine = ((turned * cosines[others]).sum(dim=1) / length).clamp(-1.0, 1.0)
            target = targets.gather(1, column)[:, 0]
            sine, target_sine = (1 - cosine.square()).sqrt(), (1 - target.square()).sqrt()
            share = length * (target * sine / target_sine - cosine)
            turned = turned.scatter_add(1, column, torch.where(defined & (cosine < target), share, 0.0)[:, None])
            moved = torch.where(defined, torch.lerp(target, cosine, self.rate), target)
            targets = targets.scatter(1, column, moved.clamp(-_STEEPEST, _STEEPEST)[:, None])

        weights = (norms @ (turned - eye)) * inverse + 1
        return weights, {
            "place": view.scatter(state["place"], places.to(view.dtype)),
            "target": view.scatter(state["target"], rows.scatter(1, places.expand(m, m), targets)),
        }

    def _table(self, view: View, state: State) -> tuple[Tensor, Tensor]:
        """The present tasks' places among all that are known, and their targets for these, ``[m, known]``."""
        places = view.gather(state["place"], -1.0)
        new = places < 0
        before = len(state["place"])
        places = torch.where(new, before - 1 + new.cumsum(dim=0), places).long()
        known = len({*state["place"], *view.tasks})
        rows: Any = state["target"]
        table = {task: pad(rows[task], (0, known - len(rows[task]))) for task in view.tasks if task in rows}
        return places, view.gather(table, torch.zeros(known, dtype=view.dtype))
