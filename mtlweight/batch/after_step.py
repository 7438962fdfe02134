"""The losses of the same batch after the step, for weightings that observe them."""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import ReferenceType

import torch
from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight._statistics import Given
from mtlweight.autograd.replay import snapshot
from mtlweight.batch import losses as given
from mtlweight.batch.joined import Layout
from mtlweight.batch.step import Step


def losses_after(
    losses: Any, step: Step, rewind: Callable[[], None], tasks: tuple[str, ...], first: Sequence[ReferenceType[Tensor]]
) -> Given:
    """The losses of the same batch at the present parameters, without a graph.

    Random numbers are those of the first evaluation; afterwards buffers and random states are as before the call.

    Args:
        losses: a callable that returns them, or a list of these, one a part of the batch.
        step: that was taken.
        rewind: puts the random states back to what they were before the first evaluation.
        tasks: the tasks to keep.
        first: the losses of the first evaluation, which may not be returned once more.
    """
    in_parts = isinstance(losses, (list, tuple))
    closures, steps = (losses, step.split(len(losses))) if in_parts else ([losses], [step])
    name = step.settings.name

    def evaluated(closure: Callable[[], Any], each: Step) -> dict[str, Tensor]:
        found = each.named(closure(), graph=False)
        if any(loss is before() for before in first for loss in found.values()):
            raise MTLWeightError(
                f"{name} looks at the losses again after the step: expected them to be computed anew, found the "
                "tensors of the first time. Compute them inside the callable: lambda: losses(model, batch)."
            )
        return {task: loss.detach() for task, loss in found.items()}

    def replayed() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        restore = snapshot(step.settings.modules)
        rewind()
        try:
            # As the first time: losses may have derivatives inside, and layers go other ways without gradients.
            with torch.enable_grad():
                parts = [evaluated(closure, each) for closure, each in zip(closures, steps, strict=True)]
        finally:
            restore()
        labelled = [each.labelled(part) for each, part in zip(steps, parts, strict=True)]
        return given.join(parts, step.draft.tasks), given.join(labelled, step.draft.tasks)

    if step.processes is None:
        whole, labelled = replayed()
    else:
        mine, layout = Layout.of(step, replayed, lambda found: found[0])
        whole, labelled = layout.masked(*mine)
    missing = [task for task in tasks if task not in whole]
    if missing:
        raise MTLWeightError(
            f"{name} looks at the losses again after the step: expected those of the same tasks, found none of "
            f"{', '.join(missing)}. Take the data outside the callable: lambda batch=batch: losses(model, batch)."
        )
    stacked = given.stack({task: whole[task] for task in tasks})
    shares = given.shares(stacked, tasks, labelled)
    return Given(losses=stacked, tasks=tasks, known=tuple(step.draft.tasks), shares=shares)
