"""Learning to reweight examples: sample weights within each task."""

from dataclasses import KW_ONLY, dataclass
from typing import Literal

from torch import Tensor

from mtlweight._checks import expect
from mtlweight._view import Needs, State, View
from mtlweight._weighting import ReferenceUse, Traits, Weighting
from mtlweight.sample._shares import shares_of_help


@dataclass(frozen=True)
class L2RW(Weighting):
    """Within each task, weighs a sample by how much its gradient helps a held-out objective.

    ``w[t, i] = max(0, a[t, i]) / Σ_j max(0, a[t, j])`` with the alignment ``a[t, i] = <∇ℓ[t, i], ∇L_ref>``. The paper
    derives it for one task, as the derivative of the held-out loss after a step with weights ``ε``, by ``ε`` at
    ``ε = 0``, rectified and normalised over the batch. At ``ε = 0`` the parameters do not move, so all gradients are
    taken at the same point. With several tasks the samples of each compete with each other; in :class:`SLGrad` tasks
    compete too.

    *Reads* the alignment per sample. *Writes* ``[m, b]``, non-negative; each task's sum is ``total``, or 0 if none of
    its samples helps. *State* none. *Cost* the reference's forward and backward, and about one more forward if losses
    come as a callable (two more backwards if they come as tensors).

    Args:
        main: name of the task that the reference belongs to, for ``scope="main"``; or several, with a reference for
            each. Default: none.
        scope: parameters over which gradients are compared. ``"all"``, the default and the paper's: every parameter of
            the wrapped optimizer; ``"shared"``; ``"main"``, these and the main tasks' heads.
        learn_reference: whether the reference's own gradient joins the step with weight 1. Default false, as published.
        total: each task's sum. Default 1, the paper's.

    Raises:
        MTLWeightError: if ``scope`` is unknown, ``total`` is not positive and finite; in ``combine``, if the losses are
            scalars or no reference is given.

    >>> L2RW()(alignment=torch.tensor([[3.0, -1.0, 1.0]]))
    tensor([[0.7500, 0.0000, 0.2500]])

    *Differs from the paper* in nothing but the form for several tasks, which is ours. The official code gets the
    alignments by differentiating through the step; they are the same numbers.

    References:
        Ren, Zeng, Yang, Urtasun, "Learning to Reweight Examples for Robust Deep Learning", ICML 2018, arXiv 1803.09050,
        algorithm 1, from memory.
    """

    main: str | tuple[str, ...] = ()
    _: KW_ONLY
    scope: Literal["shared", "main", "all"] = "all"
    learn_reference: bool = False
    total: float = 1.0

    needs = Needs.ALIGNMENT | Needs.SAMPLES
    writes = "sample"
    traits = Traits(nonnegative=True, scale_degree=0)

    def __post_init__(self) -> None:
        ReferenceUse.of("L2RW", self.main, scope=self.scope)
        expect(self, "> 0", "total")

    @property
    def reference(self) -> ReferenceUse:
        """The held-out loss, over the scope."""
        return ReferenceUse.of("L2RW", self.main, scope=self.scope, learn=float(self.learn_reference))

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """The positive alignments, divided by their sum in each task."""
        return self.total * shares_of_help(view.sample_alignment, "task"), state
