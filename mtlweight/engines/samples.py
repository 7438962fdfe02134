"""Samples engine: the gradient of each sample, by ``torch.func.vmap``."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mtlweight.engines._grad import unhooked, vectorized
from mtlweight.engines._graph import Backward
from mtlweight.engines._range import Reached, unscaled, wide

CHUNK = 64
"""Samples in one vectorised backward."""


def jacobian(losses: Sequence[Tensor], inputs: Sequence[Tensor], *, chunk_size: int = CHUNK) -> Iterator[list[Tensor]]:
    """The per-sample gradients, in chunks: lists of one ``[chunk, *shape]`` tensor an input.

    A ``torch.func.vmap`` over the rows of the backward pass, so that the forward runs once, as the user wrote it:
    samples that interact (BatchNorm in training mode) are differentiated as they are, and **all rows see the dropout
    masks that gave the losses**; nothing random happens inside the vmap. The graph is kept.

    Args:
        losses: one ``[b]`` or scalar tensor a task.
        inputs: parameters.
        chunk_size: rows in one backward; memory grows with ``chunk_size · n``.
    """
    flat = torch.cat([row.reshape(-1) for row in losses])

    def pull(cotangent: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(flat, inputs, cotangent, retain_graph=True, materialize_grads=True)

    def pull_all(chunk: Tensor, scale: float, _keep: bool = True) -> Sequence[Tensor]:
        found: Sequence[Tensor] = torch.func.vmap(pull, chunk_size=chunk_size, randomness="error")(scale * chunk)
        return found

    basis, short = torch.eye(len(flat), dtype=flat.dtype, device=flat.device), Backward(losses).narrow
    for chunk in basis.split(chunk_size):
        with vectorized("samples", losses), unhooked(inputs):
            found = unscaled(functools.partial(pull_all, chunk), True) if short else pull_all(chunk, 1.0)
        yield [g for g in found if g is not None]


def alignment(
    losses: Sequence[Tensor], inputs: Sequence[Tensor], tangents: Sequence[Tensor], *, chunk_size: int = CHUNK
) -> Tensor:
    """``<∇ℓ[t, i], g>`` for each task and sample from the per-sample gradients.

    Args:
        losses: one ``[b]`` or scalar tensor a task.
        inputs: parameters.
        tangents: ``g``, one tensor a parameter.
        chunk_size: rows in one backward.

    Returns:
        Tensor: ``[m, b]`` or ``[m]``.
    """
    parts = []
    for columns in jacobian(losses, inputs, chunk_size=chunk_size):
        pairs = [(wide(c).reshape(len(c), -1), t.flatten()) for c, t in zip(columns, tangents, strict=True)]
        parts.append(torch.stack([c @ t.to(c.dtype) for c, t in pairs]).sum(dim=0))
    return torch.cat(parts).reshape(len(losses), *losses[0].shape)


def gradients(
    losses: Sequence[Tensor], inputs: Sequence[Tensor], coefficients: Tensor | None, *, chunk_size: int = CHUNK
) -> Iterator[Reached]:
    """The gradient of each task's weighted total, summed from its samples' gradients.

    Args:
        losses: one ``[b]`` or scalar tensor a task.
        inputs: parameters.
        coefficients: ``[m, b]``; ``None`` for means.
        chunk_size: rows in one backward.
    """
    for t, row in enumerate(losses):
        weights = torch.full_like(row, 1 / row.numel()) if coefficients is None else coefficients[t].to(row.dtype)
        parts = weights.detach().reshape(-1).split(chunk_size)
        totals = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in inputs]
        for columns, part in zip(jacobian([row], inputs, chunk_size=chunk_size), parts, strict=True):
            for total, column in zip(totals, columns, strict=True):
                total.add_(torch.tensordot(part.to(total.dtype), column.to(total.dtype), dims=1))
        yield dict(enumerate(totals))
