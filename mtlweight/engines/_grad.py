"""``torch.autograd.grad``, with errors that say what to do, and an eye on compiled models."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.utils.hooks import RemovableHandle

from mtlweight._errors import MTLWeightError
from mtlweight._statistics import all_finite
from mtlweight.engines._graph import Backward, leaf_of

_REPEATABLE: WeakSet[type] = WeakSet()
"""Compiled backwards that were seen to run twice on one graph and to find the same."""
_DIFFERENCE = 0.01
"""Relative to a gradient's largest entry: more than rounding makes, less than what an overwritten tensor does."""
_FREED = (
    "The losses' graph was freed by an earlier backward or combine: expected a fresh graph, found a used one. Compute "
    "the losses again before each combine, or pass them as a callable. If something of your own goes back through the "
    "same graph, such as a term that you add to the scalar, call combine(..., retain_graph=True), or pass the term as "
    "penalty=... to the optimizer."
)
_DONATED = (
    "The backward of a compiled model overwrites what its forward saved ('donated buffers'), so that it cannot run "
    "more than once, as it must to measure gradients: expected torch._functorch.config.donated_buffer = False, found "
    "it set to True, or set after the model was compiled, or kernels of such a run in the cache. Set it before the "
    "model first runs (else call torch._dynamo.reset() too); if that was done, choose a new folder for the "
    "environment variable TORCHINDUCTOR_CACHE_DIR."
)
_CUDA_GRAPHS = (
    "A CUDA graph of a compiled model has overwritten its own earlier output: expected outputs to be kept until the "
    "step is taken, found mode='reduce-overhead' or another with CUDA graphs. Compile with mode='default' or "
    "'max-autotune-no-cudagraphs', or options={'triton.cudagraphs': False}."
)

_SPARSE = (
    "Sparse gradients have no vectorised backward: expected dense ones, found those of Embedding(sparse=True) or the "
    "like. Use engine='rows'."
)
_SELECTIVE = (
    "Selective activation checkpointing keeps what one ordinary backward needs, and measuring gradients takes several: "
    "expected checkpoint(..., use_reentrant=False) without context_fn, found one with "
    "create_selective_checkpoint_contexts. Leave context_fn out, or use a weighting that reads losses alone."
)
_CONDITION = (
    "torch.cond has neither a forward nor a second derivative, and needs its compiler for the first: expected losses "
    "without it, found some that use it. Use engine='rows', or an if in Python."
)
_REENTRANT = (
    "Reentrant activation checkpointing hides parameters from the graph: no gradient can be asked for. "
    "Expected checkpoint(..., use_reentrant=False), found use_reentrant=True. Change it."
)


def hidden(found: str) -> MTLWeightError:
    """The error for a function whose backward calls backward."""
    return MTLWeightError(
        "A function whose backward calls backward hides its parameters, so that their gradients cannot be measured: "
        f"expected measuring to leave every .grad alone, found {found}. Reversible layers and older activation "
        "checkpointing do so: use checkpoint(..., use_reentrant=False), or a weighting that reads losses alone."
    )


def explain(error: RuntimeError) -> None:
    """Raises what to do about an error of torch's that is known; returns for any other."""
    text = str(error)
    if "second time" in text or "freed" in text:
        raise MTLWeightError(_FREED) from error
    if "donated buffer" in text:
        raise MTLWeightError(_DONATED) from error
    if "CUDAGraphs that has been overwritten" in text:
        raise MTLWeightError(_CUDA_GRAPHS) from error
    if "use_reentrant=True" in text:
        raise MTLWeightError(_REENTRANT) from error
    if "called inside torch.vmap" in text:
        raise hidden("one that writes to it") from error
    if "selective activation checkpoint" in text or "during backward but not found in storage" in text:
        raise MTLWeightError(_SELECTIVE) from error
    if "'Sparse" in text and "backend" in text:
        raise MTLWeightError(_SPARSE) from error


def used_up(graph: Backward) -> None:
    """Lets a later backward through a graph that was freed say what to do: torch's own advice cannot help there."""
    for node in graph.nodes:
        if leaf_of(node) is None:
            node.register_prehook(_refuse)


def _refuse(_gradients: Sequence[Tensor]) -> None:
    raise MTLWeightError(_FREED)


@contextlib.contextmanager
def unhooked(inputs: Sequence[Tensor | GradientEdge]) -> Iterator[None]:
    """Within the context no hooks of leaves run, since they will on what the backward of the step brings the leaf."""
    hooks = [x._backward_hooks for x in inputs if isinstance(x, Tensor) and x.is_leaf and x._backward_hooks]
    kept = [dict(each) for each in hooks]
    for each in hooks:
        each.update(dict.fromkeys(each, _nothing))  # in place: autograd has a reference
    try:
        yield
    finally:
        for each, own in zip(hooks, kept, strict=True):
            each.update((key, own[key]) for key in own.keys() & each.keys())  # some may have been removed


@contextlib.contextmanager
def _watched(nodes: Iterable[Node]) -> Iterator[dict[Node, Tensor]]:
    """Within the context a backward that goes on from these nodes leaves the gradients that it brings to them.

    Torch answers for the edge to a node with what is before the hooks of its tensor, if the backward goes on from
    there, and with what is after them, if it ends there; then it leaves nothing here.
    """
    passed: dict[Node, Tensor] = {}

    def watch(node: Node) -> RemovableHandle:
        def before(gradients: tuple[Tensor, ...]) -> None:
            passed[node] = gradients[0]

        return node.register_prehook(before)

    handles = [watch(node) for node in {*nodes}]
    try:
        yield passed
    finally:
        for handle in handles:
            handle.remove()


def _nothing(_gradient: Tensor) -> None:
    """A hook that leaves the gradient as it is."""


def hooked(leaf: Tensor, gradient: Tensor) -> Tensor:
    """What the leaf's hooks make of its gradient."""
    for hook in (leaf._backward_hooks or {}).values():
        made = hook(gradient)
        gradient = gradient if made is None else made
    return gradient


def grad(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor | GradientEdge],
    cotangents: Sequence[Tensor] | None = None,
    *,
    retain_graph: bool = False,
    check: bool = True,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """The gradients, before any hooks of leaves; ``None`` for inputs that no output depends on.

    The first time that the backward of a compiled model keeps its graph, it runs twice, to see that it can: there are
    ways to compile it, without an error of torch's, so that the second run is wrong.

    Args:
        outputs: scalars, or tensors beside their cotangents.
        inputs: leaves, intermediate tensors, or where these would be in the graph.
        cotangents: gradients that come in.
        retain_graph: whether the graph is needed again.
        check: whether a compiled model may be in the graph.
        options: ``torch.autograd.grad``'s.

    Raises:
        MTLWeightError: in place of errors of torch's that have a known remedy; and if the two runs differ.
    """
    edges = {k: edge.node for k, edge in enumerate(inputs) if isinstance(edge, GradientEdge)}
    hooks = any(isinstance(x, Tensor) and x.is_leaf and x._backward_hooks for x in inputs)
    pull: Callable[..., tuple[Tensor | None, ...]] = functools.partial(
        torch.autograd.grad, outputs, inputs, cotangents, allow_unused=True, **options
    )

    def run() -> tuple[Tensor | None, ...]:
        if not edges and not hooks:
            return pull(retain_graph=retain_graph)
        with unhooked(inputs), _watched(edges.values()) as passed:
            found = pull(retain_graph=retain_graph)
        return tuple(passed.get(edges[k], g) if k in edges else g for k, g in enumerate(found))

    if not inputs:
        return ()
    try:
        found = run()
        fresh = Backward(outputs).compiled - {*_REPEATABLE} if retain_graph and check else None
        if fresh and all_finite([g for g in found if g is not None]):
            if not all(map(_same, found, run())):
                raise MTLWeightError(_DONATED)
            _REPEATABLE.update(fresh)
    except RuntimeError as error:
        explain(error)
        raise
    except TypeError as error:
        if any(node.name() == "CondAutogradOpBackward" for node in Backward(outputs).nodes):
            raise MTLWeightError(_CONDITION) from error
        raise
    return found


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return not a.numel() or bool((a - b).abs().max() <= _DIFFERENCE * a.abs().max())


@contextlib.contextmanager
def vectorized(engine: str, outputs: Sequence[Tensor]) -> Iterator[None]:
    """Within the context several backwards run as one, which compiled models refuse: then the error says so.

    Args:
        engine: its name, for the message.
        outputs: of the graph.
    """
    try:
        yield
    except RuntimeError as error:
        explain(error)
        if not Backward(outputs).compiled:
            raise
        raise MTLWeightError(
            f"engine={engine!r} runs several backwards at once: expected a model that torch can vectorise, found one "
            f"under torch.compile ({str(error).splitlines()[0]}). Use engine='rows', or do not compile the model."
        ) from error
