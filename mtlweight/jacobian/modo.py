"""Multi-objective gradient with double sampling."""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting
from mtlweight.jacobian._parts import gramian_of_parts, parts
from mtlweight.jacobian._rows import gather_simplex
from mtlweight.solvers._simplex import project_simplex


@dataclass(frozen=True)
class MoDo(Weighting):
    """Descends slowly to the min-norm combination of gradients, along slopes that the noise of a batch does not bias.

    The slope ``J Jᵀ λ`` of ``½ |Jᵀ λ|²`` is biased if both Jacobians come from the same samples: their noise is
    squared. With ``J_1``, ``J_2``, ``J_3`` from three independent batches, ``λ ← Π(λ - γ (J_1 J_2ᵀ λ + ρ λ))`` with the
    projection ``Π`` on the simplex, and the step is ``J_3ᵀ λ``, whose weights do not depend on its noise either.

    One batch is taken as three: its samples are dealt at random into three parts, the same for all tasks. Give batches
    three times as large as for another method. The parts are nearly independent where samples are drawn without
    replacement from a small data set, or seen together by BatchNorm.

    *Reads* the losses per sample and the Jacobians of two parts. *Writes* ``[m, b]``: ``λ_t`` divided by the size of
    the third part for its samples, 0 for all others. *State* per task: ``λ_t``. *Cost* two gradients a task, kept as
    ``[2 m, n]``, and one ordinary backward.

    The present tasks' ``λ`` are rescaled to the simplex; a task joins with ``1 / m``. Heads are trained on the third
    part alone; on all samples, unweighted, with ``heads="unweighted"``.

    Args:
        step_size: ``γ``. Default 0.1, that of the authors' code; LibMTL's is 0.001. It is in units of an inverse
            squared gradient, so it wants tuning. At 0 the weights stay equal.
        ridge: ``ρ``. Default 0.1, that of the authors' code for Office-31, and LibMTL's; for MNIST it is 0.
        form: ``"paper"``, as above; or ``"official"``, as in the authors' code: two parts, and the step is ``(J_1 +
            J_2)ᵀ λ``, in which weights and gradients are not independent, and whose weights add up to 2. Default
            ``"paper"``.

    Raises:
        MTLWeightError: if a hyperparameter is out of range, losses are scalars, or there are fewer samples than parts.

    >>> J = torch.tensor([[4.0, 0.0], [0.0, 1.0]])[:, None].expand(2, 3, 2)  # three samples, for once without noise
    >>> MoDo(step_size=0.01, ridge=0.0)(losses=torch.ones(2, 3), jacobian=J).sum(dim=1)
    tensor([0.4625, 0.5375])

    *Differs from the paper* in that the three batches are parts of one. This follows the authors' code and LibMTL's,
    which samples three times; the paper's equations are from memory.

    References:
        Chen, Fernando, Ying, Chen, "Three-Way Trade-Off in Multi-Objective Learning: Optimization, Generalization and
        Conflict-Avoidance", NeurIPS 2023, arXiv 2305.20057, Algorithm 1 (MoDo). Code: heshandevaka/Trade-Off-MOL, and
        ``MoDo`` in LibMTL.
    """

    step_size: float = 0.1
    ridge: float = 0.1
    form: Literal["paper", "official"] = "paper"

    needs = Needs.LOSSES | Needs.JACOBIAN | Needs.SAMPLES
    writes = "sample"

    def __post_init__(self) -> None:
        if not 0 <= self.step_size < math.inf:
            raise MTLWeightError(f"MoDo: expected a finite step_size >= 0, found {self.step_size}.")
        if not 0 <= self.ridge < math.inf:
            raise MTLWeightError(f"MoDo: expected a finite ridge >= 0, found {self.ridge}.")
        if self.form not in ("paper", "official"):
            raise MTLWeightError(f"MoDo: expected form to be 'paper' or 'official', found {self.form!r}.")

    @property
    def traits(self) -> Traits:
        """A convex combination, of one part or of two."""
        count = 3 if self.form == "paper" else 2
        return Traits(nonnegative=True, total=float(count == 2) + 1, random=True, samples=count)

    def init(self, view: View) -> State:
        """No weights."""
        return {"weight": {}}

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """One step of projected descent, and the weights of the samples that it is applied to."""
        means = parts("MoDo", view, self.traits.samples)
        weights = gather_simplex(view, state["weight"])
        slope = gramian_of_parts(view, means[:2])[0, 1] @ weights + self.ridge * weights
        weights = project_simplex(weights - self.step_size * slope)
        view.note("modo_weights", weights)
        applied = means[2] if self.form == "paper" else means.sum(dim=0)
        return weights[:, None] * applied, {"weight": view.scatter(state["weight"], weights)}
