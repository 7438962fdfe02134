"""Batched engine: several rows in one vectorised backward."""

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mtlweight.autograd.gradients import grad, vectorized
from mtlweight.autograd.half_precision import Gradients, unscaled
from mtlweight.engines.jacobian import Reached
from mtlweight.engines.totals import Totals

CHUNK = 32
"""Rows in one backward."""


def gradients(
    totals: Totals, inputs: Sequence[Tensor], *, keep_graph: bool, chunk_size: int = CHUNK
) -> Iterator[Reached]:
    """The gradients of each total, ``chunk_size`` totals in one vectorised backward.

    Fewer kernel launches than one backward a row, for more memory: each chunk holds its gradients, zeros included.
    Operators without a batching rule for their backward are looped over by torch.
    """
    graph = totals.graph
    stacked = torch.stack(graph.outputs)
    chunks = torch.eye(len(stacked), dtype=stacked.dtype, device=stacked.device).split(chunk_size)

    def pull(chunk: Tensor, scale: float, keep: bool) -> Gradients:
        return grad([stacked], inputs, [scale * chunk], graph=graph, keep_graph=keep, is_grads_batched=True)

    for i, chunk in enumerate(chunks):
        keep = keep_graph or i + 1 < len(chunks)
        with vectorized("batched", graph):
            some = functools.partial(pull, chunk)
            columns = unscaled(some, keep) if graph.has_float16 else some(1.0, keep)
        for k in range(len(chunk)):
            yield {j: column[k] for j, column in enumerate(columns) if column is not None}
