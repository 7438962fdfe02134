"""From what the user passed to ``combine`` to a batch, one step ahead where a weighting looks there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight._view import Needs
from mtlweight.engines import _ahead, _losses
from mtlweight.engines._again import snapshot
from mtlweight.engines._batch import Batch, Plan, Reference
from mtlweight.engines._evaluate import evaluated
from mtlweight.engines._micro import MicroBatches


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
    known = functools.cache(lambda: Reference(reference, plan)) if reference is not None else None
    compared = Needs.ALIGNMENT in plan.needs
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
    parts = isinstance(losses, (list, tuple))
    alone = replace(plan, outer=[])  # the outer parameters have no gradient before the reference's
    trial = MicroBatches(losses, alone) if parts else Batch(plan.named(losses()), alone)
    # Losses that are not finite are for the step itself to judge: they take no part in the one ahead.
    trial = trial.without([task for task, loss in trial.graphs.items() if not bool(loss.isfinite().all())])
    gradients: dict[Tensor, Tensor | None] = {}
    if trial.tasks:
        view = plan.view(trial)
        weights = plan.weighting.ahead(view, plan.weighting.init(view) if plan.state is None else plan.state)
        scalar = trial.combined(weights, "task" if weights.ndim == 1 else "sample")
        outer = {id(p) for p in plan.outer}
        inner = [p for p in plan.trainable if id(p) not in outer]
        gradients = dict(zip(inner, torch.autograd.grad(scalar, inner, allow_unused=True), strict=True))
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
            aligned = dict(zip(there.tasks, there.alignment().unbind(), strict=True))
    present()
    if aligned is None:
        return _evaluated(losses, known, plan)
    return MicroBatches(losses, plan, known, aligned) if parts else Batch(plan.named(losses()), plan, known, aligned)


def _evaluated(losses: Any, known: Callable[[], Reference] | None, plan: Plan) -> Batch:
    if isinstance(losses, (list, tuple)) and losses and _losses.deferred(losses):
        if plan.engine == "features":
            raise MTLWeightError(
                "engine='features' reads the representation of the whole batch: expected its losses at once, found "
                "them in parts. Use engine='rows'."
            )
        return MicroBatches(losses, plan, known)
    return evaluated(losses, known, plan)
