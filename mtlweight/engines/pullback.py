"""Pullback engine: alignments from losses that are computed already."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtlweight.autograd.gradients import grad
from mtlweight.autograd.graph import Graph


def alignments(losses: Sequence[Tensor], inputs: Sequence[Tensor], tangents: Sequence[Tensor]) -> list[Tensor]:
    """``<∇ℓ[t, i], g>`` for all tasks and samples by differentiating twice.

    ``v(u) = Jᵀu`` is linear in ``u``, hence ``∂<v(u), g>/∂u = J g`` for any ``u``: one backward with a graph, and one
    through it.

    Raises:
        RuntimeError: torch's own, for an operator that cannot be differentiated twice; or in place of it, where torch
            would leave out what flows through a ``once_differentiable`` function.
    """
    stacked = torch.stack(list(losses))
    u = torch.zeros_like(stacked, requires_grad=True)
    pulled = grad([stacked], inputs, [u], graph=Graph([stacked]), keep_graph=True, create_graph=True)
    pairs = [(v, g.to(v.dtype)) for v, g in zip(pulled, tangents, strict=True) if v is not None and v.requires_grad]
    twice = Graph(v for v, _ in pairs)
    if twice.once_differentiable:
        raise RuntimeError("trying to differentiate twice a function that was marked with @once_differentiable")
    products = None
    if pairs:
        (products,) = grad([v for v, _ in pairs], [u], [g for _, g in pairs], graph=twice, keep_graph=True)
    return list((torch.zeros_like(stacked) if products is None else products).unbind())
