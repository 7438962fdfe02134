"""Rows engine: one backward a row."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mtlweight._statistics import statistics_dtype
from mtlweight.autograd.gradients import gradient
from mtlweight.autograd.graph import Graph, leaves_of_each
from mtlweight.autograd.half_precision import wide
from mtlweight.engines.jacobian import Reached
from mtlweight.engines.totals import Totals


def gradients(totals: Totals, inputs: Sequence[Tensor], *, keep_graph: bool) -> Iterator[Reached]:
    """The gradients of each total, one total at a time.

    Works on every graph, compiled models included, and touches only what a total depends on. Cost: one backward a
    total. Memory: one gradient at a time.
    """
    return _of_each(totals.graph, inputs, keep_graph=keep_graph)


def _of_each(graph: Graph, inputs: Sequence[Tensor], *, keep_graph: bool) -> Iterator[Reached]:
    leaves = {id(x): k for k, x in enumerate(inputs) if x.is_leaf}
    others = [k for k, x in enumerate(inputs) if not x.is_leaf]
    # Not to ask for all other tasks' heads saves a tenth of the time where there are many.
    for i, (output, reached) in enumerate(zip(graph.outputs, leaves_of_each(graph.outputs), strict=True)):
        places = sorted(others + [leaves[leaf] for leaf in reached if leaf in leaves])
        keep = keep_graph or i + 1 < len(graph.outputs)
        found = gradient(output, [inputs[k] for k in places], graph=graph, keep_graph=keep)
        yield {k: g for k, g in zip(places, found, strict=True) if g is not None}


def alignments(losses: Sequence[Tensor], inputs: Sequence[Tensor], tangents: Sequence[Tensor]) -> list[Tensor]:
    """``<∇ℓ[t, i], g>`` by one backward for each task and sample: slow, and right wherever backward works."""
    graph = Graph(sample for row in losses for sample in row.reshape(-1).unbind())
    products = [inner(row, tangents) for row in _of_each(graph, inputs, keep_graph=True)]
    sizes = [loss.numel() for loss in losses]
    parts = torch.stack(products).split(sizes)
    return [part.reshape(loss.shape) for part, loss in zip(parts, losses, strict=True)]


def inner(gradients: Reached, tangents: Sequence[Tensor]) -> Tensor:
    """``<gradients, tangents>``, summed in float64."""
    device = tangents[0].device
    total = torch.zeros((), dtype=statistics_dtype(device), device=device)
    for k, g in gradients.items():
        total = total + (wide(g) * wide(tangents[k])).sum(dtype=total.dtype)
    return total
