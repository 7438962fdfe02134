"""Steps whose gradients were used, and which nobody commits."""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from mtlweight._record import Pending, Record, Use
from mtlweight._statistics import tensors_of

Warn = Callable[[str, str], None]
"""Takes a kind, of which it warns once, and the text."""


def watch_steps(record: Record) -> None:
    """Lets the wrapped optimizer say when it is stepped behind this one."""
    known = weakref.ref(record)  # the hook is the wrapped optimizer's, which may outlive this one

    def stepped(*_: Any) -> None:
        record = known()
        if record is not None and record.pending is not None and not record.stepping:
            record.pending.use.behind = True

    if hasattr(record.settings.optimizer, "_optimizer_step_post_hooks"):
        record.settings.optimizer.register_step_post_hook(stepped)


def watch_scalar(record: Record, pending: Pending, scalar: Tensor, warn: Warn) -> None:
    """Lets the scalar say when a backward goes through it."""
    use = pending.use
    use.remembers = next(tensors_of(pending.state or {}), None) is not None

    def used(_gradient: Tensor) -> None:
        now = record.pending
        late = not (use.backward or use.done) and (now is None or now.use is not use)
        use.backward = True
        if late:  # another combine has come before this backward
            _count(record, use, warn)

    scalar.register_hook(used)
    record.cleared = False


def notice(record: Record, warn: Warn) -> None:
    """Counts a pending step whose gradients were used and which nobody committed.

    One that a gradient scaler skips is none of these: nobody steps, and gradients are cleared.
    """
    if record.pending is None or not record.pending.use.backward:
        return
    added = not record.cleared and any(p.grad is not None for p in record.settings.parameters)
    if record.pending.use.behind or added:
        _count(record, record.pending.use, warn)


def _count(record: Record, use: Use, warn: Warn) -> None:
    """Counts a step that nobody will commit; warns of what is lost, once."""
    record.uncommitted += 1
    if not (use.behind or use.remembers):
        return
    what, todo = (
        (
            f"{type(record.settings.optimizer).__name__} was stepped after a combine, but not by this optimizer's "
            "step()",
            "Call step() of this one, with a closure where a step takes several evaluations",
        )
        if use.behind
        else (
            "combine was called again before step(), which commits the later one alone",
            "For micro-batches of one step use accumulate(k), or pass them to combine as a list; to look at other "
            "losses, do not call combine",
        )
    )
    weighting = record.settings.weighting
    lost = f"what {weighting!r} learned from the first is lost" if use.remembers else "the step is not counted"
    warn("uncommitted", f"{what}: {lost}. {todo}. Such steps are counted in report.uncommitted.")
