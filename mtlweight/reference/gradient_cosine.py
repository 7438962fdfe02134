"""Auxiliary tasks by the cosine of their gradients with the main task's."""

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from mtlweight._view import Needs, State, View
from mtlweight._weighting import ReferenceUse, Traits, Weighting


@dataclass(frozen=True)
class GradientCosine(Weighting):
    """Weighs an auxiliary task by the cosine of its gradient with the main task's, and by 0 if they conflict.

    ``w_t = max(0, cos(g_t, g_ref))`` for each auxiliary task, or ``w_t = 1`` if ``cos(g_t, g_ref) >= 0`` and else 0;
    the main task has weight 1. ``g_t`` is the gradient of task ``t`` over the shared parameters, ``g_ref`` the gradient
    of the reference: the main task's loss, on this batch as in the paper, or on held-out data.

    *Reads* the alignment with the reference's unit gradient; with ``weighted`` the Gramian too, for the norms
    ``|g_t|``. *Writes* ``[m]``, in ``[0, 1]``. *State* none. *Cost* the reference's forward and backward and one more
    forward; with ``weighted`` another ``m - 1`` backwards.

    Args:
        main: name of the task that the reference belongs to; or several, with a reference for each, whose sum counts.
        weighted: whether the cosine itself is the weight, or its sign decides. Default true. The paper has both.

    >>> alignment = torch.tensor([2.0, 0.5, -1.0])  # with the unit vector along g_ref
    >>> gramian = torch.diag(torch.tensor([4.0, 1.0, 1.0]))
    >>> GradientCosine("0")(alignment=alignment, gramian=gramian)
    tensor([1.0000, 0.5000, 0.0000])
    >>> GradientCosine("0", weighted=False)(alignment=alignment)
    tensor([1., 1., 0.])

    *Differs from the paper* in nothing, if the reference is the main task's loss on the same batch. The cosine of a
    zero gradient is taken as 0.

    References:
        Du, Czarnecki, Jayakumar, Farajtabar, Pascanu, Lakshminarayanan, "Adapting Auxiliary Losses Using Gradient
        Similarity", arXiv 1812.02224, algorithms 1 (unweighted) and 2 (weighted), from memory.
    """

    main: str | tuple[str, ...]
    _: KW_ONLY
    weighted: bool = True

    traits = Traits(nonnegative=True, scale_degree=0)

    def __post_init__(self) -> None:
        ReferenceUse.of("GradientCosine", self.main)

    @property
    def needs(self) -> Needs:
        """The alignment; for cosines the gradients' norms too."""
        return Needs.ALIGNMENT | Needs.GRAMIAN if self.weighted else Needs.ALIGNMENT

    @property
    def reference(self) -> ReferenceUse:
        """The direction of the main tasks' gradient over the shared parameters."""
        return ReferenceUse.of("GradientCosine", self.main, unit=True)

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """Cosines, clamped at 0, or whether they are not negative."""
        alignment = view.alignment
        if self.weighted:
            norms = view.gramian.diagonal().sqrt()
            weights = torch.where(norms > 0, alignment / norms, 0.0).clamp(min=0)
        else:
            weights = (alignment >= 0).to(view.dtype)
        main = torch.tensor([task in self.reference.main for task in view.tasks], device=view.device)
        return torch.where(main, 1.0, weights), state
