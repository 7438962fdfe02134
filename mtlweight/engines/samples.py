"""Samples engine: the gradient of each sample, by ``torch.func.vmap``."""

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mtlweight.autograd.gradients import unhooked, vectorized
from mtlweight.autograd.graph import Graph
from mtlweight.autograd.half_precision import unscaled, wide
from mtlweight.engines.jacobian import Reached
from mtlweight.engines.totals import Totals

CHUNK = 64
"""Samples in one vectorised backward."""


def jacobian(losses: Sequence[Tensor], inputs: Sequence[Tensor], *, chunk_size: int = CHUNK) -> Iterator[list[Tensor]]:
    """The per-sample gradients, in chunks: lists of one ``[chunk, *shape]`` tensor an input.

    A ``torch.func.vmap`` over the rows of the backward pass, so that the forward runs once, as the user wrote it:
    samples that interact (BatchNorm in training mode) are differentiated as they are, and **all rows see the dropout
    masks that gave the losses**; nothing random happens inside the vmap. Memory grows with ``chunk_size · n``.
    """
    flat, graph = torch.cat([row.reshape(-1) for row in losses]), Graph(losses)

    def pull(cotangent: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(flat, inputs, cotangent, retain_graph=True, materialize_grads=True)

    def pull_all(chunk: Tensor, scale: float, _keep: bool = True) -> Sequence[Tensor]:
        found: Sequence[Tensor] = torch.func.vmap(pull, chunk_size=chunk_size, randomness="error")(scale * chunk)
        return found

    for chunk in torch.eye(len(flat), dtype=flat.dtype, device=flat.device).split(chunk_size):
        with vectorized("samples", graph), unhooked(inputs):
            some = functools.partial(pull_all, chunk)
            found = unscaled(some, True) if graph.has_float16 else some(1.0)
        yield [g for g in found if g is not None]


def alignments(
    losses: Sequence[Tensor], inputs: Sequence[Tensor], tangents: Sequence[Tensor], *, chunk_size: int = CHUNK
) -> list[Tensor]:
    """``<∇ℓ[t, i], g>`` from the per-sample gradients."""
    chunks = []
    for columns in jacobian(losses, inputs, chunk_size=chunk_size):
        pairs = [(wide(c).reshape(len(c), -1), t.flatten()) for c, t in zip(columns, tangents, strict=True)]
        chunks.append(torch.stack([c @ t.to(c.dtype) for c, t in pairs]).sum(dim=0))
    parts = torch.cat(chunks).split([loss.numel() for loss in losses])
    return [part.reshape(loss.shape) for part, loss in zip(parts, losses, strict=True)]


def gradients(
    totals: Totals, inputs: Sequence[Tensor], *, keep_graph: bool = True, chunk_size: int = CHUNK
) -> Iterator[Reached]:
    """The gradient of each total, summed from its samples' gradients."""
    del keep_graph  # the graph is kept in any case
    for t, row in enumerate(totals.losses):
        given = totals.coefficients
        weights = torch.full_like(row, 1 / row.numel()) if given is None else given[t].to(row.dtype)
        parts = weights.detach().reshape(-1).split(chunk_size)
        sums = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in inputs]
        for columns, part in zip(jacobian([row], inputs, chunk_size=chunk_size), parts, strict=True):
            for total, column in zip(sums, columns, strict=True):
                total.add_(torch.tensordot(part.to(total.dtype), column.to(total.dtype), dims=1))
        yield dict(enumerate(sums))
