"""``torch.autograd.grad``, before hooks of leaves, with errors that say what to do, and an eye on compiled models."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight._statistics import all_finite
from mtlweight.autograd.graph import Graph
from mtlweight.autograd.half_precision import Gradients, unscaled
from mtlweight.autograd.remedies import DONATED, explain

_REPEATABLE: WeakSet[type] = WeakSet()
"""Compiled backwards that were seen to run twice on one graph and to find the same."""
_DIFFERENCE = 0.01
"""Relative to a gradient's largest entry: more than rounding makes, less than what an overwritten tensor does."""


def gradient(output: Tensor, inputs: Sequence[Tensor], *, graph: Graph, keep_graph: bool) -> Gradients:
    """The gradients of a scalar; in float32 where they pass through float16. Arguments are those of :func:`grad`."""

    def pull(scale: float, keep: bool) -> Gradients:
        cotangents = None if scale == 1.0 else [torch.full_like(output, scale)]
        return grad([output], inputs, cotangents, graph=graph, keep_graph=keep)

    return unscaled(pull, keep_graph) if graph.has_float16 else pull(1.0, keep_graph)


def grad(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None = None,
    *,
    graph: Graph,
    keep_graph: bool = False,
    **options: Any,
) -> Gradients:
    """The gradients, before any hooks of leaves; ``None`` for inputs that no output depends on.

    The first time that the backward of a compiled model keeps its graph, it runs twice, to see that it can: there are
    ways to compile it, without an error of torch's, so that the second run is wrong.

    Args:
        outputs: scalars, or tensors beside their cotangents.
        inputs: leaves or intermediate tensors.
        cotangents: gradients that come in.
        graph: that the outputs belong to.
        keep_graph: whether the graph is needed again.
        options: ``torch.autograd.grad``'s.

    Raises:
        MTLWeightError: in place of errors of torch's that have a known remedy; and if the two runs differ.
    """

    def pull() -> Gradients:
        with unhooked(inputs):
            return torch.autograd.grad(
                outputs, inputs, cotangents, retain_graph=keep_graph, allow_unused=True, **options
            )

    if not inputs:
        return ()
    try:
        found = pull()
        untried = graph.compiled - {*_REPEATABLE} if keep_graph else None
        if untried and all_finite([g for g in found if g is not None]):
            if not all(map(_same, found, pull())):
                raise MTLWeightError(DONATED)
            _REPEATABLE.update(untried)
    except (RuntimeError, TypeError) as error:
        explain(error, graph)
        raise
    return found


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return not a.numel() or bool((a - b).abs().max() <= _DIFFERENCE * a.abs().max())


@contextlib.contextmanager
def unhooked(inputs: Sequence[Tensor]) -> Iterator[None]:
    """Within the context no hooks of leaves run: they will, on what the backward of the step brings the leaf."""
    hooks = [x._backward_hooks for x in inputs if x.is_leaf and x._backward_hooks]
    kept = [dict(each) for each in hooks]
    for each in hooks:
        each.update(dict.fromkeys(each, _nothing))  # in place: autograd has a reference
    try:
        yield
    finally:
        for each, own in zip(hooks, kept, strict=True):
            each.update((key, own[key]) for key in own.keys() & each.keys())  # some may have been removed


def _nothing(_gradient: Tensor) -> None:
    """A hook that leaves the gradient as it is."""


def hooked(leaf: Tensor, gradient: Tensor) -> Tensor:
    """What the leaf's hooks make of its gradient."""
    for hook in (leaf._backward_hooks or {}).values():
        changed = hook(gradient)
        gradient = gradient if changed is None else changed
    return gradient


@contextlib.contextmanager
def vectorized(engine: str, graph: Graph) -> Iterator[None]:
    """Within the context several backwards run as one. Compiled models refuse that: then the error says so.

    Args:
        engine: its name, for the message.
        graph: that the backwards pass.
    """
    try:
        yield
    except RuntimeError as error:
        explain(error)
        if not graph.compiled:
            raise
        raise MTLWeightError(
            f"engine={engine!r} runs several backwards at once: expected a model that torch can vectorise, found one "
            f"under torch.compile ({str(error).splitlines()[0]}). Use engine='rows', or do not compile the model."
        ) from error
