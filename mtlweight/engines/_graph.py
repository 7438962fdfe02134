"""Questions to an autograd graph."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def leaves(outputs: Iterable[Tensor]) -> list[Tensor]:
    """The leaf tensors whose ``.grad`` a backward from ``outputs`` would write, in a stable order."""
    found: dict[int, Tensor] = {}
    seen = set()
    stack = []
    for output in outputs:
        if output.grad_fn is not None:
            stack.append(output.grad_fn)
        elif output.requires_grad:
            found[id(output)] = output
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # AccumulateGrad alone has one
        if leaf is not None:
            found[id(leaf)] = leaf
        stack.extend(parent for parent, _ in node.next_functions if parent is not None)
    return list(found.values())
