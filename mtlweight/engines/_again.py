"""Running a user's closure once more as if it had not been run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mtlweight._statistics import Given
from mtlweight.engines import _losses
from mtlweight.engines._processes import Layout

if TYPE_CHECKING:
    from mtlweight.engines._batch import Plan


def snapshot(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """A function that puts the modules' buffers and torch's random state back to what they are now."""
    owners = [owner for module in modules for owner in module.modules()]
    buffers = [(owner, *named, named[1].clone()) for owner in owners for named in owner.named_buffers(recurse=False)]
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore() -> None:
        with torch.no_grad():
            for owner, name, buffer, value in buffers:
                setattr(owner, name, buffer.copy_(value))  # the module may have put another tensor in its place
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)

    return restore


def look_again(closure: Callable[[], Any], plan: Plan, rewind: Callable[[], None], tasks: tuple[str, ...]) -> Given:
    """The losses of the same batch at the present parameters, without a graph.

    Dropout draws the masks that it drew the first time; afterwards buffers and random state are as before the call.

    Args:
        closure: returns the losses.
        plan: its modules' buffers are restored.
        rewind: puts the random state back to what it was before the first evaluation.
        tasks: the tasks to keep.
    """

    def again() -> dict[str, Tensor]:
        restore = snapshot(plan.modules)
        rewind()
        try:
            with torch.no_grad():
                return plan.named(closure(), graph=False)
        finally:
            restore()

    if plan.processes is None:
        losses, masks = again(), plan.masks
    else:
        mine, layout = Layout.of(plan, again, lambda losses: losses)
        losses, masks = layout.masked(mine, plan.masks)
    stacked = _losses.stack({task: losses[task] for task in tasks})
    return Given(losses=stacked, tasks=tasks, shares=_losses.shares(stacked, tasks, masks))
