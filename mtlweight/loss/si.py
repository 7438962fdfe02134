"""Scale-invariant losses."""

from dataclasses import dataclass

from torch import Tensor

from mtlweight._checks import nonnegative
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting
from mtlweight.loss._domain import inverse


@dataclass(frozen=True)
class SI(Weighting):
    """Minimises the sum of the losses' logarithms: the step does not depend on any loss's unit.

    The scalar is ``f = Σ_t log ℓ_t``, written as the weights ``w_t = ∂f/∂ℓ_t = 1 / ℓ_t``. A baseline as strong as many
    methods that cost more, and the one that shows whether a method does more than fix units.

    *Reads* the losses, which must be >= 0. *Writes* ``[m]``, non-negative. *State* none. *Cost* none.

    A loss of exactly zero has weight 0: it is at its minimum. A small loss has a large weight: where losses approach
    zero, so does the largest learning rate that is stable. Constants before it change nothing; ``SI() >>
    Constant({...})`` prefers tasks.

    Raises:
        MTLWeightError: if a loss is negative.

    >>> SI()(losses=torch.tensor([4.0, 0.5]))
    tensor([0.2500, 2.0000])

    *Differs from the paper* in nothing.

    References:
        The baseline called SI (scale-invariant) in Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022,
        arXiv 2202.01017, section on experiments; ``scaleinvls`` in its official code.
    """

    needs = Needs.LOSSES
    traits = Traits(nonnegative=True, scale_degree=-1, losses="nonnegative")

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """The inverse losses."""
        return inverse(nonnegative("SI", view)), state
