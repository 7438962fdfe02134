"""Random loss weighting."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting


@dataclass(frozen=True)
class RLW(Weighting):
    """Random weights, drawn anew at each step: a baseline as strong as many methods, at no cost.

    ``w = softmax(z)``, ``z_t ~ N(0, 1)`` independent.

    *Reads* nothing but ``view.generator``: a task's draw depends on the seed, the step and its place alone, so it is
    the same on all ranks, after a resume, and whoever is absent. *Writes* ``[m]``, on the simplex. *State* none. *Cost*
    none.

    >>> RLW()(losses=torch.tensor([3.0, 0.5])).sum()
    tensor(1.)

    References:
        Lin, Ye, Zhang, Tsang, "Reasonable Effectiveness of Random Weighting", TMLR 2022, arXiv 2111.10603: the normal
        distribution of its section on sampling, and its softmax normalisation.
    """

    needs = Needs.NOTHING
    traits = Traits(nonnegative=True, total=1.0, scale_degree=0, random=True)

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """A softmax of standard normal draws."""
        draws = torch.randn(len(view.known), dtype=view.dtype, device=view.device, generator=view.generator)
        return draws[list(view.places)].softmax(dim=0), state
