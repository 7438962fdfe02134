"""Features engine: gradients at the shared representation instead of the shared parameters."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


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
