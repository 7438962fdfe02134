"""Errors of torch's autograd that have a known remedy, and the errors that name it."""

from collections.abc import Sequence

from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight.autograd.graph import Graph, leaf_of

FREED = (
    "The losses' graph was freed by an earlier backward or combine: expected a fresh graph, found a used one. Compute "
    "the losses again before each combine, or pass them as a callable. If something of your own goes back through the "
    "same graph, such as a term that you add to the scalar, call combine(..., retain_graph=True), or pass the term as "
    "penalty=... to the optimizer."
)
DONATED = (
    "The backward of a compiled model overwrites what its forward saved ('donated buffers'), so that it cannot run "
    "more than once, as it must to measure gradients: expected torch._functorch.config.donated_buffer = False, found "
    "it set to True, or set after the model was compiled, or kernels of such a run in the cache. Set it before the "
    "model first runs (else call torch._dynamo.reset() too); if that was done, choose a new folder for the "
    "environment variable TORCHINDUCTOR_CACHE_DIR."
)
CUDA_GRAPHS = (
    "A CUDA graph of a compiled model has overwritten its own earlier output: expected outputs to be kept until the "
    "step is taken, found mode='reduce-overhead' or another with CUDA graphs. Compile with mode='default' or "
    "'max-autotune-no-cudagraphs', or options={'triton.cudagraphs': False}."
)
SPARSE = (
    "Sparse gradients have no vectorised backward: expected dense ones, found those of Embedding(sparse=True) or the "
    "like. Use engine='rows'."
)
SELECTIVE = (
    "Selective activation checkpointing keeps what one ordinary backward needs, and measuring gradients takes several: "
    "expected checkpoint(..., use_reentrant=False) without context_fn, found one with "
    "create_selective_checkpoint_contexts. Leave context_fn out, or use a weighting that reads losses alone."
)
CONDITION = (
    "torch.cond has neither a forward nor a second derivative, and needs its compiler for the first: expected losses "
    "without it, found some that use it. Use engine='rows', or an if in Python."
)
REENTRANT = (
    "Reentrant activation checkpointing hides parameters from the graph: no gradient can be asked for. "
    "Expected checkpoint(..., use_reentrant=False), found use_reentrant=True. Change it."
)
HIDDEN = (
    "A function whose backward calls backward hides its parameters, so that their gradients cannot be measured: "
    "expected measuring to leave every .grad alone, found {}. Reversible layers and older activation "
    "checkpointing do so: use checkpoint(..., use_reentrant=False), or a weighting that reads losses alone."
)
KNOWN = {
    "second time": FREED,
    "freed": FREED,
    "donated buffer": DONATED,
    "CUDAGraphs that has been overwritten": CUDA_GRAPHS,
    "use_reentrant=True": REENTRANT,
    "called inside torch.vmap": HIDDEN.format("one that writes to it"),
    "selective activation checkpoint": SELECTIVE,
    "during backward but not found in storage": SELECTIVE,
}
"""By words of torch's message."""


def explain(error: Exception, graph: Graph | None = None) -> None:
    """Raises what to do about an error of torch's that is known; returns for any other.

    Args:
        error: torch's.
        graph: that the backward passed.
    """
    text = str(error)
    remedy = next((remedy for words, remedy in KNOWN.items() if words in text), None)
    if "'Sparse" in text and "backend" in text:
        remedy = SPARSE
    if isinstance(error, TypeError):
        conditional = graph is not None and any(node.name() == "CondAutogradOpBackward" for node in graph.nodes)
        remedy = CONDITION if conditional else None
    if remedy is not None:
        raise MTLWeightError(remedy) from error


def mark_freed(graph: Graph) -> None:
    """Lets a later backward through a graph that was freed say what to do: torch's own advice cannot help there."""
    for node in graph.nodes:
        if leaf_of(node) is None:
            node.register_prehook(_refuse)


def _refuse(_gradients: Sequence[Tensor]) -> None:
    raise MTLWeightError(FREED)
