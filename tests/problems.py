"""A small problem with two or three tasks, and exact comparison of everything an optimizer may change."""

import copy
from dataclasses import dataclass

import torch
from torch import nn

from mtlweight import MultiTaskOptimizer, Needs, Weighting

KEY = "mtlweight"


class Network(nn.Module):
    """A shared encoder with one linear head a task."""

    def __init__(self, tasks=("left", "right")):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(5, 1) for task in tasks})

    def forward(self, x):
        features = self.encoder(x)
        return {task: head(features).squeeze(-1) for task, head in self.heads.items()}


class Problem:
    """A network and batches for it, the same at each call."""

    def __init__(self, tasks=("left", "right"), *, dtype=torch.float64, device="cpu", seed=0):
        self.tasks = tasks
        self.dtype, self.device = dtype, device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = Network(tasks).to(device, dtype)

    @property
    def encoder(self):
        return self.model.encoder

    def sgd(self, **options):
        return torch.optim.SGD(self.model.parameters(), **{"lr": 0.1, "momentum": 0.9, **options})

    def batch(self, k=0, size=6):
        random = torch.Generator().manual_seed(1000 + k)
        x = torch.randn(size, 4, generator=random, dtype=torch.float64)
        y = torch.randn(len(self.tasks), size, generator=random, dtype=torch.float64)
        return x.to(self.device, self.dtype), dict(zip(self.tasks, y.to(self.device, self.dtype), strict=True))

    def samples(self, k=0, tasks=None):
        """Losses per sample, by task."""
        x, y = self.batch(k)
        outputs = self.model(x)
        return {task: (outputs[task] - y[task]).square() for task in tasks or self.tasks}

    def losses(self, k=0, tasks=None):
        """One loss a task."""
        return {task: loss.mean() for task, loss in self.samples(k, tasks).items()}

    def reference(self, k=50):
        """The first task's loss on other data."""
        return self.losses(k)[self.tasks[0]]

    def train(self, optimizer, steps, *, start=0, **options):
        """Steps on successive batches; ``options`` go to ``losses``."""
        for k in range(start, start + steps):
            step(optimizer, self.losses(k, **options))

    def parameters(self):
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def gradients(self):
        return {name: None if p.grad is None else p.grad.clone() for name, p in self.model.named_parameters()}

    def everything(self, optimizer):
        """A copy of all that a failed call must leave alone."""
        return copy.deepcopy(
            {"parameters": self.parameters(), "gradients": self.gradients(), "optimizer": optimizer.state_dict()}
        )


def step(optimizer, losses, **options):
    optimizer.zero_grad()
    combined = optimizer.combine(losses, **options)
    combined.backward()
    optimizer.step()
    return combined.detach()


def plain_step(optimizer, losses):
    optimizer.zero_grad()
    sum(losses.values()).backward()
    optimizer.step()


def own(optimizer):
    """What the library keeps of the optimizer's state dict."""
    return optimizer.state_dict()[KEY]


def same(a, b):
    """Bitwise equality of nested values."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def same_numbers(actual, expected, *, rtol=1e-12):
    """Equality of nested values up to rounding."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol)


def poison(parameter):
    """Zero, with a gradient of NaN."""
    return (parameter.sum() * 0).sqrt()


@dataclass(frozen=True)
class Counting(Weighting):
    """The weight is one plus the number of committed steps; the state also sums up the losses."""

    needs = Needs.LOSSES

    def init(self, view):
        return {"count": torch.zeros((), dtype=view.dtype), "total": {}}

    def weigh(self, view, state):
        count, total = state["count"], view.gather(state["total"])
        weights = (1 + count) * torch.ones_like(view.losses)
        return weights, {"count": count + 1, "total": view.scatter(state["total"], total + view.losses)}


def wrap(problem, weighting, **options):
    return MultiTaskOptimizer(problem.sgd(), weighting, **options)
