"""One step ahead of the present, and back as if it had not been taken."""

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from mtlweight._errors import MTLWeightError
from mtlweight._statistics import all_finite
from mtlweight.autograd.gradients import gradient, hooked
from mtlweight.autograd.graph import Graph
from mtlweight.autograd.replay import snapshot
from mtlweight.batch.batch import Batch
from mtlweight.batch.reference import Reference
from mtlweight.batch.source import Source
from mtlweight.batch.step import Step
from mtlweight.distributed.sharded import local

Gradients = Mapping[Tensor, Tensor | None]


def look_ahead(
    evaluate: Callable[..., Source], plain: Callable[..., Source], reference: Callable[[], Reference], step: Step
) -> Source:
    """The losses, with the reference's gradient, and the alignments, as they are one step of the optimizer ahead.

    Args:
        evaluate: from the step, and the reference, to the losses with their alignments.
        plain: the same without measuring alignments; it takes them as they are known.
        reference: computes the reference's gradient where it is first called.
        step: what was known before.
    """
    use = step.reference_use
    assert use is not None
    present = snapshot(step.settings.modules)

    def trial() -> Source:
        source = plain(replace(step, outer=[]))  # these have no gradient before the reference's
        # Losses that are not finite are for the step itself to judge: they take no part in the one ahead.
        return source.without([task for task, loss in source.losses.items() if not bool(loss.isfinite().all())])

    inner = [p for p in step.trainable if all(p is not other for other in step.outer)]
    gradients = _gradients(trial(), inner)
    if not _finite(gradients):  # neither do tasks with such a gradient
        present()
        every = trial()
        alone = {task: every.without([other for other in every.losses if other != task]) for task in every.losses}
        bad = [task for task, source in alone.items() if not _finite(_gradients(source, inner, keep=True))]
        present()
        gradients = _gradients(trial().without(bad), inner)
    optimizer = step.settings.optimizer
    if use.lookahead == "stay":
        take_step(optimizer, gradients)
        reference()
        return evaluate(step, reference)
    aligned = None
    present()
    with one_step_ahead(optimizer, gradients):
        reference()
        present()
        if use.lookahead == "both":
            aligned = evaluate(step, reference).alignments()  # whether they are finite is for the step to judge, too
    present()
    return evaluate(step, reference) if aligned is None else plain(step, reference, aligned)


def _gradients(trial: Source, inner: Sequence[Tensor], *, keep: bool = False) -> Gradients:
    """What the optimizer would step along, with the weights that the weighting has for it."""
    if not trial.losses:
        return {}
    step, weighting = trial.step, trial.step.settings.weighting
    view = step.view(Batch(trial))
    weights = weighting.ahead(view, weighting.init(view) if step.state is None else step.state)
    scalar = trial.scalar(weights, "task" if weights.ndim == 1 else "sample", None)

    def own() -> dict[Tensor, Tensor | None]:
        with step.measuring():
            found = gradient(scalar, inner, graph=Graph([scalar]), keep_graph=keep)
        pairs = zip(inner, found, strict=True)
        return {p: None if g is None else hooked(p, g.to(p.dtype)) for p, g in pairs}

    found = own() if step.processes is None else step.processes.averaged(own, inner)
    return {p: None if g is None else g.to(p.dtype) for p, g in found.items()}


def _finite(gradients: Gradients) -> bool:
    return all_finite(local([g for g in gradients.values() if g is not None]))


@contextlib.contextmanager
def one_step_ahead(optimizer: Optimizer, gradients: Gradients) -> Iterator[None]:
    """Within the context, parameters are where one step of the optimizer along these gradients leads.

    A twin of the optimizer takes the step, so that the optimizer's own state, whatever it is made of, is not touched.
    Afterwards parameters have the values that they had. No hooks run, and ``.grad`` is left alone.

    Memory: a copy of the parameters and of the optimizer's state. A parameter without a gradient is not moved.

    Raises:
        MTLWeightError: if the optimizer needs a closure, or keeps state in other places than ``state`` and
            ``param_groups``.
    """
    within = any(isinstance(value, Optimizer) for value in vars(optimizer).values())
    if within or not {"state", "param_groups"} <= vars(optimizer).keys():
        raise MTLWeightError(
            "Looking ahead takes a step with a copy of the optimizer's state: expected a wrapped optimizer with "
            f"`state` and `param_groups` of its own, found {type(optimizer).__name__}, which has them elsewhere. Wrap "
            "the innermost optimizer."
        )
    parameters = _parameters(optimizer)
    before = [p.detach().clone() for p in parameters]
    twin = object.__new__(type(optimizer))
    vars(twin).update(vars(optimizer))
    copied = copy.deepcopy((optimizer.state, optimizer.param_groups), {id(p): p for p in parameters})
    twin.state, twin.param_groups = copied
    try:
        take_step(twin, gradients)
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)


def take_step(optimizer: Optimizer, gradients: Gradients) -> None:
    """One step along given gradients: without the optimizer's hooks, and with ``.grad`` left as it was.

    Raises:
        MTLWeightError: if the optimizer needs a closure.
    """
    function = type(optimizer).step
    if inspect.signature(function).parameters.get("closure", _OPTIONAL).default is inspect.Parameter.empty:
        raise MTLWeightError(
            "Looking ahead takes one step along given gradients: expected an optimizer whose step needs no closure, "
            f"found {type(optimizer).__name__}. Use another optimizer, or lookahead=False."
        )
    if getattr(function, "hooked", False):  # torch wraps it once more, to run hooks and the profiler
        function = inspect.unwrap(function, stop=lambda f: not getattr(f, "hooked", False))
    parameters = _parameters(optimizer)
    own = [p.grad for p in parameters]
    hooks = {name: value for name, value in vars(optimizer).items() if name in _HOOKS}
    vars(optimizer).update({name: type(value)() for name, value in hooks.items()})  # a step may call another's
    try:
        for p in parameters:
            p.grad = gradients.get(p)
        function(optimizer)
    finally:
        vars(optimizer).update(hooks)
        for p, gradient in zip(parameters, own, strict=True):
            p.grad = gradient


_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_OPTIONAL = inspect.Parameter("closure", inspect.Parameter.KEYWORD_ONLY, default=None)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
