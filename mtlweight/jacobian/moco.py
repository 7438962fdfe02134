"""Multi-objective gradient correction."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight._statistics import gramian_of
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting
from mtlweight.jacobian._rows import combination, gather_rows, gather_simplex, smallest_weights
from mtlweight.solvers._simplex import project_simplex


@dataclass(frozen=True)
class MoCo(Weighting):
    """Tracks each task's gradient over the steps, and follows the tracked gradients' min-norm combination.

    A min-norm point of noisy gradients is biased. So at step ``k`` of a task ``y_t ← y_t - β_k (y_t - g_t)``, and with
    the rows ``y_t`` of ``Y`` the combination descends slowly, ``λ ← Π(λ - γ_k (Y Yᵀ + ρ I) λ)`` with the projection
    ``Π`` on the simplex; ``β_k = β / √k``, ``γ_k = γ / √k``. The step is ``d = Yᵀ λ``.

    Weights multiply this batch's gradients ``J``, not ``Y``. Of all weights whose step is ``d`` these are the smallest,
    entry by entry: ``W_{t,j} = d_j J_{t,j} / Σ_u J_{u,j}²``. They reproduce ``d`` wherever one task's entry is not
    exactly zero.

    *Reads* the Jacobian; for ``form="official"`` the losses too. *Writes* ``[m, n]``. *State* per task: ``y_t`` of size
    ``[n]``, ``λ_t``, and the number of its steps; the number of steps. *Cost* the gradients of all tasks, kept as ``[m,
    n]``, as much memory again for the state and for the weights, and one Gramian.

    The present tasks' ``λ`` are rescaled to the simplex; a task joins with ``1 / m``.

    Args:
        tracking: ``β`` in ``(0, 1]``. Default 0.5, LibMTL's.
        step_size: ``γ``. Default 0.1, LibMTL's.
        ridge: ``ρ``. Default 0, LibMTL's.
        form: ``"paper"``, as above; or ``"official"``, as in LibMTL after the authors' code: each gradient is first
            rescaled to the length of its loss, ``g_t ← ℓ_t g_t / |g_t|``, and ``Π`` is a softmax. Default ``"paper"``.

    Raises:
        MTLWeightError: if a hyperparameter is out of range, or the number of shared parameters changes.

    >>> weights = MoCo()(jacobian=torch.tensor([[4.0, 2.0], [0.0, 2.0]]))
    >>> (weights * torch.tensor([[4.0, 2.0], [0.0, 2.0]])).sum(dim=0)
    tensor([0.8000, 1.0000])

    *Differs from the paper* where an entry of all tasks' gradients is exactly zero, as for rows of an embedding that
    the batch does not use: there ``d`` is not applied (it stays in ``y``), while the paper would move that parameter by
    what it remembers. Heads get the gradient of the plain sum; the step sizes' schedule is the code's.

    References:
        Fernando, Shen, Liu, Chaudhury, Murugesan, Chen, "Mitigating Gradient Bias in Multi-objective Learning: A
        Provably Convergent Approach", ICLR 2023, arXiv 2210.12624, Algorithm 1.
    """

    tracking: float = 0.5
    step_size: float = 0.1
    ridge: float = 0.0
    form: Literal["paper", "official"] = "paper"

    writes = "entry"
    traits = Traits()

    def __post_init__(self) -> None:
        if not 0 < self.tracking <= 1:
            raise MTLWeightError(f"MoCo: expected tracking in (0, 1], found {self.tracking}.")
        if not 0 < self.step_size < math.inf:
            raise MTLWeightError(f"MoCo: expected a finite step_size > 0, found {self.step_size}.")
        if not 0 <= self.ridge < math.inf:
            raise MTLWeightError(f"MoCo: expected a finite ridge >= 0, found {self.ridge}.")
        if self.form not in ("paper", "official"):
            raise MTLWeightError(f"MoCo: expected form to be 'paper' or 'official', found {self.form!r}.")

    @property
    def needs(self) -> Needs:
        """The official form rescales gradients by losses."""
        return Needs.JACOBIAN | Needs.LOSSES if self.form == "official" else Needs.JACOBIAN

    def init(self, view: View) -> State:
        """No history."""
        return {
            "gradient": {},
            "count": {},
            "weight": {},
            "step": torch.zeros((), dtype=view.dtype, device=view.device),
        }

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """One step of tracking and of descent, and the smallest weights that give its direction."""
        jacobian = view.jacobian
        now = jacobian if self.form == "paper" else self._rescaled(view, jacobian)
        count = view.gather(state["count"]) + 1
        tracked = gather_rows("MoCo", view, state["gradient"], jacobian)
        tracked = torch.lerp(tracked, now, (self.tracking / count.sqrt()).to(now.dtype)[:, None])

        step = torch.as_tensor(state["step"]).to(view.device) + 1
        weights = gather_simplex(view, state["weight"])
        slope = gramian_of(tracked) @ weights + self.ridge * weights
        descended = weights - self.step_size / step.sqrt() * slope
        weights = project_simplex(descended) if self.form == "paper" else descended.softmax(dim=0)
        view.note("moco_weights", weights)

        direction = combination(weights, tracked)
        return smallest_weights(direction, jacobian), {
            "gradient": view.scatter(state["gradient"], tracked),
            "count": view.scatter(state["count"], count),
            "weight": view.scatter(state["weight"], weights),
            "step": step,
        }

    def _rescaled(self, view: View, jacobian: Tensor) -> Tensor:
        lengths = torch.linalg.vector_norm(jacobian, dim=1, dtype=view.dtype)
        factors = torch.where(lengths > 0, view.losses / torch.where(lengths > 0, lengths, 1.0), 0.0)
        return (factors[:, None] * jacobian).to(jacobian.dtype)
