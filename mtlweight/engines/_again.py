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
    from mtlweight.engines._plan import Plan


def snapshot(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """A function that puts the modules' buffers and torch's random state back to what they are now."""
    owners = [owner for module in modules for owner in module.modules()]
    named = [(owner, name, buffer) for owner in owners for name, buffer in owner._buffers.items() if buffer is not None]
    buffers = [(owner, name, buffer, buffer.clone()) for owner, name, buffer in named]
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


def as_written(losses: Any) -> Any:
    """Losses whose callables run without compiled code, so that all their evaluations draw the same masks.

    Compiled code has no forward derivative, or drops it without a word, and has no second derivative. For as long as a
    call lasts, other threads do without it too.

    Args:
        losses: a callable, or a list of these; anything else is returned as it is.
    """
    if isinstance(losses, (list, tuple)):
        return [as_written(each) for each in losses]
    if not callable(losses) or isinstance(losses, Tensor) or torch.compiler.is_compiling():
        return losses
    call: Callable[[], Any] = losses

    def run() -> Any:
        with torch.compiler.set_stance("force_eager"):
            return call()

    return run


def look_again(losses: Any, plan: Plan, rewind: Callable[[], None], tasks: tuple[str, ...]) -> Given:
    """The losses of the same batch at the present parameters, without a graph.

    Dropout draws the masks that it drew the first time; afterwards buffers and random state are as before the call.

    Args:
        losses: a callable that returns them, or a list of these, one a part of the batch.
        plan: its modules' buffers are restored.
        rewind: puts the random state back to what it was before the first evaluation.
        tasks: the tasks to keep.
    """
    in_parts = isinstance(losses, (list, tuple))
    closures, plans = (losses, plan.split(len(losses))) if in_parts else ([losses], [plan])

    def again() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        restore = snapshot(plan.modules)
        rewind()
        try:
            with torch.no_grad():
                parts = [each.named(closure(), graph=False) for closure, each in zip(closures, plans, strict=True)]
        finally:
            restore()
        labelled = [each.labelled(part) for each, part in zip(plans, parts, strict=True)]
        return _losses.join(parts), _losses.join(labelled)

    if plan.processes is None:
        whole, labelled = again()
    else:
        mine, layout = Layout.of(plan, again, lambda found: found[0])
        whole, labelled = layout.masked(*mine)
    stacked = _losses.stack({task: whole[task] for task in tasks})
    return Given(losses=stacked, tasks=tasks, shares=_losses.shares(stacked, tasks, labelled))
