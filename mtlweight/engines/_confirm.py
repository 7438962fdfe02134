"""Whether what an engine measured is what an ordinary backward says.

Code that a compiler has replaced, a derivative written by hand, or a rule of torch's own may lose or change derivatives
in forward mode, of second order, or of a vectorised backward, without a word, and have the right ones in an ordinary
backward. So a combination is taken of the losses, for one backward, and the same one of what was measured. Its
coefficients have random signs and sizes: errors do not cancel, and no loss hides behind the sum of the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mtlweight._statistics import all_finite, statistics_dtype
from mtlweight.engines import rows
from mtlweight.engines._graph import Backward
from mtlweight.engines._layers import Factors, made
from mtlweight.engines._range import dense, wide

if TYPE_CHECKING:
    from mtlweight.engines._plan import Plan
    from mtlweight.engines._rows import Rows

NOT_FINITE = "its derivatives are not finite where those of a backward are"
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
SUSPECT = {
    "forward": ("reduce=prod", "reduce=amax", "reduce=amin"),  # scatter_reduce: none of prod, wrong at ties
    "pullback": ("scale_grad_by_freq=True",),  # of an embedding: as if it were False
    "samples": ("CdistBackward",),
}
"""Operators whose derivative an engine has wrong for some values: it is confirmed each time."""


class DisagreesError(RuntimeError):
    """An engine's derivatives are not those of a backward."""

    def __init__(self) -> None:
        super().__init__("its derivatives are not those of a backward")


def due(uses: int) -> bool:
    """Whether to confirm: at the 1st, 2nd, 4th, 8th, ... use, since compilers may step in after some uses."""
    return uses & (uses - 1) == 0


def suspect(engine: str, operators: set[str]) -> bool:
    """Whether there are operators of which the engine is not to be believed, however often it was confirmed."""
    return any(mark in operator for mark in SUSPECT.get(engine, ()) for operator in operators)


def judged(
    plan: Plan,
    engine: str,
    losses: Sequence[Tensor],
    inputs: Sequence[Tensor],
    tangents: Sequence[Tensor | Factors],
    found: Sequence[Tensor],
) -> tuple[list[Tensor], bool]:
    """The alignments that an engine found, as far as an ordinary backward bears them out. It keeps the graph.

    Where they are not finite and a loss is, each is asked for by a backward of its own.

    Args:
        plan: counts the uses of the engine, and takes its warning.
        engine: its name.
        losses: one ``[b]`` or scalar tensor a task.
        inputs: parameters.
        tangents: ``g``, one a parameter.
        found: ``<∇ℓ[t, i], g>``, one tensor a task.

    Returns:
        tuple: the alignments, and whether some are by a backward of their own.

    Raises:
        DisagreesError: if the others are not those of a backward.
    """
    graph, filled = Backward(losses), False
    confirm = plan.confirm(engine, graph.operators)
    if not all_finite(found := list(found)):
        gradient = [made(g) for g in tangents]
        found, filled = _filled(losses, inputs, gradient, found) if all_finite(gradient) else (found, False)
    if confirm:
        _expect_same(graph, inputs, [made(g) for g in tangents], found, plan.uses[engine])
        plan.trust(engine, graph.operators)
    if filled:
        plan.warn(engine, NOT_FINITE, wholly=engine == "forward")  # the next one may have a derivative there
    return found, filled


def _filled(
    losses: Sequence[Tensor], inputs: Sequence[Tensor], tangents: Sequence[Tensor], found: list[Tensor]
) -> tuple[list[Tensor], bool]:
    """With ordinary alignments in the place of those that are not finite; and whether any of these is finite."""
    places = [
        (t, i)
        for t, (values, loss) in enumerate(zip(found, losses, strict=True))
        for i in (~values.isfinite() & loss.detach().isfinite()).reshape(-1).nonzero().flatten().tolist()
    ]
    if not places:
        return found, False
    ordinary = rows.alignment([losses[t].reshape(-1)[i] for t, i in places], inputs, tangents)
    found = [values.clone() for values in found]
    for (t, i), value in zip(places, ordinary.detach(), strict=True):
        found[t].view(-1)[i] = value
    return found, bool(ordinary.isfinite().any())


def _expect_same(
    graph: Backward, inputs: Sequence[Tensor], tangents: Sequence[Tensor], found: Sequence[Tensor], seed: int
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
    (gradient,) = rows.gradients(Backward([torch.stack(terms).sum()]), inputs, keep_graph=True)
    products = [wide(dense(g)) * wide(tangents[k]) for k, g in gradient.items()]
    difference = float(torch.cat(values).sum()) - sum(float(product.sum(dtype=dtype)) for product in products)
    size = sum(float(each.abs().sum(dtype=dtype)) for each in (*values, *products))
    if abs(difference) > tolerance(graph) * size:  # what is not finite passes: it is for others to judge
        raise DisagreesError


def expect_same_rows(graph: Backward, found: Rows, inputs: Sequence[Tensor], seed: int) -> None:
    """Raises unless a random combination of the rows is the gradient of the same combination of the outputs.

    Args:
        graph: of the outputs; it is kept.
        found: their gradients.
        inputs: with respect to which.
        seed: of the coefficients.
    """
    mixes, least = coefficients(len(graph.outputs), seed).tolist(), _least(graph, inputs)
    terms, size, total = [], 0.0, dict[Tensor, Tensor]()
    for mix, output, row in zip(mixes, graph.outputs, found.parts(), strict=True):
        length = _norm(row.values())
        c = mix / max(length, least * _largest(output.detach()), TINY)
        terms.append((c * output).to(graph.outputs[0].device))
        size += abs(c) * length
        for p, g in row.items():
            total[p] = c * g if p not in total else total[p] + c * g
    (gradient,) = rows.gradients(Backward([torch.stack(terms).sum()]), inputs, keep_graph=True)
    for k, g in gradient.items():
        expected = wide(dense(g)).to(inputs[k].device)
        total[inputs[k]] = total[inputs[k]] - expected if inputs[k] in total else -expected
        size += float(torch.linalg.vector_norm(expected))
    if _norm(total.values()) > tolerance(graph) * size:
        raise DisagreesError


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _norm(tensors: Iterable[Tensor]) -> float:
    each = [float(torch.linalg.vector_norm(wide(tensor))) for tensor in tensors]
    return math.hypot(*each)


def _least(graph: Backward, inputs: Sequence[Tensor]) -> float:
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


def tolerance(graph: Backward) -> float:
    """How far rounding may take the results of a graph apart, relative to the sizes of what they are made of."""
    found = max(TOLERANCES.get(dtype, 1.0) for dtype in graph.dtypes)
    tf32 = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    short = tf32 and torch.float32 in graph.dtypes and any(output.is_cuda for output in graph.outputs)
    return max(found, _TF32) if short else found
