"""Questions to an autograd graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torch.autograd.graph import Node


def leaves(outputs: Iterable[Tensor]) -> list[Tensor]:
    """The leaf tensors whose ``.grad`` a backward from ``outputs`` would write, in a stable order."""
    outputs = list(outputs)
    found = {id(output): output for output in outputs if output.grad_fn is None and output.requires_grad}
    for node in _nodes(outputs):
        leaf = _leaf(node)
        if leaf is not None:
            found[id(leaf)] = leaf
    return list(found.values())


def leaves_of_each(outputs: Iterable[Tensor]) -> list[set[int]]:
    """For each output the ids of the leaves that it reaches, and of some that an output before it reaches.

    The graph is walked once: where an output meets the walk of one before it, it takes over what that one found.
    """
    first: dict[Node, int] = {}
    found: list[set[int]] = []
    for t, output in enumerate(outputs):
        mine, met = {id(output)} if output.grad_fn is None else set(), set()
        stack = [] if output.grad_fn is None else [output.grad_fn]
        while stack:
            node = stack.pop()
            if node in first:
                met.add(first[node])
                continue
            first[node] = t
            leaf = _leaf(node)
            if leaf is not None:
                mine.add(id(leaf))
            stack.extend(parent for parent, _ in node.next_functions if parent is not None)
        before = [found[k] for k in met - {t}]
        found.append(before[0] if len(before) == 1 and not mine else mine.union(*before))  # many samples share one set
    return found


def reached(outputs: Iterable[Tensor]) -> set[Node]:
    """All nodes that a backward from ``outputs`` passes."""
    return set(_nodes(outputs))


def bypassed(outputs: Iterable[Tensor], views: Mapping[Tensor, Tensor]) -> list[Tensor]:
    """The leaves that the graph reaches other than through the view that it was to use.

    Args:
        outputs: where the graph ends.
        views: from leaf to its view.
    """
    gates = {view.grad_fn for view in views.values()}
    others = (node for node in _nodes(outputs) if node not in gates)
    direct = {id(_leaf(parent)) for node in others for parent, _ in node.next_functions if parent is not None}
    return [leaf for leaf in views if id(leaf) in direct]


def dtypes(outputs: Iterable[Tensor]) -> set[torch.dtype]:
    """The dtypes of the gradients that a backward from ``outputs`` computes; of a compiled model's, its ends' alone."""
    outputs = list(outputs)
    return {x.dtype for x in outputs} | {
        each.dtype for node in _nodes(outputs) for each in getattr(node, "_input_metadata", ())
    }


def once_differentiable(outputs: Iterable[Tensor]) -> bool:
    """Whether a ``once_differentiable`` backward is in the graph. Torch cuts the graph there: another one skips it."""
    return any(node.name() == "torch::autograd::Error" for node in _nodes(outputs))


def reentrant(outputs: Iterable[Tensor]) -> bool:
    """Whether reentrant activation checkpointing is in the graph, which hides the parameters that it uses."""
    return any(node.name() == "CheckpointFunctionBackward" for node in _nodes(outputs))


def compiled(outputs: Iterable[Tensor]) -> set[type]:
    """The backwards of compiled models in the graph: a type for each model, shape and dtype that was compiled."""
    return {type(node) for node in _nodes(outputs) if node.name() == "CompiledFunctionBackward"}


def _nodes(outputs: Iterable[Tensor]) -> Iterator[Node]:
    stack = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(parent for parent, _ in node.next_functions if parent is not None)


def _leaf(node: Node) -> Tensor | None:
    leaf: Tensor | None = getattr(node, "variable", None)  # AccumulateGrad alone has one
    return leaf
