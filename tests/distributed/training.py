"""Training as several processes do it, and as one process does it on the joined batch."""

import itertools
from dataclasses import dataclass, field

import torch
from torch.nn.parallel import DistributedDataParallel

from mtlweight import MultiTaskOptimizer, Needs, Weighting
from tests.problems import Network

SAMPLES = 8
HELD_OUT = 4
EVEN = {2: (4, 4), 4: (2, 2, 2, 2)}
UNEVEN = {2: (5, 3), 4: (4, 2, 1, 1)}


@dataclass
class Run:
    """What is trained, and how its data lie in the processes.

    Args:
        weighting: what weighs.
        tasks: how many.
        steps: how many.
        uneven: whether the processes have different numbers of samples.
        scalars: one loss a task and process, instead of one a sample.
        absent: for some processes, the tasks that they have no loss of.
        masked: for some processes, the tasks without any label there; and every third sample has none anywhere.
        given: how the losses are given: ``"callable"``, ``"computed"`` or in ``"parts"``.
        dynamic: whether the model skips the heads of absent tasks, which is for ``find_unused_parameters``.
        adam: whether the wrapped optimizer is Adam instead of SGD with momentum.
        options: of the MultiTaskOptimizer; ``shared`` and ``outer`` by the name of a part of the network.
    """

    weighting: Weighting
    tasks: int = 3
    steps: int = 2
    uneven: bool = True
    scalars: bool = False
    absent: dict = field(default_factory=dict)
    masked: dict = field(default_factory=dict)
    given: str = "callable"
    dynamic: bool = False
    adam: bool = False
    options: dict = field(default_factory=dict)


class Model(Network):
    """Without the heads of absent tasks, if it is told to leave them out."""

    def forward(self, x, tasks=None):
        features = self.encoder(x)
        return {t: head(features).squeeze(-1) for t, head in self.heads.items() if tasks is None or t in tasks}


class Training:
    """A model in this process, or in the one process that stands for all.

    Args:
        run: what to do.
        count: how many processes there are, or are stood for.
        rank: which one this is; ``None`` stands for all.
        device: where.
        averaged: whether gradients are averaged.
    """

    def __init__(self, run, count, rank=None, *, device="cpu", averaged=True, **ddp):
        self.run, self.rank, self.device = run, rank, device
        self.names = tuple(str(t) for t in range(run.tasks))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = Model(self.names).double().to(device)
        p = self.model.parameters()
        inner = torch.optim.Adam(p, lr=0.05) if run.adam else torch.optim.SGD(p, lr=0.05, momentum=0.9)
        parts = {"encoder": self.model.encoder, "bias": [self.model.encoder[0].bias], "model": self.model}
        options = {"shared": "encoder", "model": "model", "seed": 0, **run.options}
        options.update({name: parts[options[name]] for name in ("shared", "outer", "model") if name in options})
        self.optimizer = MultiTaskOptimizer(self.wrapped(inner), run.weighting, **options)
        self.forward = self.model
        if rank is not None and averaged:
            self.forward = DistributedDataParallel(self.model, find_unused_parameters=run.dynamic, **ddp)
        sizes = (UNEVEN if run.uneven else EVEN)[count]
        edges = [sum(sizes[:r]) for r in range(count + 1)]
        self.columns = [slice(*edge) for edge in itertools.pairwise(edges)]
        self.held_out = [slice(r * HELD_OUT // count, (r + 1) * HELD_OUT // count) for r in range(count)]

    def wrapped(self, inner):
        return inner

    @property
    def ranks(self):
        """The processes whose data this one has."""
        return range(len(self.columns)) if self.rank is None else [self.rank]

    @property
    def own(self):
        """The samples that this process has."""
        return slice(0, SAMPLES) if self.rank is None else self.columns[self.rank]

    def data(self, k):
        random = torch.Generator().manual_seed(1000 + k)
        x = torch.randn(SAMPLES + HELD_OUT, 4, generator=random, dtype=torch.float64)
        y = torch.randn(len(self.names), SAMPLES + HELD_OUT, generator=random, dtype=torch.float64)
        return x.to(self.device), dict(zip(self.names, y.to(self.device), strict=True))

    def samples(self, k, columns, tasks):
        """The losses per sample of some columns."""
        x, y = self.data(k)
        outputs = self.forward(x[columns], tasks) if self.run.dynamic else self.forward(x[columns])
        return {t: (outputs[t] - y[t][columns]).square() for t in tasks}

    def tasks_of(self, rank):
        return [t for t in self.names if t not in self.run.absent.get(rank, ())]

    def losses(self, k):
        """As this process gives them; as the only one, those of the joined batch."""
        if self.rank is not None:
            found = self.samples(k, self.own, self.tasks_of(self.rank))
            found = {t: loss.mean() for t, loss in found.items()} if self.run.scalars else found
            return {t: found.get(t) for t in self.names}
        if self.run.scalars:
            parts = [(r, self.samples(k, self.columns[r], self.tasks_of(r))) for r in self.ranks]
            means = {t: [losses[t].mean() for _, losses in parts if t in losses] for t in self.names}
            return {t: torch.stack(each).mean() if each else None for t, each in means.items()}
        found = self.samples(k, self.own, self.names)
        return {t: found[t] if any(t in self.tasks_of(r) for r in self.ranks) else None for t in self.names}

    def mask(self):
        """What has a label; for the only process also what is absent in one that it stands for."""
        if self.run.scalars or not (self.run.masked or (self.rank is None and self.run.absent)):
            return None
        there = {t: torch.ones(SAMPLES, dtype=torch.bool) for t in self.names}
        for r, columns in enumerate(self.columns):
            gone = [*self.run.masked.get(r, ()), *(self.run.absent.get(r, ()) if self.rank is None else ())]
            for t in gone:
                there[t][columns] = False
        if self.run.masked:
            there[self.names[-1]][::3] = False
        return {t: row[self.own] for t, row in there.items()}

    def reference(self, k):
        """The first task's loss on held-out data, the mean over the processes'."""
        x, y = self.data(k)
        parts = []
        for r in self.ranks:
            rows = torch.arange(SAMPLES, SAMPLES + HELD_OUT)[self.held_out[r]]
            parts.append((self.forward(x[rows])["0"] - y["0"][rows]).square().mean())
        return torch.stack(parts).mean()

    def combine(self, k, losses=None, **options):
        """What ``combine`` returns for the ``k``-th batch."""
        weighting, given = self.run.weighting, (lambda: self.losses(k)) if losses is None else losses
        if self.run.given == "computed":
            given = given()
        if Needs.ALIGNMENT in weighting.needs or "outer" in self.run.options:
            options = {"reference": lambda: self.reference(k), **options}
        mask = self.mask()
        if self.run.given == "parts":
            width = self.own.stop - self.own.start
            halves = [slice(0, (width + 1) // 2), slice((width + 1) // 2, width)][: 1 + (width > 1)]
            given = [lambda rows=rows: {t: loss[rows] for t, loss in self.losses(k).items()} for rows in halves]
            mask = None if mask is None else [{t: row[rows] for t, row in mask.items()} for rows in halves]
        if mask is not None:
            options["mask"] = mask
        return self.optimizer.combine(given, **options)

    def step(self, k, **options):
        """One step; the value that ``combine`` returned."""
        self.optimizer.zero_grad()
        scalar = self.combine(k, **options)
        scalar.backward()
        self.reduce()
        self.optimizer.step()
        return scalar.detach().cpu()

    def reduce(self):
        """What happens to gradients after the backward, but for DDP."""

    def train(self, steps=None, start=0):
        """All steps, then everything that must be the same in all processes."""
        values = [self.step(k) for k in range(start, start + (self.run.steps if steps is None else steps))]
        return self.everything(values=values)

    def everything(self, **more):
        report, own = self.optimizer.report, self.optimizer.state_dict()["mtlweight"]
        found = {
            "parameters": {name: p.detach() for name, p in self.model.named_parameters()},
            "momentum": list(self.optimizer.optimizer.state_dict()["state"].values()),
            "state": own["state"],
            "memory": own["memory"],
            "tasks": own["tasks"],
            "step": own["step"],
            "skipped": report.skipped,
            "dropped": dict(report.dropped),
            "report": {
                "tasks": report.tasks,
                "losses": report.losses,
                "shares": report.shares,
                "weights": report.weights,
                "gramian": report.gramian,
                "alignment": report.alignment,
            },
            **more,
        }
        return on_cpu(found)


def on_cpu(value):
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: on_cpu(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [on_cpu(each) for each in value]
    return value
