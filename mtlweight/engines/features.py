"""Features engine: gradients at the shared representation instead of the shared parameters."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from mtlweight._errors import MTLWeightError
from mtlweight.autograd.graph import leaf_of


class Capture:
    """Records what the shared modules put out, as far as it carries a graph.

    Args:
        modules: the shared modules; their outputs are the shared representation.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._outputs: list[Tensor] = []
        for module in modules:
            # The hook goes with the capture, not with the user's module.
            weakref.finalize(self, module.register_forward_hook(_Hook(self)).remove)

    def record(self, output: Any) -> None:
        """Keeps the tensors of one output."""
        self._outputs.extend(tensor for tensor in tensors(output) if tensor.requires_grad)

    def clear(self) -> None:
        """Forgets what was recorded."""
        self._outputs.clear()

    def take(self) -> list[Tensor]:
        """What was recorded since the last call of this or of :meth:`clear`, each once, whoever returned it."""
        outputs = list({id(output): output for output in self._outputs}.values())
        self._outputs.clear()
        return outputs


class _Hook:
    """The forward hook of a capture. A copy of the module carries one that does nothing."""

    def __init__(self, capture: Capture | None = None) -> None:
        self._capture = None if capture is None else weakref.ref(capture)

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> None:
        capture = None if self._capture is None else self._capture()
        if capture is not None and torch.is_grad_enabled():
            capture.record(output)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


def reach(
    losses: Mapping[str, Tensor], points: Sequence[Tensor], shared: Iterable[Tensor], called: Callable[[Tensor], str]
) -> bool:
    """Whether tasks use these points at all; if so, gradients there say of any two tasks how they go together.

    Args:
        losses: the tasks' losses, by name.
        points: what the shared modules put out.
        shared: their parameters.
        called: what messages call a parameter.

    Raises:
        MTLWeightError: if a task does not use them though others do; if it uses a shared parameter past them, whose
            gradient would be left out; or if two tasks have none in common: their inner product would be 0, whatever
            their gradients are.
    """
    known = {id(p): p for p in shared}
    places = {_edge(point): k for k, point in enumerate(points)}
    walks = {task: _walk([_edge(loss)], places) for task, loss in losses.items()}
    if not any(reached for reached, _ in walks.values()):
        return False
    for task, (reached, leaves) in walks.items():
        past = next((known[id(leaf)] for leaf in leaves if id(leaf) in known), None)
        if past is not None:
            raise MTLWeightError(
                f"{_COMPARES} that every task uses their parameters through these outputs alone, found that task "
                f"{task!r} uses {called(past)} past them, as with tied weights or a derivative inside the loss. Use "
                "engine='rows'."
            )
        if not reached:
            raise MTLWeightError(
                f"{_COMPARES} that every task uses one, found that {task!r} does not. Use engine='rows'."
            )
    before = functools.cache(lambda k: _walk(_parents(points[k]), places, stop=False)[0])  # what it was made from
    for one, other in itertools.combinations(losses, 2):
        mine, others = walks[one][0], walks[other][0]
        if mine.isdisjoint(others) and mine.union(*map(before, mine)).isdisjoint(others.union(*map(before, others))):
            raise MTLWeightError(
                f"{_COMPARES} that any two tasks have one in common, found none for {one!r} and {other!r}: their "
                "gradients there say nothing of each other. So it is where each task has an input or a representation "
                "of its own. Use engine='rows'."
            )
    return True


_COMPARES = "engine='features' compares gradients at the outputs of the modules in shared=...: expected"
Edge = tuple[Node | int | None, int]
"""Where a tensor is in the graph: its node and which of the node's outputs it is; of a leaf, its id."""


def _edge(tensor: Tensor) -> Edge:
    return (id(tensor), 0) if tensor.grad_fn is None else (tensor.grad_fn, tensor.output_nr)


def _parents(tensor: Tensor) -> list[Edge]:
    return [] if tensor.grad_fn is None else [*tensor.grad_fn.next_functions]


def _walk(start: Iterable[Edge], places: Mapping[Edge, int], *, stop: bool = True) -> tuple[set[int], list[Tensor]]:
    """The points that a backward from these edges comes to, and the leaves; it does not go on at points, or does."""
    stack, seen = [*start], {*start}
    points, leaves = set(), list[Tensor]()
    while stack:
        edge = stack.pop()
        node = edge[0]
        function = None if isinstance(node, int) else node  # not all of torch's nodes are instances of Node
        leaf = None if function is None else leaf_of(function)
        place = places.get(edge if leaf is None else (id(leaf), 0))
        if place is not None:
            points.add(place)
            if stop:
                continue
        if leaf is not None:
            leaves.append(leaf)
        if function is not None:
            new = [parent for parent in function.next_functions if parent not in seen]
            seen.update(new)
            stack.extend(new)
    return points, leaves


def tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in a module's output: a tensor, or tuples, lists and mappings of them."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for part in output.values():
            yield from tensors(part)
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from tensors(part)
