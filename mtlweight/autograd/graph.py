"""Questions to an autograd graph."""

import functools
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.autograd.graph import Node


class Graph:
    """The graph behind some tensors, walked once, by the first question. It keeps alive what the forward saved.

    Args:
        outputs: where a backward would start.
    """

    def __init__(self, outputs: Iterable[Tensor]) -> None:
        self.outputs = list(outputs)

    @functools.cached_property
    def nodes(self) -> list[Node]:
        """All nodes, each once."""
        stack = [output.grad_fn for output in self.outputs if output.grad_fn is not None]
        found = dict.fromkeys(stack)
        while stack:
            for parent, _ in stack.pop().next_functions:
                if parent is not None and parent not in found:
                    found[parent] = None
                    stack.append(parent)
        return list(found)

    @functools.cached_property
    def leaves(self) -> list[Tensor]:
        """The leaf tensors whose ``.grad`` a backward would write, in a stable order."""
        found = {id(output): output for output in self.outputs if output.grad_fn is None and output.requires_grad}
        found.update((id(leaf), leaf) for node in self.nodes if (leaf := leaf_of(node)) is not None)
        return list(found.values())

    @functools.cached_property
    def dtypes(self) -> set[torch.dtype]:
        """Those of the real gradients that pass. Of a compiled model, only its ends are seen."""
        passed = {each.dtype for node in self.nodes for each in getattr(node, "_input_metadata", ())}
        return {each for each in passed | {output.dtype for output in self.outputs} if each.is_floating_point}

    @property
    def rounding(self) -> float:
        """The ``eps`` of the least precise dtype that gradients pass through; 0 if none is below float32."""
        least = max((torch.finfo(dtype).eps for dtype in self.dtypes), default=0.0)
        return least if least > torch.finfo(torch.float32).eps else 0.0

    @property
    def has_float16(self) -> bool:
        """Whether gradients pass through float16, whose range is short."""
        return torch.float16 in self.dtypes

    @functools.cached_property
    def compiled(self) -> set[type]:
        """The backwards of compiled models: a type for each model, shape and dtype that was compiled."""
        return {type(node) for node in self.nodes if node.name() == "CompiledFunctionBackward"}

    @property
    def once_differentiable(self) -> bool:
        """Whether a ``once_differentiable`` backward was differentiated. Torch cuts the graph there, silently."""
        return any(node.name() == "torch::autograd::Error" for node in self.nodes)

    @functools.cached_property
    def operators(self) -> set[str]:
        """The operators, with those of their options that are a word, or yes or no.

        Such as ``ScatterReduceBackward0(include_self=True, reduce=prod)``.
        """
        options = {kind: _options(node) for kind, node in {type(node): node for node in self.nodes}.items()}
        found = {
            (node.name(), *[(o, getattr(node, f"_saved_{o}")) for o in options[type(node)]]) for node in self.nodes
        }
        return {f"{name}({', '.join(f'{o}={value}' for o, value in given)})" for name, *given in found}

    def bypassed(self, views: Mapping[Tensor, Tensor]) -> list[Tensor]:
        """The leaves that are reached other than through their view.

        Args:
            views: from leaf to its view.
        """
        gates = {view.grad_fn for view in views.values()}
        others = (node for node in self.nodes if node not in gates)
        direct = {id(leaf_of(parent)) for node in others for parent, _ in node.next_functions if parent is not None}
        return [leaf for leaf in views if id(leaf) in direct]


def leaves_of_each(outputs: Iterable[Tensor]) -> list[set[int]]:
    """For each output the ids of the leaves that it reaches, and of some that an earlier output reaches.

    The graph is walked once: where an output meets the walk of an earlier one, it takes over what that one found.
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
            leaf = leaf_of(node)
            if leaf is not None:
                mine.add(id(leaf))
            stack.extend(parent for parent, _ in node.next_functions if parent is not None)
        before = [found[k] for k in met - {t}]
        found.append(before[0] if len(before) == 1 and not mine else mine.union(*before))  # many samples share one set
    return found


def leaf_of(node: Node) -> Tensor | None:
    """The leaf whose gradient the node adds up, if it does that."""
    leaf: Tensor | None = getattr(node, "variable", None)  # AccumulateGrad alone has one
    return leaf


def _options(node: Node) -> list[str]:
    """Names of the options that nodes of this type have."""
    kind = type(node)
    if kind not in _KNOWN:
        names = dir(kind)
        saved = [name.removeprefix("_saved_") for name in names if name.startswith("_saved_")]
        plain = [name for name in saved if f"_raw_saved_{name}" not in names]  # asking for a tensor may recompute it
        _KNOWN[kind] = [name for name in plain if isinstance(getattr(node, f"_saved_{name}"), (bool, str))]
    return _KNOWN[kind]


_KNOWN: dict[type, list[str]] = {}
