"""Scalars whose backward hands given gradients to leaves."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight._statistics import cast

Pairs = list[tuple[Tensor, Tensor | None]]
"""Leaves with the gradients that they are to get."""
Gradients = Callable[[Tensor, Sequence[Tensor]], Sequence[Tensor | None]]
"""From the gradient that comes in, and saved tensors, to one gradient a leaf."""


_MEASURED = (
    "The step's gradients were measured before this backward and have no graph of their own: expected backward() "
    "without create_graph=True, found it. For second derivatives, call combine(..., retain_graph=True): its backward "
    "goes through the losses' graph, with the weights as constants (weights per gradient entry have none)."
)


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Gradients, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[count:])
        ctx.gradients, ctx.options = gradients, [(leaf.dtype, leaf.device) for leaf in tensors[:count]]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # as it is under create_graph=True alone
            raise MTLWeightError(_MEASURED)
        found = zip(ctx.gradients(incoming, ctx.saved_tensors), ctx.options, strict=True)
        written = [None if g is None else cast(g, *options) for g, options in found]
        return (None, None, None, *written, *[None] * len(ctx.saved_tensors))


def inject(value: Tensor, leaves: Sequence[Tensor], saved: Sequence[Tensor], gradients: Gradients) -> Tensor:
    """A scalar whose backward computes the leaves' gradients.

    Args:
        value: the scalar's.
        leaves: get the gradients.
        saved: what ``gradients`` needs; freed with the graph.
        gradients: called by each backward.
    """
    scalar: Tensor = _Inject.apply(value, gradients, len(leaves), *leaves, *saved)  # type: ignore[no-untyped-call]  # torch's
    return scalar


def inject_known(value: Tensor, pairs: Pairs) -> Tensor:
    """A scalar whose backward hands out gradients that are there already."""
    known = [(leaf, g) for leaf, g in pairs if g is not None]

    def gradients(incoming: Tensor, saved: Sequence[Tensor]) -> list[Tensor]:
        return [cast(incoming, incoming.dtype, g.device) * g for g in saved]

    return inject(value, [leaf for leaf, _ in known], [g for _, g in known], gradients)
