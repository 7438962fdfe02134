"""Priority-constrained descent."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting
from mtlweight.solvers._cancelling import cancelling
from mtlweight.solvers._nonnegative import complementary
from mtlweight.solvers._rows import NONE, Array, promised, rows_of


@dataclass(frozen=True)
class PCD(Weighting):
    """Follows the main task's gradient as closely as a little progress of every other task allows.

    ``d = argmin |d - h_1|²`` subject to ``<h_j, d> >= τ |h_j|²`` for all other tasks ``j``, then scaled to the length
    of the main task's gradient ``g_1``. ``h_i = g_i / √v_i`` are the gradients relative to their usual length: ``v_i``
    is the bias-corrected moving average of ``|g_i|²`` with decay ``β``. So ``τ`` is a share, the same in all units, of
    the progress that a step along a task's own gradient would make. As weights, ``w_i ∝ μ_i / √v_i`` with ``μ_1 = 1``
    and the multipliers ``μ_j >= 0`` of the constraints. Solved exactly.

    *Reads* the Gramian. *Writes* ``[m]``, non-negative. *State* per task: ``v_i`` and the number of its steps; the name
    of the main task. *Cost* the gradients of all tasks; the solver is negligible.

    Where a convex combination of the other tasks' gradients vanishes, no step serves them all: for ``τ > 0`` the
    constraints are dropped and the step is ``g_1``. A task whose gradient opposes the main one alone turns the step
    around, unless ``τ = 0``, which harms no task. Where the main gradient is zero, or its task absent, the step is
    zero. A zero gradient of another task asks for nothing and has weight 0.

    Args:
        main: the name of the main task. Default ``None``: the one with the first place.
        progress: ``τ`` in ``[0, 1]``. Default 0.02, the official code's.
        decay: ``β`` in ``[0, 1)``. Default 0.999, the official code's.
        epsilon: added to ``v_i``. Default 0; the paper's 1e-8 makes gradients of about 1e-4 or less count less than
            larger ones.

    Raises:
        MTLWeightError: if an argument is out of range, or no task by the name ``main`` was ever there.

    >>> PCD()(gramian=torch.tensor([[4.0, -1.0], [-1.0, 1.0]]))
    tensor([1.1544, 1.2006])

    *Differs from the paper* in ``epsilon`` alone. The official code tries all sets of constraints, which takes
    exponentially long.

    References:
        "Not All Objectives Are Born Equal: Priority-Constrained Descent for Hierarchical Multi-Objective
        Optimization", TMLR 2026, arXiv 2606.29521, Definitions 4.1 and 4.5, Algorithm 1, as its official code
        (DaraVaram/priority-constrained-descent) cites and implements them.
    """

    main: str | None = None
    progress: float = 0.02
    decay: float = 0.999
    epsilon: float = 0.0

    needs = Needs.GRAMIAN
    layout = ("main",)

    def __post_init__(self) -> None:
        if not 0 <= self.progress <= 1:
            raise MTLWeightError(f"PCD: expected progress in [0, 1], found {self.progress}.")
        if not 0 <= self.decay < 1:
            raise MTLWeightError(f"PCD: expected decay in [0, 1), found {self.decay}.")
        if not 0 <= self.epsilon < math.inf:
            raise MTLWeightError(f"PCD: expected a finite epsilon >= 0, found {self.epsilon}.")

    @property
    def traits(self) -> Traits:
        """Progress alone makes a step that opposes the main gradient; an epsilon has a unit."""
        harmless = self.progress == 0
        return Traits(
            nonnegative=True,
            nonconflicting=harmless,
            stationary="strong" if harmless else None,
            scale_degree=0 if self.epsilon == 0 else None,
        )

    def init(self, view: View) -> State:
        """No history."""
        main = self.main or view.known[0]
        return {"main": {main: torch.ones((), dtype=view.dtype)}, "square": {}, "count": {}}

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """One step of the moving averages, and the program's weights."""
        gramian = view.gramian
        squares = gramian.diagonal()
        count = view.gather(state["count"]) + 1
        average = view.gather(state["square"])
        average = torch.lerp(average, squares, (1 - self.decay) / (1 - self.decay**count))
        updated = {
            **state,
            "square": view.scatter(state["square"], average),
            "count": view.scatter(state["count"], count),
        }
        main = [t for t, task in enumerate(view.tasks) if task in state["main"]]
        if not main:
            if self.main is not None and self.main not in state["count"]:
                raise MTLWeightError(
                    f"PCD: expected the main task {self.main!r} among the tasks, found {', '.join(view.tasks)}. Pass "
                    "the name of one of them."
                )
            return torch.zeros_like(squares), updated
        usual = (average + self.epsilon).sqrt()
        both = torch.cat([gramian, usual[None]]).cpu().numpy()  # at once: each transfer waits for the device
        weights, residual = _prioritised(both[:-1], both[-1], main[0], self.progress)
        view.note("pcd_residual", residual)
        return torch.from_numpy(weights).to(view.device, view.dtype), updated


def _prioritised(gramian: Array, usual: Array, main: int, progress: float) -> tuple[Array, float]:
    """The weights and the residual of the program, for gradients to be divided by their usual lengths."""
    rows = rows_of(gramian, "PCD")
    norms, C = rows.norms, rows.cosines
    y = np.zeros(len(norms))
    if norms[main] == 0.0:
        return y, 0.0
    lengths = np.divide(norms, usual, out=np.zeros_like(norms), where=norms > 0.0)
    y[main] = lengths[main]
    others = np.flatnonzero((norms > 0.0) & (np.arange(len(norms)) != main))
    wanted = progress * lengths[others] - lengths[main] * C[others, main]  # in units of |h_j|
    residual = 0.0
    if (wanted > 0.0).any():
        inner = C[np.ix_(others, others)]
        if progress == 0.0 or not cancelling(inner).any():
            size = np.array([lengths[main] + progress * lengths[others].max()])
            multipliers, residuals = complementary(inner, wanted[None], size)
            y[others], residual = multipliers[0], promised("PCD", float(residuals[0]), len(norms))
    square = y @ C @ y
    if square <= (NONE * y.sum()) ** 2:
        return np.zeros_like(y), residual
    return y * rows.inverse * (norms[main] / math.sqrt(square)), residual
