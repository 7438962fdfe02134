"""Where a gradient that is not finite comes from, and what to do."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import Tensor

from mtlweight._errors import NonFiniteError

Hidden: TypeAlias = list[tuple[str, Tensor, Tensor]]
"""Task, mask ``[b]`` and losses ``[b]`` as they were before the mask; read only where something is not finite."""


def behind_masks(hidden: Hidden, *, sure: bool = False) -> str:
    """What to do, if it may come from samples without a label; else empty. ``sure``: if it does for sure."""
    masked = [(task, mask, loss) for task, mask, loss in hidden if not mask.all()]
    bad = [task for task, mask, loss in masked if not (loss.isfinite() | mask.to(loss.device)).all()]
    if sure and not bad:
        return ""
    names = dict.fromkeys(bad or [task for task, *_ in masked])
    if not names:
        return ""
    what = "The loss of a sample without a label is NaN or infinite" if bad else "It may be that of one without a label"
    return (
        f"{what} (task {', '.join(names)}): the mask multiplies its gradient by 0, and 0 * NaN is NaN. Give such a "
        "sample any finite label before the loss is computed, as with torch.where(mask, label, 0)."
    )


def bad_gradient(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], called: Callable[[Tensor], str], hidden: Hidden
) -> NonFiniteError:
    """The error for a gradient that is not finite after backward; gradients are of those parameters that have one."""
    having = [p for p in parameters if p.grad is not None]
    bad = [p for p, g in zip(having, gradients, strict=True) if not g.isfinite().all()]
    where = called(bad[0]) if bad else "another process's part of one"
    todo = behind_masks(hidden) or "Look at the batch, or choose on_nonfinite='skip'."
    return NonFiniteError(
        "A gradient is not finite after backward: expected finite numbers, found NaN or infinity for "
        f"{where}. The step was not taken. {todo}"
    )
