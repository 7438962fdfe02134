"""From the user's losses to losses with their graph; with their alignments, if the forward pass can give them."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight.autograd.forward_mode import names
from mtlweight.autograd.graph import Graph
from mtlweight.autograd.half_precision import restored, unit
from mtlweight.batch.reference import Reference
from mtlweight.batch.step import Step
from mtlweight.batch.whole import Whole
from mtlweight.engines import forward
from mtlweight.engines.measure import judged


def evaluated(losses: Any, reference: Callable[[], Reference] | None, step: Step) -> Whole:
    """The losses; with their alignments, if the forward engine can give them in the same pass."""
    settings, trust = step.settings, step.draft.trust
    deferred = callable(losses) and not isinstance(losses, Tensor)
    if not deferred and settings.engine == "forward":
        raise MTLWeightError(
            "engine='forward' runs the forward pass itself: expected losses as a callable, found computed ones. "
            "Pass combine(lambda: losses(model, batch), ...), or use engine='pullback'."
        )
    if deferred and settings.capture is not None:
        settings.capture.clear()

    def plain(found: dict[str, Tensor] | None = None, aligned: dict[str, Tensor] | None = None) -> Whole:
        present = step.named(losses() if deferred else losses) if found is None else found
        points = [] if settings.capture is None else settings.capture.take()
        return Whole(present, step, reference, aligned, points=points)

    compares = reference is not None and step.compares and settings.alignment_engine in ("auto", "forward")
    if not deferred or not compares:
        return plain()
    assert reference is not None
    known = names(settings.modules)
    if any(id(p) not in known for p in reference().parameters):
        if settings.engine == "forward":
            raise MTLWeightError(
                "engine='forward' swaps the parameters of modules: expected model=... (or shared=... as modules) to "
                "hold all parameters in scope, found some elsewhere. Pass model=... to MultiTaskOptimizer."
            )
        return plain()
    if "forward" in trust.broken:
        trust.warn("forward", trust.broken["forward"])
        return plain()
    parameters, tangents, size = reference().parameters, reference().tangents, 1.0
    if reference().has_float16:
        tangents, size = unit(tangents)
    ran = ["forward"]

    def judge(present: dict[str, Tensor], aligned: dict[str, Tensor]) -> dict[str, Tensor]:
        if not present:
            return aligned
        with step.measuring():
            each, filled = judged("forward", Graph(present.values()), parameters, tangents, [*aligned.values()], trust)
        ran.extend(["rows"] if filled else [])
        return dict(zip(present, each, strict=True))

    try:
        present, aligned = forward.losses_and_alignments(
            losses, step.named, settings.modules, known, parameters, tangents, judge
        )
    except Exception as error:  # a `jvp` may raise anything
        found = plain()  # an error of the user's own is raised here again, as it is
        trust.warn("forward", forward.cause(error))
        return found
    inside = {id(p) for p in reference().scope(present)[0]}
    outside = {id(p) for p in parameters} - inside
    if outside and any(id(p) in outside for p in Graph(present.values()).leaves):
        trust.warn("forward", "the reference reaches heads of other tasks, which scope='main' leaves out")
        return plain(present)
    trust.ran.extend(ran)
    return plain(present, {task: restored(values, size) for task, values in aligned.items()})
