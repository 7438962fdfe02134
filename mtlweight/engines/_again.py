"""Running a user's closure once more as if it had not been run."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType

import numpy as np
import torch
from torch import Tensor, nn

from mtlweight._errors import MTLWeightError
from mtlweight._statistics import Given
from mtlweight.engines import _losses
from mtlweight.engines._processes import Layout

if TYPE_CHECKING:
    from mtlweight.engines._plan import Plan


def snapshot(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """A function that puts the modules' buffers and the global random states back to what they are now.

    These are torch's, Python's and numpy's. Generators that someone has made are not known here.
    """
    owners = [owner for module in modules for owner in module.modules()]
    named = [(owner, name, buffer) for owner in owners for name, buffer in owner._buffers.items() if buffer is not None]
    buffers = [(owner, name, buffer, buffer.clone()) for owner, name, buffer in named]
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002  # augmentations draw from it
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore() -> None:
        with torch.no_grad():
            for owner, name, buffer, value in buffers:
                setattr(owner, name, buffer.copy_(value))  # the module may have put another tensor in its place
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)

    return restore


def as_written(losses: Any) -> Any:
    """Losses whose callables run without compiled code, so that all their evaluations draw the same masks.

    Compiled code has no forward derivative, or drops it without a word, and has no second derivative. For as long as a
    call lasts, other threads do without it too.

    Args:
        losses: a callable, or a list of these; anything else is returned as it is.
    """
    if isinstance(losses, (list, tuple)):
        return [as_written(each) for each in losses]
    if not callable(losses) or isinstance(losses, Tensor):
        return losses
    call: Callable[[], Any] = losses

    def run() -> Any:
        with torch.compiler.set_stance("force_eager"):
            return call()

    return run


def look_again(
    losses: Any, plan: Plan, rewind: Callable[[], None], tasks: tuple[str, ...], first: Sequence[ReferenceType[Tensor]]
) -> Given:
    """The losses of the same batch at the present parameters, evaluated as the first time, and then without a graph.

    Random numbers are those of the first time; afterwards buffers and random states are as before the call.

    Args:
        losses: a callable that returns them, or a list of these, one a part of the batch.
        plan: its modules' buffers are restored.
        rewind: puts the random states back to what they were before the first evaluation.
        tasks: the tasks to keep.
        first: the losses of the first evaluation.

    Raises:
        MTLWeightError: if one of these has no loss now, or is the tensor of the first evaluation.
    """
    in_parts = isinstance(losses, (list, tuple))
    losses = as_written(losses) if plan.as_written else losses
    closures, plans = (losses, plan.split(len(losses))) if in_parts else ([losses], [plan])

    def evaluated(closure: Callable[[], Any], each: Plan) -> dict[str, Tensor]:
        found = each.named(closure(), graph=False)
        if any(loss is before() for before in first for loss in found.values()):
            raise MTLWeightError(
                f"{plan.name} looks at the losses again after the step: expected them to be computed anew, found the "
                "tensors of the first time. Compute them inside the callable: lambda: losses(model, batch)."
            )
        return {task: loss.detach() for task, loss in found.items()}

    def again() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        restore = snapshot(plan.modules)
        rewind()
        try:
            # As the first time: losses may have derivatives inside, and layers go other ways without gradients.
            with torch.enable_grad():
                parts = [evaluated(closure, each) for closure, each in zip(closures, plans, strict=True)]
        finally:
            restore()
        labelled = [each.labelled(part) for each, part in zip(plans, parts, strict=True)]
        return _losses.join(parts, plan.tasks), _losses.join(labelled, plan.tasks)

    if plan.processes is None:
        whole, labelled = again()
    else:
        mine, layout = Layout.of(plan, again, lambda found: found[0])
        whole, labelled = layout.masked(*mine)
    missing = [task for task in tasks if task not in whole]
    if missing:
        raise MTLWeightError(
            f"{plan.name} looks at the losses again after the step: expected those of the same tasks, found none of "
            f"{', '.join(missing)}. Take the data outside the callable: lambda batch=batch: losses(model, batch)."
        )
    stacked = _losses.stack({task: whole[task] for task in tasks})
    shares = _losses.shares(stacked, tasks, labelled)
    return Given(losses=stacked, tasks=tasks, known=tuple(plan.tasks), shares=shares)
