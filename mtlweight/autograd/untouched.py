"""Backwards that measure, and leave nothing behind."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from mtlweight._errors import MTLWeightError
from mtlweight.autograd.remedies import HIDDEN


@contextlib.contextmanager
def untouched(parameters: Sequence[Tensor], called: Callable[[Tensor], str]) -> Iterator[None]:
    """Within the context backwards run for what they find: afterwards gradients and buffers are as they were.

    A function whose backward calls ``backward`` itself adds to ``.grad`` of parameters that are not in the graph, whose
    gradients nobody can ask for. Activation checkpointing runs modules once more in each backward, and with them what
    keeps running statistics.

    Raises:
        MTLWeightError: if one of the parameters was written; ``called`` says what to call it.
    """
    before = [(p, p.grad) for p in parameters if p.grad is not None]
    for p, _ in before:
        p.grad = None
    try:
        with _buffers():
            yield
    finally:
        written = [p for p in parameters if p.grad is not None]
        for p in written:
            p.grad = None
        for p, gradient in before:
            p.grad = gradient
        if written:
            raise MTLWeightError(HIDDEN.format(f"that it wrote to that of {called(written[0])}"))


@contextlib.contextmanager
def _buffers() -> Iterator[None]:
    """Afterwards buffers are as they were: a module's are copied when it first runs, and mostly none does."""
    seen: set[nn.Module] = set()
    kept: list[tuple[nn.Module, str, Tensor, Tensor]] = []

    def keep(module: nn.Module, _inputs: Any) -> None:
        owners = set() if module in seen else {*module.modules()} - seen
        seen.update(owners)
        kept.extend((owner, name, b, b.clone()) for owner in owners for name, b in owner.named_buffers(recurse=False))

    handle = register_module_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()
        with torch.no_grad():
            for owner, name, buffer, value in kept:
                buffer.data.copy_(value)  # not a change in the eyes of a graph that has saved it
                setattr(owner, name, buffer)  # the module may have put another tensor in its place
