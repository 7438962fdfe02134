"""From what the user gave as losses to a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight._view import Needs
from mtlweight.engines import forward
from mtlweight.engines._batch import Batch
from mtlweight.engines._confirm import judged
from mtlweight.engines._graph import Backward
from mtlweight.engines._plan import Plan
from mtlweight.engines._range import restored, unit
from mtlweight.engines._reference import Reference, main_scope


def evaluated(losses: Any, known: Callable[[], Reference] | None, plan: Plan) -> Batch:
    """The losses as a batch; with their alignments, if the forward engine can give them in the same pass.

    Args:
        losses: mapping, tensor, or callable that returns one of these.
        known: the reference's gradient, computed once, if there is a reference.
        plan: how to measure.
    """
    if not callable(losses) or isinstance(losses, Tensor):
        if plan.engine == "forward":
            raise MTLWeightError(
                "engine='forward' runs the forward pass itself: expected losses as a callable, found computed ones. "
                "Pass combine(lambda: losses(model, batch), ...), or use engine='pullback'."
            )
        return Batch(plan.named(losses), plan, known)
    if plan.capture is not None:
        plan.capture.clear()
    if known is None or Needs.ALIGNMENT not in plan.needs or plan.alignment_engine not in ("auto", "forward"):
        return Batch(plan.named(losses()), plan, known)
    parameters = known().parameters
    tangents, size = unit(known().tangents) if known().narrow else (known().terms, 1.0)
    names = forward.names(plan.modules)
    if any(id(p) not in names for p in parameters):
        if plan.engine == "forward":
            raise MTLWeightError(
                "engine='forward' swaps the parameters of modules: expected model=... (or shared=... as modules) to "
                "hold all parameters in scope, found some elsewhere. Pass model=... to MultiTaskOptimizer."
            )
        return Batch(plan.named(losses()), plan, known)
    if "forward" in plan.broken:
        plan.warn("forward", plan.broken["forward"])
        return Batch(plan.named(losses()), plan, known)
    engines = ["forward"]

    def judge(present: dict[str, Tensor], aligned: dict[str, Tensor]) -> dict[str, Tensor]:
        if not present:
            return aligned
        with plan.measuring():
            each, filled = judged(plan, "forward", [*present.values()], parameters, tangents, [*aligned.values()])
        engines.extend(["rows"] if filled else [])
        return dict(zip(present, each, strict=True))

    try:
        present, aligned = forward.losses_and_tangents(
            losses, plan.named, plan.modules, names, parameters, tangents, judge
        )
    except Exception as error:  # a `jvp` may raise anything
        # An error of the user's own is raised here again, as it is.
        batch = Batch(plan.named(losses()), plan, known)
        plan.warn("forward", forward.cause(error))
        return batch
    if plan.use is not None and plan.use.scope == "main":
        outside = {id(p) for p in parameters} - {id(parameters[k]) for k in main_scope(plan, present, parameters)}
        if any(id(p) in outside for p in Backward(present.values()).leaves):
            plan.warn("forward", "the reference reaches heads of other tasks, which scope='main' leaves out")
            return Batch(present, plan, known)
    plan.used += engines
    return Batch(present, plan, known, {task: restored(values, size) for task, values in aligned.items()})
