"""Weightings from plain functions."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mtlweight._view import Needs, State, View
from mtlweight._weighting import Level, Traits, Weighting

NO_CLAIMS = Traits()


@dataclass(frozen=True)
class FunctionWeighting(Weighting):
    """A weighting without state made from a function; see :func:`weighting`."""

    function: Callable[[View], Tensor]
    needs: Needs = Needs.NOTHING
    writes: Level = "task"
    traits: Traits = NO_CLAIMS

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """Calls the function."""
        return self.function(view), state

    def __repr__(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))


def weighting(
    needs: Needs,
    *,
    writes: Level = "task",
    traits: Traits = NO_CLAIMS,
) -> Callable[[Callable[[View], Tensor]], FunctionWeighting]:
    """Turns a plain function of a view into a weighting.

    >>> import torch
    >>> @weighting(Needs.LOSSES)
    ... def inverse(view):
    ...     return 1 / view.losses
    >>> inverse(losses=torch.tensor([1.0, 4.0]))
    tensor([1.0000, 0.2500])

    Args:
        needs: what the function reads.
        writes: the shape of its weights.
        traits: what it claims about them.
    """
    return lambda function: FunctionWeighting(function, needs, writes, traits)
