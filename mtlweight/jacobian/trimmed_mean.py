"""Coordinate-wise trimmed mean."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting


@dataclass(frozen=True)
class TrimmedMean(Weighting):
    """Averages each entry over the tasks without its largest and smallest values: no few tasks can dictate the step.

    For each of the ``n`` entries, the ``k`` largest and the ``k`` smallest of its ``m`` values have weight 0, the
    others ``1 / (m - 2k)``; ``k = ⌈β m⌉``, but at most ``⌊(m - 1) / 2⌋``, so that a value is left. With ``β`` close to
    1/2 it is the median, of two tasks always their mean. Equal values share the places that fall to them.

    *Reads* the Jacobian. *Writes* ``[m, n]``, non-negative, each column with sum 1. *State* none. *Cost* the gradients
    of all tasks, kept as ``[m, n]``, a sort of each column, and weights of the same size.

    Args:
        fraction: ``β`` in ``[0, 1/2)``, the share of tasks that may be outliers, on either side. Default 0.1, as in the
            paper's larger experiment.

    Raises:
        MTLWeightError: if ``fraction`` is outside ``[0, 1/2)``.

    >>> TrimmedMean()(jacobian=torch.tensor([[1.0, 9.0], [2.0, 0.0], [9.0, 2.0]]))
    tensor([[0., 0.],
            [1., 0.],
            [0., 1.]])

    *Differs from the paper*, which takes ``β m`` to be a whole number: it is rounded up here, so that a share ``β`` of
    outliers is always within what is trimmed. TorchJD takes ``k`` itself: ``fraction=k / m``.

    References:
        Yin, Chen, Ramchandran, Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
        ICML 2018, arXiv 1803.01498, definition 2 and Algorithm 1, option II.
    """

    fraction: float = 0.1

    needs = Needs.JACOBIAN
    writes = "entry"
    traits = Traits(nonnegative=True, scale_degree=0)

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < 0.5:
            raise MTLWeightError(f"TrimmedMean: expected fraction in [0, 0.5), found {self.fraction}.")

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """The share of the places that are kept, among the entries of the same value."""
        jacobian = view.jacobian
        m = len(jacobian)
        # 0.1 * 30 is a little more than 3 in floating point, and 3 is meant.
        k = min(math.ceil(round(self.fraction * m, 9)), (m - 1) // 2)
        columns = jacobian.T.contiguous()
        ordered = columns.sort(dim=1).values
        first = torch.searchsorted(ordered, columns)
        last = torch.searchsorted(ordered, columns, right=True)
        kept = (last.clamp(max=m - k) - first.clamp(min=k)).clamp(min=0)
        return (kept.to(jacobian.dtype) / ((last - first) * (m - 2 * k))).T, state
