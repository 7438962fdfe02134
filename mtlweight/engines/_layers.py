"""Layers whose weight's gradient is a product: found in the graph, so that an engine may take it by other ways.

A backward then stops at such a layer's output and hands over the gradient there, ``δ``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from mtlweight._statistics import statistics_dtype
from mtlweight.engines._graph import Backward, leaf_of

WIDE = 1 << 16
"""The weights of linear layers count from so many numbers on: with fewer there is little to win."""


@dataclass(frozen=True)
class Linear:
    """``y = x Wᵀ``, with or without a bias: the gradient of ``W`` is ``δᵀ x``.

    Args:
        output: where ``δ`` passes, ``[N, out]``.
        x: ``[N, in]``.
        weight: ``[out, in]``.
    """

    output: GradientEdge
    x: Tensor
    weight: Tensor

    def kept(self) -> Tensor:
        """``x`` for later, when somebody may have changed it in place: a buffer that data come in, or a parameter."""
        return self.x.clone()

    def compares(self, count: int) -> bool:
        """Whether inner products of so many gradients take less arithmetic if the gradients are not made.

        Counted are ``x xᵀ`` and ``(x xᵀ) δ`` against ``δᵀ x`` for all but one. In float64 the former take twice the
        time on a CPU, and up to 32 times on other devices.
        """
        (n, inputs), outputs, slower = self.x.shape, len(self.weight), 2 if self.x.is_cpu else 32
        return slower * n * (inputs + count * outputs) <= (count - 1) * inputs * outputs

    def leads(self) -> bool:
        """Whether derivatives along the gradient take less arithmetic if it is not made: see :class:`Factors`.

        Counted for as many samples as here: ``(z xᵀ) δ`` against ``δᵀ x`` and ``z (δᵀ x)ᵀ``, of which it takes half.
        """
        (n, inputs), outputs = self.x.shape, len(self.weight)
        return self.x.dtype in (torch.float32, torch.float64) and 2 * n * (inputs + outputs) <= inputs * outputs


@dataclass(frozen=True)
class Factors:
    """A gradient ``δᵀ x`` of a linear layer's weight, which is not made unless it must be.

    Args:
        delta: ``[N, out]``.
        x: ``[N, in]``.
    """

    delta: Tensor
    x: Tensor

    @functools.cached_property
    def dense(self) -> Tensor:
        """``[out, in]``."""
        return self.delta.T @ self.x

    def along(self, z: Tensor) -> Tensor:
        """The derivative of ``z Wᵀ`` where ``W`` moves along it, ``[..., out]``, from ``z``, ``[..., in]``."""
        return z @ self.x.T @ self.delta


def made(gradient: Tensor | Factors) -> Tensor:
    """The gradient as one tensor."""
    return gradient.dense if isinstance(gradient, Factors) else gradient


def linear_layers(graph: Backward, inputs: Sequence[Tensor], wanted: Callable[[Linear], bool]) -> dict[int, Linear]:
    """The linear layers that are wanted, if their weight is among the inputs and has no other use in the graph."""
    found = {}
    for k, _, user in _used_once(graph, inputs, lambda p: p.ndim == 2 and p.numel() >= WIDE):
        layers = graph.users.get(user, [])  # of the transposed weight
        if user.name() != "TBackward0" or len(layers) != 1:
            continue
        for name, place, saved in (("AddmmBackward0", 2, "mat1"), ("MmBackward0", 1, "self")):
            node = layers[0]
            if (
                node.name() != name
                or node.next_functions[place][0] is not user
                or getattr(node, "_saved_alpha", 1) != 1
            ):
                continue
            x = _saved(node, saved)
            if x is not None and statistics_dtype(x.device) == torch.float64:
                layer = Linear(GradientEdge(node, 0), x, inputs[k])
                if wanted(layer):
                    found[k] = layer
    return found


def _used_once(
    graph: Backward, inputs: Sequence[Tensor], wanted: Callable[[Tensor], bool]
) -> Iterator[tuple[int, Node, Node]]:
    """The place of each leaf that is wanted and has one user in the graph, with its node and the user's."""
    places = {id(p): k for k, p in enumerate(inputs) if wanted(p) and p.is_leaf}
    for node, users in graph.users.items() if places else ():
        leaf = leaf_of(node)
        if id(leaf) in places and len(users) == 1:
            yield places[id(leaf)], node, users[0]


def _saved(node: Any, name: str) -> Tensor | None:
    """What the forward saved; ``None`` where it takes more than a look, as with activation checkpointing."""
    try:
        if getattr(getattr(node, f"_raw_saved_{name}"), "unpack_hook", None) is not None:
            return None
        x = getattr(node, f"_saved_{name}")
    except RuntimeError:  # it was freed, or changed in place: the backward will say so
        return None
    return x.detach() if type(x) in (Tensor, torch.nn.Parameter) and x.layout == torch.strided else None
