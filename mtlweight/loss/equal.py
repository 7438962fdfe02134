"""Equal weights."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting


@dataclass(frozen=True)
class Equal(Weighting):
    """Weight 1 for every task: the plain sum of the losses, and the baseline that every other method has to beat.

    ``w_t = 1``.

    *Reads* nothing. *Writes* ``[m]``. *State* none. *Cost* none.

    >>> Equal()(losses=torch.tensor([3.0, 0.5]))
    tensor([1., 1.])

    References:
        Called EW (equal weighting) in LibMTL. Kurin et al., "In Defense of the Unitary Scalarization for Deep
        Multi-Task Learning", arXiv 2201.04122, eq. 2, argue for it.
    """

    needs = Needs.NOTHING
    traits = Traits(nonnegative=True, total="m", scale_degree=0)

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """Ones."""
        return torch.ones(len(view.tasks), dtype=view.dtype, device=view.device), state
