"""Batched engine: several rows in one vectorised backward."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mtlweight.engines._grad import grad, vectorized
from mtlweight.engines._graph import Backward
from mtlweight.engines._range import Gradients, Reached, unscaled

CHUNK = 32
"""Rows in one backward."""


def gradients(
    graph: Backward, inputs: Sequence[Tensor], *, keep_graph: bool, chunk_size: int = CHUNK
) -> Iterator[Reached]:
    """The gradients of each output with respect to inputs, ``chunk_size`` outputs in one vectorised backward.

    Fewer kernel launches than one backward a row, for more memory: each chunk holds its gradients, zeros included.
    Operators without a batching rule for their backward are looped over by torch.

    Args:
        graph: of the outputs, which are scalars.
        inputs: leaves or intermediate tensors.
        keep_graph: whether the graph is needed again after the last output.
        chunk_size: outputs in one backward.
    """
    stacked = torch.stack(graph.outputs)
    basis = torch.eye(len(stacked), dtype=stacked.dtype, device=stacked.device)
    chunks, short = basis.split(chunk_size), graph.narrow

    def pull(chunk: Tensor, scale: float, keep: bool) -> Gradients:
        return grad([stacked], inputs, [scale * chunk], retain_graph=keep, is_grads_batched=True)

    for i, chunk in enumerate(chunks):
        keep = keep_graph or i + 1 < len(chunks)
        with vectorized("batched", graph.outputs):
            columns = unscaled(functools.partial(pull, chunk), keep) if short else pull(chunk, 1.0, keep)
        for k in range(len(chunk)):
            yield {j: column[k] for j, column in enumerate(columns) if column is not None}
