"""Whether alignments are what an ordinary backward says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtlweight._statistics import statistics_dtype
from mtlweight.engines import rows
from mtlweight.engines._graph import Backward
from mtlweight.engines._range import wide

DISAGREES = "its derivatives are not those of a backward"
_LEAST = 0.01
"""Of the alignments' sizes together: more than rounding makes in float32, less than what leaving out a branch does."""
_ROUNDINGS = 20
"""The same for lower precision, in units of its rounding."""


def due(uses: int) -> bool:
    """Whether to confirm: at the 1st, 2nd, 4th, 8th, ... use, since compilers may step in after some uses."""
    return uses & (uses - 1) == 0


def confirmed(
    losses: Sequence[Tensor], inputs: Sequence[Tensor], tangents: Sequence[Tensor], found: Sequence[Tensor]
) -> bool:
    """Whether all alignments together are the alignment of the summed losses, by one backward. It keeps the graph.

    Code that a compiler has replaced, or a derivative written by hand, may lose or change a derivative of the second
    order or in forward mode without a word, and have the right one in an ordinary backward.

    Args:
        losses: one ``[b]`` or scalar tensor a task.
        inputs: parameters.
        tangents: ``g``, one tensor a parameter.
        found: ``<∇ℓ[t, i], g>``, one tensor a task.
    """
    if not losses:
        return True
    device = losses[0].device
    total = torch.stack([wide(loss).sum().to(device) for loss in losses]).sum()
    expected = float(rows.alignment([total], inputs, tangents))
    dtype = statistics_dtype(device)
    values = torch.cat([each.flatten().to(device, dtype) for each in found])
    size = max(float(values.abs().sum()), abs(expected))
    rounding = max(torch.finfo(each).eps for each in Backward([total]).dtypes)
    # Written so that what is not finite passes: that is for others to judge.
    return not abs(float(values.sum()) - expected) > max(_LEAST, _ROUNDINGS * rounding) * size
