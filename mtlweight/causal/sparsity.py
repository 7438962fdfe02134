"""Few edges in the graph."""

from dataclasses import dataclass

from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight.causal._penalty import Penalty, Seen


@dataclass(frozen=True)
class Sparsity(Penalty):
    """Penalises edges, so that each task reads few modules: ``||A||_1 = Σ_t Σ_k A[t, k]``.

    *Reads* the graph. *Zero* only in the limit of a graph without edges. *Invariant* to permuting tasks and modules.
    Alone it may leave all tasks on one module: use :class:`Balance` beside it.

    Raises:
        MTLWeightError: in ``combine``, for a selector with ``gate="softmax"``, whose rows always sum to 1.

    >>> from mtlweight.causal import Sparsity
    >>> 0.01 * Sparsity()
    0.01 * Sparsity()

    *Reconstruction* of MT-CRL's graph regularisation.
    """

    def parts(self, seen: Seen) -> dict[str, Tensor]:
        """The penalty, under ``"sparsity"``."""
        if seen.selector.gate == "softmax":
            raise MTLWeightError(
                "Sparsity is constant on a graph whose rows sum to 1: expected gate='sigmoid', found gate='softmax'. "
                "Leave it out, or build ModuleSelector(modules, tasks, gate='sigmoid')."
            )
        return {"sparsity": seen.gates.sum()}
