"""Measures with the engine that was asked for, as far as ordinary backwards bear it out; else with these."""

from collections.abc import Sequence

from torch import Tensor

from mtlweight._statistics import all_finite
from mtlweight.autograd.graph import Graph
from mtlweight.autograd.half_precision import restored, unit
from mtlweight.engines import ALIGNMENTS, GRADIENTS, ORDINARY, forward, rows
from mtlweight.engines.confirm import DisagreesError, expect_same_alignments, expect_same_rows
from mtlweight.engines.jacobian import Rows
from mtlweight.engines.totals import Totals
from mtlweight.engines.trust import Trust

NOT_FINITE = "its derivatives are not finite where those of a backward are"


def jacobian(
    engine: str, totals: Totals, inputs: list[Tensor], rest: list[Tensor], trust: Trust, *, whole: bool, keep: bool
) -> Rows:
    """The rows of the Jacobian over the inputs, with the gradients of the rest.

    Args:
        engine: one of ``GRADIENTS``.
        totals: the tasks'.
        inputs: what the columns belong to.
        rest: other leaves.
        trust: counts uses, and takes warnings.
        whole: whether the matrix itself is needed.
        keep: whether the graph is needed again.
    """
    graph, every = totals.graph, [*inputs, *rest]

    def collected(engine: str) -> Rows:
        keep_graph = keep or engine not in ORDINARY  # which confirming and falling back may need
        gradients = GRADIENTS[engine](totals, every, keep_graph=keep_graph)
        return Rows.collect(gradients, len(graph.outputs), inputs, rest, whole=whole)

    def measured() -> tuple[str, Rows]:
        if engine in ORDINARY:
            return engine, collected(engine)
        cause = trust.broken.get(engine)
        try:
            if cause is None:
                found, due = collected(engine), trust.is_due(engine, graph.operators)
                if not all(finite := found.finite):
                    ordinary = collected("rows")
                    if ordinary.finite != finite:
                        trust.warn(engine, NOT_FINITE)
                        return "rows", ordinary
                elif due:
                    expect_same_rows(graph, every, found, trust.uses[engine])
                    trust.confirmed(engine, graph.operators)
                return engine, found
        except DisagreesError as error:
            cause = str(error)
        trust.warn(engine, cause)
        return "rows", collected("rows")

    ran, found = measured()
    trust.ran.append(ran)
    found.rounding = graph.rounding
    return found


def alignments(
    engine: str,
    losses: Sequence[Tensor],
    inputs: Sequence[Tensor],
    tangents: Sequence[Tensor],
    trust: Trust,
    *,
    has_float16: bool,
) -> list[Tensor]:
    """``<∇ℓ[t, i], g>``, one tensor a task, of losses that are computed already. Their graph is kept.

    The first arguments are those of ``ALIGNMENTS``. ``has_float16`` says whether ``g`` passed through float16.
    """
    graph, size = Graph(losses), 1.0
    if has_float16 or graph.has_float16:
        tangents, size = unit(tangents)

    def measured() -> tuple[list[str], list[Tensor]]:
        if engine == "rows":
            return [engine], rows.alignments(losses, inputs, tangents)
        cause = trust.broken.get(engine)
        try:
            if cause is None:
                found, filled = judged(
                    engine, graph, inputs, tangents, ALIGNMENTS[engine](losses, inputs, tangents), trust
                )
                return [engine, "rows"] if filled else [engine], found
        except RuntimeError as error:
            if engine == "samples" and not isinstance(error, DisagreesError):
                raise
            cause = forward.cause(error)
        trust.warn(engine, cause)
        return ["rows"], rows.alignments(losses, inputs, tangents)

    ran, found = measured()
    trust.ran.extend(ran)
    return [restored(values, size) for values in found]


def judged(
    engine: str,
    graph: Graph,
    inputs: Sequence[Tensor],
    tangents: Sequence[Tensor],
    found: Sequence[Tensor],
    trust: Trust,
) -> tuple[list[Tensor], bool]:
    """The alignments that an engine found, as far as an ordinary backward bears them out. It keeps the graph.

    Where they are not finite and a loss is, each is asked for by a backward of its own: whether some are comes second.

    Raises:
        DisagreesError: if the others are not those of a backward.
    """
    due, filled = trust.is_due(engine, graph.operators), False
    if not all_finite(found := list(found)) and all_finite(list(tangents)):
        found, filled = _filled(graph.outputs, inputs, tangents, found)
    if due:
        expect_same_alignments(graph, inputs, tangents, found, trust.uses[engine])
        trust.confirmed(engine, graph.operators)
    if filled:
        trust.warn(engine, NOT_FINITE, wholly=engine == "forward")  # the next one may have a derivative there
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
    ordinary = rows.alignments([losses[t].reshape(-1)[i] for t, i in places], inputs, tangents)
    found = [values.clone() for values in found]
    for (t, i), value in zip(places, ordinary, strict=True):
        found[t].view(-1)[i] = value.detach()
    return found, any(bool(value.isfinite()) for value in ordinary)
