"""From what users pass as losses to one tensor a task."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight._statistics import cast, statistics_dtype, widest
from mtlweight.batch.nonfinite import Hidden

Masks = Mapping[str, Tensor]
"""Which samples of a task have a label, ``[b]`` of booleans. A task without an entry has them all."""
REDUCE = (
    "Reduce the other dimensions, such as classes, tokens or pixels, to one value a sample, with a mean or a sum as "
    "the task's loss is defined"
)


def named(
    losses: Any,
    known: Sequence[str] = (),
    *,
    graph: bool = True,
    masks: Masks | None = None,
    empty: bool = False,
    hidden: Hidden | None = None,
) -> tuple[dict[str, Tensor], list[str]]:
    """The present tasks' losses by name, all scalars or all ``[b]``, and all tasks with a place, in the order of both.

    Args:
        losses: mapping from task name to a scalar or ``[b]`` tensor, or to ``None`` for an absent task; or a tensor
            ``[m]`` or ``[m, b]``, whose tasks are called ``"0"``, ``"1"``, ...
        known: the tasks that have a place already; a tensor must have exactly these.
        graph: whether each loss must have a graph.
        masks: where there is no label the loss becomes 0; a task without any label is absent.
        empty: keep such a task all the same.
        hidden: takes each masked loss as it was before.

    Raises:
        MTLWeightError: if there is no task, or a loss has another shape, another number of samples or no graph.
    """
    if isinstance(losses, Tensor):
        if losses.ndim not in (1, 2) or len(losses) == 0:
            raise MTLWeightError(
                f"Expected losses of shape [m] or [m, b] with m >= 1 tasks, found {list(losses.shape)}. Stack one "
                "scalar or one [b] loss a task, or pass a mapping from task name to loss."
                + (f" {REDUCE}." if losses.ndim > 2 else "")
            )
        losses = {str(i): row for i, row in enumerate(losses.unbind())}
        if known and {*known} != {*losses}:
            raise MTLWeightError(
                f"Expected losses of the {len(known)} tasks that the state knows ({', '.join(known)}), found a tensor "
                f"of {len(losses)}. It cannot say which task is which or absent: pass a mapping from name to loss."
            )
    if not isinstance(losses, Mapping):
        raise MTLWeightError(
            f"Expected losses as a mapping from task name to tensor, a tensor [m] or [m, b], or a callable that "
            f"returns one of these; found {type(losses).__name__}. Pass one of these."
        )
    if not losses:
        raise MTLWeightError("Expected losses of at least one task, found none. Pass None for a task that is absent.")
    present: dict[str, Tensor] = {}
    for task, loss in losses.items():
        if not isinstance(task, str):
            raise MTLWeightError(f"Expected task names as strings, found {task!r}. Rename it to {str(task)!r}.")
        if loss is None:
            continue
        if not isinstance(loss, Tensor):
            raise MTLWeightError(
                f"Expected the loss of task {task!r} as a tensor, or None if the task is absent; found "
                f"{type(loss).__name__}. Pass what the loss function returns, without .item()."
            )
        if loss.ndim > 1 or loss.numel() == 0:
            raise MTLWeightError(
                f"Expected the loss of task {task!r} as a scalar or one value a sample [b], found shape "
                f"{list(loss.shape)}. {REDUCE}; pass None if no sample has a label."
            )
        if not loss.is_floating_point():
            raise MTLWeightError(
                f"Expected the loss of task {task!r} as a real number, found {loss.dtype}. Convert it with .float()."
            )
        if graph and not loss.requires_grad:
            raise MTLWeightError(
                f"The loss of task {task!r} has no graph: expected a tensor that requires grad, found a constant. "
                "Pass None if the task is absent from this batch; else compute its loss with gradients enabled, from "
                "parameters that require grad, without .item() or .detach()."
            )
        present[task] = loss
    if len({tuple(loss.shape) for loss in present.values()}) > 1:
        shapes = ", ".join(f"{task} {list(loss.shape)}" for task, loss in present.items())
        raise MTLWeightError(
            f"Expected losses of one shape, all scalars or all [b] with the same b; found {shapes}. Reduce each "
            "task's loss to a scalar as it is defined, or give each sample a loss in every task."
        )
    for task, mask in (masks or {}).items():
        if task not in losses:
            raise MTLWeightError(
                f"Expected masks of tasks that have losses ({', '.join(losses)}), found one of {task!r}. Rename or "
                "drop it; beside losses in a mapping, pass masks in a mapping."
            )
        if task in present:
            if mask.shape != present[task].shape:
                raise MTLWeightError(
                    f"Expected the mask of task {task!r} to have one value a sample, of the shape of its loss "
                    f"{list(present[task].shape)}; found {list(mask.shape)}. Give losses per sample, and as many."
                )
            if hidden is not None:
                hidden.append((task, mask, present[task].detach()))
            present[task] = torch.where(mask.to(present[task].device), present[task], torch.zeros_like(present[task]))
            if not empty and not mask.any():
                del present[task]
    places = placed(known, [list(losses)])
    return {task: present[task] for task in places if task in present}, places


def masks(mask: Any) -> dict[str, Tensor]:
    """Masks by task, from a mapping from task to booleans ``[b]``, one tensor ``[m, b]``, or ``None``; else raises."""
    if isinstance(mask, Tensor):
        mask = {str(i): row for i, row in enumerate(mask.unbind())}
    if mask is not None and not isinstance(mask, Mapping):
        raise MTLWeightError(
            f"Expected mask as a mapping from task name to booleans [b], or booleans [m, b]; found "
            f"{type(mask).__name__}. Pass one of these."
        )
    for task, row in (mask or {}).items():
        if not isinstance(row, Tensor) or row.dtype != torch.bool:
            found = row.dtype if isinstance(row, Tensor) else type(row).__name__
            raise MTLWeightError(
                f"Expected the mask of task {task!r} as a tensor of booleans, True where there is a label; found "
                f"{found}. Convert it with .bool(), or compare labels with what stands for none."
            )
    return dict(mask or {})


def shares(losses: Tensor, tasks: Sequence[str], masks: Masks) -> Tensor | None:
    """The coefficients of the tasks' means, ``[m, b]``; ``None`` for scalar losses."""
    if losses.ndim == 1:
        return None
    even = torch.full_like(losses, 1 / losses.shape[1], dtype=statistics_dtype(losses.device))
    if not masks:
        return even
    everyone = torch.ones_like(even[0])
    labelled = torch.stack([masks.get(task, everyone).to(everyone) for task in tasks])
    return labelled / labelled.sum(dim=1, keepdim=True)


def placed(known: Sequence[str], mentioned: Iterable[Sequence[str]]) -> list[str]:
    """The tasks in the order of their places: those that have one, then the new ones.

    Args:
        known: tasks with a place, in order.
        mentioned: the tasks that each part of a batch mentions. New ones come in the order that they would have in the
            whole batch, also where the first part lacks one.
    """
    new: list[str] = []
    for tasks in mentioned:
        place = len(new)
        for task in reversed([task for task in tasks if task not in known]):
            if task not in new:
                new.insert(place, task)
            place = new.index(task)
    return [*known, *new]


def join(parts: Sequence[Mapping[str, Tensor]], places: Sequence[str]) -> dict[str, Tensor]:
    """One ``[b]`` tensor a task over all parts of a batch, in the order of places; zeros where a part lacks a task."""
    parts = [part for part in parts if part]
    zeros = [torch.zeros_like(next(iter(part.values()))) for part in parts]
    tasks = [task for task in places if any(task in part for part in parts)]
    rows = {t: [part.get(t, zero) for part, zero in zip(parts, zeros, strict=True)] for t in tasks}
    return {task: row[0] if len(row) == 1 else torch.cat(row) for task, row in rows.items()}


def deferred(given: Any) -> bool:
    """Whether losses or a reference can still be evaluated at another point: callables, or a collection of these."""
    if isinstance(given, (list, tuple, Mapping)):
        return all(map(deferred, given.values() if isinstance(given, Mapping) else given))
    return callable(given) and not isinstance(given, Tensor)


def stack(losses: Mapping[str, Tensor]) -> Tensor:
    """``[m]`` or ``[m, b]``, on the first loss's device, in a dtype that holds all, float32 at least."""
    rows = list(losses.values())
    dtype, device = widest(rows), rows[0].device  # a sum in float16 may overflow, and would round the weights
    return torch.stack([cast(row, dtype, device) for row in rows])
