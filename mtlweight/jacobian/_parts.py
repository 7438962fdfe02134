"""One batch as several independent ones."""

import torch
from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight._statistics import gramian_of
from mtlweight._view import View


def parts(name: str, view: View, count: int) -> Tensor:
    """The batch in random parts of equal size, up to one sample: the coefficients of their means, ``[count, b]``.

    Raises:
        MTLWeightError: for scalar losses, or fewer samples than parts.
    """
    b = view.sample_losses.shape[1]
    if b < count:
        raise MTLWeightError(
            f"{name} takes one batch as {count} independent ones: expected at least {count} samples a task, found {b}. "
            "Use larger batches."
        )
    order = torch.randperm(b, generator=view.generator, device=view.device)
    means = torch.zeros(count, b, dtype=view.dtype, device=view.device)
    for mean, part in zip(means, order.tensor_split(count), strict=True):
        mean[part] = 1 / len(part)
    return means


def gramian_of_parts(view: View, means: Tensor) -> Tensor:
    """Inner products of all tasks' gradients on all parts, ``[p, p, m, m]``: ``J_a J_bᵀ`` at ``[a, b]``."""
    m = len(view.tasks)
    rows = torch.cat([view.scaled(mean.expand(m, -1), "sample").jacobian for mean in means])
    p = len(means)
    return gramian_of(rows).reshape(p, m, p, m).transpose(1, 2)
