"""Rows engine: one backward a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mtlweight.engines._graph import Backward, leaves_of_each
from mtlweight.engines._range import Gradients, gradient, wide


def gradients(graph: Backward, inputs: Sequence[Tensor], *, keep_graph: bool) -> Iterator[Gradients]:
    """The gradients of each output with respect to all inputs, one output at a time.

    Works on every graph, compiled models included, and touches only what an output depends on. Cost: one backward an
    output. Memory: one gradient at a time.

    Args:
        graph: of the outputs, which are scalars.
        inputs: leaves or intermediate tensors; ``None`` is returned where an output does not depend on one.
        keep_graph: whether the graph is needed again after the last output.
    """
    outputs, narrow, check = graph.outputs, graph.narrow, bool(graph.compiled)
    # Not to ask for all other tasks' heads saves a tenth of the time where there are many.
    reached = leaves_of_each(outputs) if len(outputs) > 4 else None
    for i, output in enumerate(outputs):
        keep = keep_graph or i + 1 < len(outputs)
        if reached is None:
            yield gradient(output, inputs, keep_graph=keep, narrow=narrow, check=check)
        else:
            mine = [x for x in inputs if not x.is_leaf or id(x) in reached[i]]
            found = gradient(output, mine, keep_graph=keep, narrow=narrow, check=check)
            known = dict(zip(map(id, mine), found, strict=True))
            yield tuple(known.get(id(x)) for x in inputs)


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


def inner(gradients: Gradients, tangents: Sequence[Tensor]) -> Tensor:
    """``<gradients, tangents>``, where ``None`` counts as zero; at least in float32."""
    total = torch.zeros((), device=tangents[0].device)
    for g, tangent in zip(gradients, tangents, strict=True):
        if g is not None:
            total = total + (wide(g) * wide(tangent)).sum()
    return total
