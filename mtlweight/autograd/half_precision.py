"""Float16 has a short range: what passes through it is scaled first, as a gradient scaler does for a plain step."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mtlweight._statistics import all_finite, cast

Gradients = tuple[Tensor | None, ...]
"""One an input; ``None`` where there is none."""

SCALES = tuple(2.0**k for k in (15, 8, 0, -8))
"""Tried one after the other until nothing overflows. The first is the largest power of two that float16 holds."""


def wide(values: Tensor) -> Tensor:
    """The same values in float32 at least."""
    return cast(values, torch.promote_types(values.dtype, torch.float32))


def dense(gradient: Tensor) -> Tensor:
    """A sparse gradient as a dense one."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def unscaled(pull: Callable[[float, bool], Sequence[Tensor | None]], keep_graph: bool) -> Gradients:
    """Gradients through float16, in float32, of losses that were scaled as far as nothing overflows.

    The losses are weighed before anybody can scale them, and the scale of a ``GradScaler`` is known in the backward
    alone. Unscaled, gradients below 6e-8 would be zero, and those below 6e-5 would lose digits.

    Args:
        pull: from a factor on the losses, and whether to keep their graph, to gradients that have that factor.
        keep_graph: whether the graph is needed again.
    """
    found: list[Tensor | None] = []
    for scale in SCALES:
        found = [None if g is None else dense(g) for g in pull(scale, keep_graph or scale != SCALES[-1])]
        if all_finite([g for g in found if g is not None]):
            break
    return tuple(None if g is None else wide(g) / scale for g in found)


def unit(tangents: Sequence[Tensor]) -> tuple[list[Tensor], float]:
    """Tangents whose largest entry is between 0.5 and 1, and the power of two that :func:`restored` takes.

    What is linear in them passes through float16 as well, and would leave its range where they are small or large.
    """
    largest = torch.stack([wide(g).abs().amax() for g in tangents if g.numel()]).amax()
    size = math.ldexp(1.0, math.frexp(float(largest))[1])
    return [wide(g) / size for g in tangents], size


def restored(values: Tensor, size: float) -> Tensor:
    """From products with the tangents that :func:`unit` makes to those with the given ones."""
    return values if size == 1.0 else wide(values) * size
