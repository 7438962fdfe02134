"""Rows engine: one backward a row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mtlweight._statistics import statistics_dtype
from mtlweight.engines._graph import Backward, leaves_of_each
from mtlweight.engines._layers import Linear
from mtlweight.engines._range import Reached, gradient, wide


def gradients(
    graph: Backward, inputs: Sequence[Tensor], *, keep_graph: bool, layers: Mapping[int, Linear] | None = None
) -> Iterator[Reached]:
    """The gradients of each output with respect to the inputs that it depends on, one output at a time.

    Works on every graph, compiled models included, and touches only what an output depends on. Cost: one backward an
    output. Memory: one gradient at a time.

    Args:
        graph: of the outputs, which are scalars.
        inputs: leaves or intermediate tensors.
        keep_graph: whether the graph is needed again after the last output.
        layers: linear layers by the place of their weight, whose gradient is not made: ``δ`` is in its place.
    """
    outputs, check = graph.outputs, bool(graph.compiled)
    edges = {k: layer.output for k, layer in (layers or {}).items()}
    everywhere = [range(len(inputs))] * len(outputs)
    # Not to ask for all other tasks' heads saves a tenth of the time where there are many.
    for i, places in enumerate(_places(outputs, inputs) if len(outputs) > 4 else everywhere):
        keep = keep_graph or i + 1 < len(outputs)
        asked = [edges.get(k, inputs[k]) for k in places]
        found = gradient(outputs[i], asked, keep_graph=keep, narrow=graph.narrow, check=check)
        yield {k: g for k, g in zip(places, found, strict=True) if g is not None}


def _places(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Iterator[list[int]]:
    """For each output the places of the inputs that it may depend on."""
    leaves = {id(x): k for k, x in enumerate(inputs) if x.is_leaf}
    others = [k for k, x in enumerate(inputs) if not x.is_leaf]
    for reached in leaves_of_each(outputs):
        yield sorted(others + [leaves[leaf] for leaf in reached if leaf in leaves])


def alignment(losses: Sequence[Tensor], inputs: Sequence[Tensor], tangents: Sequence[Tensor]) -> Tensor:
    """``<∇ℓ[t, i], g>`` for each task and sample by one backward each: slow, and right wherever backward works.

    Args:
        losses: one ``[b]`` or scalar tensor a task.
        inputs: parameters.
        tangents: ``g``, one tensor a parameter.

    Returns:
        Tensor: ``[m, b]`` or ``[m]``.
    """
    outputs = [sample for row in losses for sample in row.reshape(-1).unbind()]
    products = [inner(row, tangents) for row in gradients(Backward(outputs), inputs, keep_graph=True)]
    return torch.stack(products).reshape(len(losses), *losses[0].shape)


def inner(gradients: Reached, tangents: Sequence[Tensor]) -> Tensor:
    """``<gradients, tangents>``, summed in float64."""
    device = tangents[0].device
    total = torch.zeros((), dtype=statistics_dtype(device), device=device)
    for k, g in gradients.items():
        total = total + (wide(g) * wide(tangents[k])).sum(dtype=total.dtype)
    return total
