"""Which environment each sample belongs to."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtlweight._errors import MTLWeightError


def labels(environments: Any, like: Tensor, generator: Callable[[], torch.Generator]) -> Tensor:
    """Each sample's environment as a number from 0 on, without gaps.

    Args:
        environments: a label per sample, as an integer tensor ``[b]`` or a sequence of integers or strings; or the
            number of parts into which the batch is split at random.
        like: a loss, for the number of samples and the device.
        generator: random numbers for the split.

    Raises:
        MTLWeightError: for anything else, and for ``None``.
    """
    b = like.numel()
    if isinstance(environments, int) and not isinstance(environments, bool):
        if environments < 2:
            raise MTLWeightError(
                f"Expected a random split into 2 environments or more, found {environments}. One has nothing to be "
                "compared with."
            )
        order = torch.randperm(b, generator=generator(), device=like.device)
        return order % min(environments, max(b, 1))
    if isinstance(environments, Sequence) and not isinstance(environments, str):
        numbers = {label: i for i, label in enumerate(dict.fromkeys(environments))}
        environments = torch.tensor([numbers[label] for label in environments])
    if not isinstance(environments, Tensor) or environments.is_floating_point() or environments.is_complex():
        found = environments.dtype if isinstance(environments, Tensor) else type(environments).__name__
        raise MTLWeightError(
            "Invariance compares environments: expected combine(losses, environments=...) as one integer or string a "
            f"sample, or as the number of random parts; found {found}. Pass where or when each sample was collected."
        )
    if environments.shape != (b,):
        raise MTLWeightError(
            f"Expected one environment for each of the {b} samples, found shape {list(environments.shape)}. Pass the "
            "labels of the same batch."
        )
    numbered: Tensor = torch.unique(environments.to(like.device), return_inverse=True)[1]
    return numbered


def join(batches: Sequence[Any]) -> tuple[Any, Tensor]:
    """One batch from one batch an environment, and the environment of each sample.

    Args:
        batches: tensors, or tuples, lists or mappings of them, all alike. Samples are the first dimension.

    Returns:
        tuple[Any, Tensor]: the batches one after the other, and the labels ``[b]`` for ``combine``.

    Raises:
        MTLWeightError: without batches, or if they are not alike.

    >>> from mtlweight.causal import join
    >>> (x, y), environments = join([(torch.zeros(2, 3), torch.zeros(2)), (torch.ones(1, 3), torch.ones(1))])
    >>> x.shape, environments
    (torch.Size([3, 3]), tensor([0, 0, 1]))
    """
    if not batches:
        raise MTLWeightError("join: expected at least one batch, found none. Pass one batch an environment.")
    sizes = torch.tensor([len(_first(batch)) for batch in batches])
    return _join(list(batches)), torch.arange(len(sizes)).repeat_interleave(sizes)


def _join(parts: list[Any]) -> Any:
    first = parts[0]
    if all(isinstance(part, Tensor) for part in parts):
        return torch.cat(parts)
    if isinstance(first, Mapping) and all(isinstance(p, Mapping) and p.keys() == first.keys() for p in parts):
        return {key: _join([part[key] for part in parts]) for key in first}
    if isinstance(first, (tuple, list)) and all(isinstance(p, type(first)) and len(p) == len(first) for p in parts):
        return type(first)(_join(list(each)) for each in zip(*parts, strict=True))
    raise MTLWeightError(
        f"join: expected batches that are all alike, tensors or tuples, lists or mappings of them; found "
        f"{', '.join(type(part).__name__ for part in parts)}. Bring them to one form."
    )


def _first(batch: Any) -> Any:
    while not isinstance(batch, Tensor):
        each = list(batch.values() if isinstance(batch, Mapping) else batch)
        batch = each[0]
    return batch
