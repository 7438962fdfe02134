"""From what the user passed to ``combine`` to a batch, one step ahead where a weighting looks there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight._statistics import all_finite
from mtlweight._view import Needs
from mtlweight.engines import _ahead, _losses
from mtlweight.engines._again import as_written, snapshot
from mtlweight.engines._batch import Batch
from mtlweight.engines._evaluate import evaluated
from mtlweight.engines._grad import hooked
from mtlweight.engines._graph import Backward
from mtlweight.engines._joined import Joined
from mtlweight.engines._micro import MicroBatches
from mtlweight.engines._plan import Plan
from mtlweight.engines._processes import expect_whole, local
from mtlweight.engines._range import gradient
from mtlweight.engines._reference import Reference


def read(losses: Any, reference: Any, plan: Plan) -> Batch:
    """Evaluates losses and reference as the plan needs them.

    Args:
        losses: mapping, tensor, or callable that returns one of these; or a list of callables, one a part of the batch.
        reference: scalar or ``[b]`` tensor; several in a list (their mean) or a mapping by main task (their sum);
            a callable that returns one of these; or ``None``.
        plan: how to measure.

    Raises:
        MTLWeightError: for losses or a reference of the wrong form.
    """
    batch = _read(losses, reference, plan)
    # Weights compare with the reference; they tell the main tasks by their names alone, so that a wrong one is silent.
    mains, present = plan.use.main if plan.use is not None else (), {*plan.tasks, *batch.tasks}
    compared = batch._reference is not None and Needs.ALIGNMENT in plan.needs
    if mains and present and compared and not present & {*mains} and not batch._with_reference().by_name:
        raise MTLWeightError(
            f"{plan.name}: expected the main task {' or '.join(map(repr, mains))} among the tasks, found "
            f"{', '.join(batch.tasks)}. Pass the name of one of them; or, if it has no loss here, the reference by "
            "name: reference={name: ...}."
        )
    return batch


def _read(losses: Any, reference: Any, plan: Plan) -> Batch:
    # Before the losses, if the weighting has announced that it compares; else if and when it does so all the same.
    compared = Needs.ALIGNMENT in plan.needs
    if compared or plan.outer:
        expect_whole(plan.trainable, f"{plan.name} takes the gradient of a reference")
    plan.stamp = {**plan.stamp, "reference": "one" if reference is not None else "none"}
    # Where it is missing in some processes alone, these learn of it in the exchange of its gradient.
    expected = plan.processes is not None and (compared or bool(plan.outer))
    known = functools.cache(lambda: Reference(reference, plan)) if expected or reference is not None else None
    plan.as_written = known is not None and compared and plan.alignment_engine in ("auto", "forward", "pullback")
    losses = as_written(losses) if plan.as_written else losses
    if known is not None and compared and plan.use is not None and plan.use.lookahead is not None:
        return _look_ahead(losses, reference, known, plan)
    if known is not None and (compared or plan.outer):
        known()
    return _evaluated(losses, known, plan)


def _look_ahead(losses: Any, reference: Any, known: Callable[[], Reference], plan: Plan) -> Batch:
    """The batch, with the reference's gradient (and the alignments) as they are one step of the optimizer ahead."""
    for name, given in (("losses", losses), ("reference", reference)):
        if not _losses.deferred(given):
            raise MTLWeightError(
                f"{plan.name} looks one step ahead and evaluates everything there: expected {name} as a callable, "
                "found computed tensors. Pass combine(lambda: losses(model, batch), reference=lambda: ...)."
            )
    lookahead = plan.use.lookahead if plan.use is not None else None
    present = snapshot(plan.modules)

    def trial() -> Batch:
        batch = _plain(losses, None, replace(plan, outer=[]))  # these have no gradient before the reference's
        # Losses that are not finite are for the step itself to judge: they take no part in the one ahead.
        return batch.without([task for task, loss in batch.graphs.items() if not bool(loss.isfinite().all())])

    gradients = _gradients_ahead(trial(), plan)
    if not _finite(gradients):  # neither do tasks with such a gradient
        present()
        every = trial()
        alone = {task: every.without([other for other in every.tasks if other != task]) for task in every.tasks}
        bad = [task for task, batch in alone.items() if not _finite(_gradients_ahead(batch, plan, keep=True))]
        present()
        gradients = _gradients_ahead(trial().without(bad), plan)
    if lookahead == "stay":
        _ahead.step(plan.optimizer, gradients)
        known()
        return _evaluated(losses, known, plan)
    aligned = None
    present()
    with _ahead.one_step_ahead(plan.optimizer, gradients):
        known()
        present()
        if lookahead == "both":
            there = _evaluated(losses, known, plan)
            aligned = there._aligned or there._align()  # whether they are finite is for the step to judge, too
    present()
    return _evaluated(losses, known, plan) if aligned is None else _plain(losses, known, plan, aligned)


def _gradients_ahead(trial: Batch, plan: Plan, *, keep: bool = False) -> dict[Tensor, Tensor | None]:
    """What the optimizer would step along, with the weights that the weighting has for it."""
    if not trial.tasks:
        return {}
    view = plan.view(trial)
    weights = plan.weighting.ahead(view, plan.weighting.init(view) if plan.state is None else plan.state)
    scalar = trial.combined(weights, "task" if weights.ndim == 1 else "sample")
    outer = {id(p) for p in plan.outer}
    inner = [p for p in plan.trainable if id(p) not in outer]

    def own() -> dict[Tensor, Tensor | None]:
        with plan.measuring():
            found = gradient(scalar, inner, keep_graph=keep, narrow=Backward([scalar]).narrow)
        pairs = zip(inner, found, strict=True)
        return {p: None if g is None else hooked(p, g.to(p.dtype)) for p, g in pairs}

    found = own() if plan.processes is None else plan.processes.averaged(own, inner)
    return {p: None if g is None else g.to(p.dtype) for p, g in found.items()}


def _finite(gradients: Mapping[Tensor, Tensor | None]) -> bool:
    return all_finite(local([g for g in gradients.values() if g is not None]))


def _plain(
    losses: Any, known: Callable[[], Reference] | None, plan: Plan, aligned: dict[str, Tensor] | None = None
) -> Batch:
    """The batch, without alignments or with those that are known."""

    def own(aligned: dict[str, Tensor] | None = None) -> Batch:
        if isinstance(losses, (list, tuple)):
            return MicroBatches(losses, plan, known, aligned)
        return Batch(plan.named(losses()), plan, known, aligned)

    return own(aligned) if plan.processes is None else Joined(own, plan, known, aligned)


def _evaluated(losses: Any, known: Callable[[], Reference] | None, plan: Plan) -> Batch:
    return (
        _alone(losses, known, plan)
        if plan.processes is None
        else Joined(lambda: _alone(losses, known, plan), plan, known)
    )


def _alone(losses: Any, known: Callable[[], Reference] | None, plan: Plan) -> Batch:
    """This process's batch."""
    if isinstance(losses, (list, tuple)) and losses and _losses.deferred(losses):
        if plan.engine == "features":
            raise MTLWeightError(
                "engine='features' reads the representation of the whole batch: expected its losses at once, found "
                "them in parts. Use engine='rows'."
            )
        return MicroBatches(losses, plan, known)
    return evaluated(losses, known, plan)
