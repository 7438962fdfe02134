"""Whether what an engine measured is what an ordinary backward says.

Code that a compiler has replaced, a derivative written by hand, or a rule of torch's own may lose or change derivatives
in forward mode, of second order, or of a vectorised backward, without a word, and have the right ones in an ordinary
backward. So a combination is taken of the losses, for one backward, and the same one of what was measured. Its
coefficients have random signs and sizes: errors do not cancel, and no loss hides behind the sum of the others.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mtlweight._statistics import statistics_dtype
from mtlweight.autograd.gradients import gradient
from mtlweight.autograd.graph import Graph
from mtlweight.autograd.half_precision import dense, wide
from mtlweight.engines.jacobian import Rows

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
"""How far a result may be from a backward's, by the least precise dtype that gradients pass through.

Relative to the sum of the sizes of the terms that were added up: the alignments in the combination, and the products of
the entries of its gradient with the reference's. Without the latter, what cancels would look like an error. Rounding
alone made at most 7e-16, 4e-7, 7e-4 and 7e-3, by every engine, while networks were trained: small ones of each common
layer, a residual one, deep and wide perceptrons, recurrent ones and a transformer, up to 5 million parameters.
"""
TINY = 1e-30
"""Instead of zero, where something is divided by it."""
_TF32 = 0.02
"""The same for float32 on a GPU that may multiply in TF32, which has the digits of float16."""


class DisagreesError(RuntimeError):
    """An engine's derivatives are not those of a backward."""

    def __init__(self) -> None:
        super().__init__("its derivatives are not those of a backward")


def expect_same_alignments(
    graph: Graph, inputs: Sequence[Tensor], tangents: Sequence[Tensor], found: Sequence[Tensor], seed: int
) -> None:
    """Raises unless a random combination of the alignments is the alignment of the same combination of the losses."""
    device, least = graph.outputs[0].device, _least(graph, inputs) * _norm(tangents)
    dtype = statistics_dtype(device)
    terms, values = [], []
    mixes = coefficients(sum(loss.numel() for loss in graph.outputs), seed).to(device, dtype)
    for mix, loss, given in zip(mixes.split([x.numel() for x in graph.outputs]), graph.outputs, found, strict=True):
        fine = given.isfinite() & loss.detach().isfinite()
        value = given[fine].to(device, dtype)
        c = mix.view(fine.shape)[fine] / max(_largest(value), least * _largest(loss.detach()[fine]), TINY)
        terms.append((c.to(loss.device, loss.dtype) * wide(loss[fine])).sum().to(device))
        values.append(c * value)
    ordinary = gradient(torch.stack(terms).sum(), inputs, graph=graph, keep_graph=True)
    products = [wide(dense(g)) * wide(v) for g, v in zip(ordinary, tangents, strict=True) if g is not None]
    difference = float(torch.cat(values).sum()) - sum(float(product.sum(dtype=dtype)) for product in products)
    size = sum(float(each.abs().sum(dtype=dtype)) for each in (*values, *products))
    if abs(difference) > tolerance(graph) * size:  # what is not finite passes: it is for others to judge
        raise DisagreesError


def expect_same_rows(graph: Graph, inputs: Sequence[Tensor], found: Rows, seed: int) -> None:
    """Raises unless a random combination of the rows is the gradient of the same combination of the outputs."""
    mixes, least = coefficients(len(graph.outputs), seed).tolist(), _least(graph, inputs)
    terms, size, total = [], 0.0, dict[Tensor, Tensor]()
    for t, (mix, output) in enumerate(zip(mixes, graph.outputs, strict=True)):
        row = found.parts(t)
        length = _norm(row.values())
        c = mix / max(length, least * _largest(output.detach()), TINY)
        terms.append((c * output).to(graph.outputs[0].device))
        size += abs(c) * length
        for p, g in row.items():
            total[p] = c * g if p not in total else total[p] + c * g
    ordinary = gradient(torch.stack(terms).sum(), inputs, graph=graph, keep_graph=True)
    for p, own in zip(inputs, ordinary, strict=True):
        if own is not None:
            expected = wide(dense(own)).to(p.device)
            total[p] = total[p] - expected if p in total else -expected
            size += float(torch.linalg.vector_norm(expected))
    if _norm(total.values()) > tolerance(graph) * size:
        raise DisagreesError


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.hypot(*[float(torch.linalg.vector_norm(wide(tensor))) for tensor in tensors])


def _least(graph: Graph, inputs: Sequence[Tensor]) -> float:
    """How long a gradient is at least, relative to its loss, that is no more than rounding.

    Tasks count by what was found for them, so that none hides behind a larger one; but not one with a constant loss.
    """
    rounding = max(torch.finfo(dtype).eps for dtype in graph.dtypes)
    return 10 * rounding / tolerance(graph) / max(_norm(x.detach() for x in inputs), TINY)


def coefficients(count: int, seed: int) -> Tensor:
    """Numbers of random sign whose size is between a half and one; torch's random state is left alone."""
    generator = torch.Generator().manual_seed(seed)
    sizes, signs = torch.rand(2, count, generator=generator, dtype=torch.float64, device="cpu").unbind()
    return (1 + sizes) / 2 * torch.where(signs < 0.5, -1.0, 1.0)


def tolerance(graph: Graph) -> float:
    """How far rounding may take the results of a graph apart, relative to the sizes of what they are made of."""
    found = max(TOLERANCES.get(dtype, 1.0) for dtype in graph.dtypes)
    tf32 = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    short = tf32 and torch.float32 in graph.dtypes and any(output.is_cuda for output in graph.outputs)
    return max(found, _TF32) if short else found
