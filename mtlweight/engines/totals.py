"""The scalars whose gradients are the rows of the Jacobian."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mtlweight.autograd.graph import Graph


@dataclass(frozen=True)
class Totals:
    """For each task what its samples' losses add up to.

    Args:
        losses: one ``[b]`` or scalar tensor a task.
        coefficients: ``[m, b]``, or ``[m]`` for scalars; ``None`` for means.
    """

    losses: Sequence[Tensor]
    coefficients: Tensor | None = None

    @functools.cached_property
    def graph(self) -> Graph:
        """The graph of the ``m`` scalars."""
        if self.coefficients is None:
            return Graph(loss.mean() for loss in self.losses)
        pairs = zip(self.coefficients, self.losses, strict=True)
        return Graph((each.to(loss.dtype) * loss).sum() for each, loss in pairs)
