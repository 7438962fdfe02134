"""Layers whose weight's gradient is a product: found in the graph, so that an engine may take it by other ways.

A backward then stops at such a layer's output and hands over the gradient there, ``δ``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from mtlweight._statistics import statistics_dtype
from mtlweight.engines._graph import Backward, leaf_of

WIDE = 1 << 16
"""The weights of linear layers count from so many numbers on: with fewer there is little to win."""
PATCHES = 1 << 23
"""Numbers in the patches of images: with more they would take a good part of a step's memory."""


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


class GrayConvolution:
    """A convolution of images with one channel, on the CPU.

    Its kernels are made for many channels. The gradient of the weight is the product of ``δ`` with all patches of the
    images, which takes less time, and the patches are the same for every ``δ``.

    Args:
        x: ``[b, 1, H, W]``.
        weight: ``[out, 1, h, w]``.
        stride: of rows and of columns.
        padding: likewise.
    """

    def __init__(self, x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> None:
        self._x, self._weight, self._stride, self._padding = x, weight, stride, padding

    @functools.cached_property
    def _patches(self) -> Tensor:
        """``[h w, b H' W']``."""
        (h, w), (rows, columns) = self._weight.shape[2:], self._padding
        image = torch.nn.functional.pad(self._x[:, 0], (columns, columns, rows, rows))
        windows = image.unfold(1, h, self._stride[0]).unfold(2, w, self._stride[1])
        return windows.permute(3, 4, 0, 1, 2).reshape(h * w, -1)

    @property
    def fits(self) -> bool:
        """Whether the patches take little memory."""
        sizes = zip(self._x.shape[2:], self._weight.shape[2:], self._stride, self._padding, strict=True)
        places = [(size + 2 * padding - window) // stride + 1 for size, window, stride, padding in sizes]
        return len(self._x) * math.prod(places) * self._weight[0].numel() <= PATCHES

    def weight_gradient(self, delta: Tensor) -> Tensor:
        """That of the weight, from ``δ``, ``[b, out, H', W']``."""
        flat = delta.transpose(0, 1).reshape(len(self._weight), -1)
        return (flat @ self._patches.T.to(flat.dtype)).view(self._weight.shape)

    def bias_gradient(self, delta: Tensor) -> Tensor:
        """That of the bias: the kernel that makes it makes the weight's, too."""
        return delta.sum(dim=(0, 2, 3))


Stops = Mapping[int, tuple[GradientEdge, Callable[[Tensor], Tensor]]]
"""By the place of an input: where the backward may stop, and what makes the input's gradient of the one there."""


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


def gray_convolutions(graph: Backward, inputs: Sequence[Tensor]) -> Stops:
    """The weights and biases of convolutions of images with one channel, on the CPU."""
    found: dict[int, tuple[GradientEdge, Callable[[Tensor], Tensor]]] = {}
    for k, leaf, user in _used_once(graph, inputs, lambda p: p.ndim == 4 and p.shape[1] == 1 and p.is_cpu):
        if user.name() != "ConvolutionBackward0" or user.next_functions[1][0] is not leaf:
            continue
        node: Any = user
        plain = not node._saved_transposed and node._saved_groups == 1 and set(node._saved_dilation) == {1}
        x = _saved(node, "input") if plain else None
        if x is None or x.dtype not in (torch.float32, torch.float64):
            continue
        layer, edge = GrayConvolution(x, inputs[k], node._saved_stride, node._saved_padding), GradientEdge(node, 0)
        summed = node.next_functions[2][0]
        biases = [] if summed is None else [j for j, p in enumerate(inputs) if p is leaf_of(summed)]
        if layer.fits and (summed is None or (biases and len(graph.users[summed]) == 1)):
            found[k] = edge, layer.weight_gradient
            found.update((j, (edge, layer.bias_gradient)) for j in biases)
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
