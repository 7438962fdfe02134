"""Every weighting through a whole optimizer: the same few steps, in any precision, at any scale."""

import contextlib

import pytest
import torch

from mtlweight import MultiTaskOptimizer, Needs, weighting
from mtlweight.testing._conformance import name_of, per_sample
from tests.problems import Problem
from tests.registry import BY_READING
from tests.zoo import close

GRADIENTS = Needs.GRAMIAN | Needs.JACOBIAN
ENGINES = ["rows", "batched", "samples", "forward", "pullback", "features"]
TASKS = ("0", "1")
every_weighting = pytest.mark.parametrize("case", BY_READING, ids=lambda case: name_of(case.weighting))
every_engine = pytest.mark.parametrize("engine", ENGINES)


def tasks_of(case, count=2):
    """As many tasks as asked for, or as the weighting takes, by the names that the registry uses."""
    return tuple(str(i) for i in range(count if count in case.tasks else case.tasks[-1]))


def engines_of(weighting):
    """All engines that measure the same numbers for it."""
    gradients, alignment = weighting.needs & GRADIENTS, Needs.ALIGNMENT in weighting.needs
    return [
        "auto",
        *(["batched"] if gradients else []),
        *(["pullback"] if alignment else []),
        *(["rows", "samples"] if alignment else ["samples"] if gradients else []),
    ]


class Rounded(Problem):
    """A problem whose parameters and data are numbers of a low precision, computed with in any.

    Args:
        tasks: names.
        low: the dtype that all numbers are rounded to.
        dtype: the parameters' and the data's.
        autocast: whether the model runs under autocast to ``low``.
        noise: relative size of a random change of all numbers.
    """

    def __init__(self, tasks, low, dtype=torch.float32, *, autocast=False, noise=0.0, seed=0, device="cpu"):
        super().__init__(tasks, dtype=dtype, device=device)
        self.low, self.autocast, self.noise = low, autocast, noise
        self.random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(self.rounded(p))

    def rounded(self, values):
        values = values.to(self.low).double()
        noise = 2 * torch.rand(values.shape, generator=self.random, dtype=values.dtype).to(values.device) - 1
        return (values * (1 + self.noise * noise)).to(self.dtype)

    def batch(self, k=0, size=6):
        x, y = super().batch(k, size)
        return self.rounded(x), {task: self.rounded(row) for task, row in y.items()}

    def samples(self, k=0, tasks=None):
        with torch.autocast(self.device, self.low) if self.autocast else contextlib.nullcontext():
            return super().samples(k, tasks)


def scaled(loss, scale):
    """Times a scale, beyond the range of low precision too."""
    return scale * loss.to(torch.promote_types(loss.dtype, torch.float32))


def losses_of(p, weighting, k, scale=1.0):
    """As the weighting needs them, times one scale, or one a task."""
    losses = p.samples(k) if per_sample(weighting) else p.losses(k)
    scales = scale if isinstance(scale, dict) else dict.fromkeys(losses, scale)
    return {task: scaled(loss, scales[task]) for task, loss in losses.items()}


def wrapped(p, weighting, *, lr=0.1, **options):
    inner = torch.optim.SGD(p.model.parameters(), lr=lr)
    return MultiTaskOptimizer(inner, weighting, shared=p.encoder, model=p.model, **options)


def combined(optimizer, p, k, scale=1.0, reference_scale=1.0):
    weighting = optimizer.weighting
    reference = (lambda: scaled(p.reference(), reference_scale)) if weighting.reference else None
    optimizer.zero_grad()
    return optimizer.combine(lambda: losses_of(p, weighting, k, scale), reference=reference)


def statistics(p, engine, scale=1.0, reference_scale=1.0):
    """What a weighting sees that reads everything that the engine can measure; and the gradient that it makes of it."""
    seen, weights = {}, torch.tensor([1 / 3, -1.7], dtype=torch.float64, device=p.device)

    @weighting(Needs.GRAMIAN if engine == "features" else ~Needs.NOTHING)
    def reads(view):
        if engine != "features":
            seen.update(losses=view.sample_losses, jacobian=view.jacobian, alignment=view.sample_alignment)
        seen.update(gramian=view.gramian)
        return weights

    optimizer = wrapped(p, reads, engine=engine)
    scalar = optimizer.combine(
        lambda: {task: scaled(loss, scale) for task, loss in p.samples().items()},
        reference=lambda: scaled(p.reference(), reference_scale),
    )
    scalar.backward()
    if p.dtype == torch.float32 and engine != "features":
        seen["gradient"] = torch.cat([q.grad.flatten() for q in p.encoder.parameters()])
        assert close(seen["gradient"], weights @ seen["jacobian"].double(), rounding=1e-6)
    return seen
