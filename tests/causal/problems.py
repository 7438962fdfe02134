"""A small selector with heads, batches for it, and how a penalty is evaluated without an optimizer."""

import copy

import torch
from torch import nn

from mtlweight import View
from mtlweight._statistics import Given
from mtlweight.causal import ModuleSelector


class Problem:
    """Modules, a graph and linear heads in float64; the losses are per sample."""

    def __init__(self, modules=3, tasks=("a", "b"), *, gate="sigmoid", width=2, dtype=torch.float64, seed=0):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            bank = [nn.Sequential(nn.Linear(4, width), nn.Tanh()) for _ in range(modules)]
            self.selector = ModuleSelector(bank, tasks, gate).to(dtype)
            self.heads = nn.ModuleDict({task: nn.Linear(width, 1) for task in tasks}).to(dtype)
        self.model = nn.ModuleDict({"selector": self.selector, "heads": self.heads})
        self.tasks, self.dtype = tuple(tasks), dtype

    def data(self, n=12, k=0):
        random = torch.Generator().manual_seed(100 + k)
        x = torch.randn(n, 4, generator=random, dtype=torch.float64)
        y = torch.randn(len(self.tasks), n, generator=random, dtype=torch.float64)
        return x.to(self.dtype), dict(zip(self.tasks, y.to(self.dtype), strict=True))

    def losses(self, n=12, k=0, order=None):
        x, y = self.data(n, k)
        order = torch.arange(n) if order is None else order
        features = self.selector(x[order])
        return {task: (self.heads[task](features[task])[:, 0] - y[task][order]).square() for task in self.tasks}

    def parameters(self):
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def gradients(self):
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}

    def copy(self):
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model)
        twin.selector, twin.heads = twin.model["selector"], twin.model["heads"]
        return twin


def labels(n=12, environments=3):
    return torch.arange(n) % environments


def view(step=0, seed=0, losses=None):
    given = torch.ones(1) if losses is None else torch.stack([loss.detach().double() for loss in losses.values()])
    return View(Given(losses=given, tasks=None if losses is None else tuple(losses)), step=step, seed=seed)


def value(penalty, problem, environments=None, *, step=0, **options):
    """The penalty of one batch of the problem, with its graph."""
    bound = penalty.on(problem.selector)
    losses = problem.losses(**options)
    return bound(losses, view(step, losses=losses), environments)
