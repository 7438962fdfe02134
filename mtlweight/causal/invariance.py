"""Invariance of each task's risk across environments, at the graph or at the risk itself."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight.causal._penalty import Penalty, Seen


@dataclass(frozen=True)
class Invariance(Penalty):
    """Penalises a graph that a task would change from one environment to another.

    With ``R_t^e`` the mean loss of task ``t`` over the samples of environment ``e`` that have a label for it, and ``A``
    the graph (a column per module):

        "variance":  Σ_t Σ_k Var_e(∂R_t^e / ∂A[t, k])
        "norm":      mean_e Σ_t ||∇_{A[t, :]} R_t^e||²

    where ``Var_e`` is the mean squared distance from the mean, and means are over the environments that have a labelled
    sample of the task in the batch, with equal weights. A module whose correlation with a task differs between
    environments pulls ``A[t, k]`` up in one and down in another: that is what is penalised. ``"variance"`` asks for
    agreement; ``"norm"`` (IRM's, at the graph) asks that the graph be optimal in each environment, and also acts if
    there is only one.

    *Reads* losses per sample, environments and the modules' outputs. *Cost* one backward through the heads, whatever
    the number of environments and tasks, and its second-order backward; linear in ``b`` and in K.

    *Zero* exactly if all environments give the graph the same gradient (norm: a zero gradient in each). *Invariant* to
    permuting modules, tasks, samples and environments, and to rescaling a head's input where the head undoes it.
    *Neutral*: with one environment in a batch the variance is 0; ``optimizer.report.notes["environments"]`` is
    their number. An environment with one sample has the same weight as any other, and is noisy.

    Args:
        kind: ``"variance"``, the default and ours, or ``"norm"``.

    Raises:
        MTLWeightError: for another kind; in ``combine``, without environments, or for losses that are scalars.

    >>> from mtlweight.causal import Invariance
    >>> 2.0 * Invariance("norm")
    2 * Invariance(kind='norm')

    *Reconstruction* of MT-CRL's graph-IRM (its text was not at hand): Σ_e became a mean, so that a coefficient does not
    depend on the number of environments.

    References:
        Hu et al., "Improving Multi-Task Generalization via Regularizing Spurious Correlation", NeurIPS 2022, arXiv
        2205.09797. Arjovsky et al., "Invariant Risk Minimization", arXiv 1907.02893. Krueger et al.,
        "Out-of-Distribution Generalization via Risk Extrapolation (REx)", ICML 2021, arXiv 2003.00688, for the
        variance.
    """

    kind: Literal["variance", "norm"] = "variance"

    def __post_init__(self) -> None:
        if self.kind not in ("variance", "norm"):
            raise MTLWeightError(f"Invariance: expected kind 'variance' or 'norm', found {self.kind!r}. Choose one.")

    def parts(self, seen: Seen) -> dict[str, Tensor]:
        """The penalty, under ``"invariance (kind)"``."""
        gradients, share = seen.gradients()
        seen.note("environments", float(len(gradients)))
        if self.kind == "variance":
            gradients = gradients - (share * gradients).sum(dim=0)
        return {f"invariance ({self.kind})": (share * gradients.square()).sum()}


@dataclass(frozen=True)
class RiskVariance(Penalty):
    """V-REx: penalises the variance of each task's risk over environments. A baseline that needs no graph.

    ``Σ_t Var_e(R_t^e)``, with ``R_t^e`` and ``Var_e`` as in :class:`Invariance`.

    *Reads* losses per sample and environments. *Cost* nothing to speak of. *Zero* exactly if the risks agree.

    >>> from mtlweight.causal import RiskVariance
    >>> 10 * RiskVariance()
    10 * RiskVariance()

    References:
        Krueger et al., "Out-of-Distribution Generalization via Risk Extrapolation (REx)", ICML 2021, arXiv 2003.00688,
        equation (8), with the mean risk left to the losses themselves.
    """

    def parts(self, seen: Seen) -> dict[str, Tensor]:
        """The penalty, under ``"risk variance"``."""
        risks, share = seen.risks()
        return {"risk variance": (share * (risks - (share * risks).sum(dim=0)).square()).sum()}
