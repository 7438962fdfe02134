"""What the processes run: all of it in one set of processes, since starting them takes longer than the rest."""

import contextlib
import copy
import io
import pickle
import warnings
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel

from mtlweight import (
    DWA,
    FAMO,
    L2RW,
    MGDA,
    OLAUX,
    PCD,
    RLW,
    STCH,
    UW,
    CAGrad,
    Constant,
    GradDrop,
    GradientCosine,
    MultiTaskOptimizer,
    NashMTL,
    NonFiniteError,
    PCGrad,
    SampleWeights,
    SLGrad,
    UPGrad,
)
from mtlweight.distributed.processes import Processes
from tests.distributed.training import SAMPLES, Run, Training, on_cpu
from tests.problems import Network
from tests.registry import BY_READING


def small(losses, *_):
    """A penalty on the tasks' mean losses."""
    return 0.1 * sum(loss.mean() for loss in losses.values())


def labelled(losses, view, _):
    """A penalty on the mean over the samples with a label, by what the view says of this process's."""
    return 0.1 * sum((share * loss).sum() for share, loss in zip(view.shares, losses.values(), strict=True))


def variants():
    """One weighting a level at least, in each way to give the losses."""
    chain = SLGrad("0") >> PCGrad()
    for w in (UW(), FAMO(), PCGrad(), GradDrop(), GradientCosine("0"), OLAUX("0", step_size=0.5, horizon=1)):
        yield f"{w!r}, scalar losses", Run(w, scalars=True)
    for w in (DWA(), UPGrad(), GradDrop(), SLGrad("0"), chain):
        yield f"{w!r}, masks", Run(w, masked={1: ("1",)})
        yield f"{w!r}, one process without labels", Run(w, masked={0: ("0", "1", "2")})
    for w in (DWA(), CAGrad(), GradDrop(), L2RW(), chain):
        yield f"{w!r}, a task absent in one process", Run(w, absent={0: ("2",)}, dynamic=True)
        everything = Run(w, absent={0: ("2",)}, dynamic=True, options={"shared": "model"})
        yield f"{w!r}, everything shared, a task absent in one process", everything
    yield "UW(), scalar losses, a task absent in one process", Run(UW(), scalars=True, absent={0: ("2",)}, dynamic=True)
    yield "MGDA(), scalar losses, tasks absent", Run(MGDA(), scalars=True, absent={0: ("2",), 1: ("0",)}, dynamic=True)
    yield "MGDA(), a task absent everywhere", Run(MGDA(), absent=dict.fromkeys(range(4), ("2",)), dynamic=True)
    for w in (UW(), MGDA(), SLGrad("0"), SLGrad("0", lookahead=True, samples_at="ahead"), chain):
        yield f"{w!r}, parts", Run(w, given="parts", masked={1: ("1",)})


def options():
    """Engines, and options of the MultiTaskOptimizer."""
    for w in (UW(), MGDA(), GradDrop(), SLGrad("0", learn_reference=True)):
        yield f"{w!r}, Adam, even", Run(w, adam=True, uneven=False, steps=5)
    for engine in ("batched", "samples", "features"):
        yield f"MGDA(), {engine}", Run(MGDA(), options={"engine": engine, "model": "model"})
    yield "SLGrad() >> PCGrad(), features", Run(SLGrad("0") >> PCGrad(), options={"engine": "features"})
    for engine in ("forward", "pullback", "rows", "samples"):
        yield f"SLGrad(), {engine}", Run(SLGrad("0", scope="all"), options={"engine": engine})
    yield "L2RW(), computed losses", Run(L2RW(), given="computed")
    for w in (UW(), PCGrad(), SLGrad("0")):
        yield f"{w!r}, unweighted heads", Run(w, options={"heads": "unweighted"})
        yield f"{w!r}, outer", Run(w, options={"outer": "bias"})
    yield "UW(), a penalty", Run(UW(), uneven=False, options={"penalty": small})
    yield "MGDA(), a penalty", Run(MGDA(), uneven=False, options={"penalty": small})
    yield "UW(), masks, a penalty of labelled samples", Run(UW(), masked={1: ("1",)}, options={"penalty": labelled})


def parity(count):
    """What is to be the same in one process and in several: each weighting, once for each thing that it reads."""
    found = {repr(case.weighting): Run(case.weighting, 3 if 3 in case.tasks else case.tasks[0]) for case in BY_READING}
    if count > 2:  # every weighting with two processes, every level with more
        levels = (UW(), FAMO(), RLW(), MGDA(), PCGrad(), NashMTL(), GradDrop(), SLGrad("0"), L2RW())
        return {**{repr(w): found[repr(w)] for w in levels}, **dict(variants())}
    return {**found, **dict(variants()), **dict(options())}


def equal(a, b):
    """Whether all tensors are."""
    return all(torch.equal(x, y) for x, y in zip(on_cpu(a).values(), on_cpu(b).values(), strict=True))


SCENARIOS, OF_TWO = {}, set()


def scenario(function):
    """A function of ``count``, ``rank`` and ``device``, run in each process; what it returns is sent back."""
    SCENARIOS[function.__name__] = function
    return function


def of_two(function):
    """One for two processes alone: nothing in it depends on how many there are."""
    OF_TWO.add(function.__name__)
    return scenario(function)


def message(work):
    """How it failed."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


class Bad(Training):
    """In the last process something is wrong with task 1 in the second batch."""

    def samples(self, k, columns, tasks):
        found = super().samples(k, columns, tasks)
        if k == 1:
            mine = torch.arange(SAMPLES, device=self.device)[columns] >= self.columns[-1].start
            found["1"] = torch.where(mine, self.spoil(found["1"]), found["1"])
        return found

    def reduce(self):
        """DDP gives zeros to the head of a task that was dropped, where one process leaves it alone."""
        for p in self.model.parameters() if self.rank is None else ():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad


class Spoilt(Bad):
    """Its loss is not finite."""

    def spoil(self, losses):
        return losses * torch.nan


class Singular(Bad):
    """Its loss is finite, and the gradient is not."""

    def spoil(self, losses):
        return losses + (losses * 0).sqrt()


SPOILT = {
    f"{policy}: {weighting!r}": Run(weighting, steps=3, options={"on_nonfinite": policy})
    for policy in ("skip", "drop")
    for weighting in (UW(), MGDA(), SLGrad("0"))
}


@scenario
def spoilt(count, rank, device):
    return {name: Spoilt(run, count, rank, device=device).train() for name, run in SPOILT.items()}


@scenario
def spoilt_and_raised(count, rank, device):
    training = Spoilt(Run(MGDA()), count, rank, device=device)
    before = training.train(steps=1)
    return before, message(lambda: training.step(1)), training.everything(), training.train(steps=1, start=2)


@of_two
def singular(count, rank, device):
    runs = {name: run for name, run in SPOILT.items() if "SLGrad" not in name}
    return {name: Singular(run, count, rank, device=device).train() for name, run in runs.items()}


class Searching(Training):
    """Each step is one of L-BFGS, whose line search evaluates the closure several times."""

    def wrapped(self, inner):
        options = {"max_iter": 4, "line_search_fn": "strong_wolfe"}
        return torch.optim.LBFGS(inner.param_groups[0]["params"], **options)

    def step(self, k, **options):
        values = []

        def closure():
            self.optimizer.zero_grad()
            scalar = self.combine(k, **options)
            scalar.backward()
            self.reduce()
            values.append(scalar.detach().cpu())
            return scalar

        self.optimizer.step(closure)
        return values


SEARCHED = {
    "UW()": Run(UW()),
    "MGDA(), masks": Run(MGDA(), masked={1: ("1",)}),
    "SLGrad(), learned": Run(SLGrad("0", learn_reference=True)),
    "UW(), parts": Run(UW(), given="parts"),
    "DWA(), a penalty": Run(DWA(), uneven=False, options={"penalty": small}),
}


@of_two
def line_searches(count, rank, device):
    return {name: Searching(run, count, rank, device=device).train(steps=2) for name, run in SEARCHED.items()}


@scenario
def all_absent(count, rank, device):
    """The second batch has no label at all."""
    training = Training(Run(UW(), scalars=True), count, rank, device=device)
    values = [
        training.step(k, losses=lambda k=k: training.losses(k) if k != 1 else dict.fromkeys("012")) for k in (0, 2)
    ]
    scalar = training.combine(1, losses=dict.fromkeys("012"))
    scalar.backward()
    training.optimizer.step()
    return training.everything(values=values)


@scenario
def one_fails(count, rank, device):
    """Each call fails in the last process alone: what the others hear, and the step that all take then."""
    messages = {}
    for name, run, part in (
        ("losses", Run(UW()), "losses"),
        ("reference", Run(SLGrad("0")), "reference"),
        ("rows", Run(MGDA()), "rows"),
    ):
        training = Training(run, count, rank, device=device)
        training.train(steps=2)  # in its second forward pass, DDP has exchanges of its own
        before = on_cpu(training.model.state_dict())

        def fail(*_):
            raise RuntimeError("out of order")

        if rank == count - 1:
            if part == "rows":
                losses = {t: loss * 1 for t, loss in training.losses(2).items()}
                losses["1"].register_hook(fail)
                options = {"losses": losses}
            else:
                options = {part: fail} if part == "reference" else {"losses": fail}
        else:
            options = {}
        heard = message(lambda training=training, options=options: training.combine(2, **options))
        same = equal(before, training.model.state_dict())
        messages[name] = heard, same, training.train(steps=1, start=2)
    return messages


@scenario
def unlike(count, rank, device):
    """Calls that differ between processes."""
    found = {}
    training = Training(Run(UW()), count, rank, device=device)
    scalar = {t: loss.mean() for t, loss in training.losses(0).items()}
    found["kinds"] = message(lambda: training.combine(0, losses=scalar if rank else None))
    training = Training(Run(SLGrad("0")), count, rank, device=device)
    found["no reference in one"] = message(lambda: training.combine(0, **({"reference": None} if rank else {})))
    training = Training(Run(UW()), count, rank, device=device)
    found["a reference in one"] = message(
        lambda: training.combine(0, reference=(lambda: training.reference(0)) if rank else None)
    )
    other = Training(Run(UW(), options={"seed": rank}), count, rank, device=device)
    found["seeds"] = message(lambda: other.combine(0))
    return found


class Turned(Training):
    """Each process has the tasks in another order, anew in each step; the first has them as they are in the first."""

    def losses(self, k):
        found, turn = super().losses(k), 0 if self.rank is None else (k + 1) * self.rank + k
        names = [*found][turn % len(found) :] + [*found][: turn % len(found)]
        return {t: found[t] for t in (names[::-1] if turn % 2 else names)}


TURNED = {
    repr(w): Run(w, steps=3)
    for w in (Constant([10.0, 1.0, 2.0]), STCH(preference=[1.0, 2.0, 3.0]), RLW(), PCGrad(), FAMO(), SLGrad("0"), PCD())
}


@scenario
def turned(count, rank, device):
    return {name: Turned(run, count, rank, device=device).train() for name, run in TURNED.items()}


class Unlabelled(Training):
    """Losses in a tensor: the last task has no label in the first batch, and never one in the first process."""

    def combine(self, k):
        mask = torch.ones(len(self.names), SAMPLES, dtype=torch.bool)
        mask[-1, slice(None) if k == 0 else self.columns[0]] = False
        reference = (lambda: self.reference(k)) if self.run.weighting.reference else None
        return self.optimizer.combine(
            lambda: torch.stack([*self.losses(k).values()]), reference=reference, mask=mask[:, self.own]
        )


UNLABELLED = {repr(w): Run(w, steps=3) for w in (Constant([1.0, 2.0, 3.0]), UW(), RLW(), MGDA(), SLGrad("0"))}


@of_two
def unlabelled(count, rank, device):
    return {name: Unlabelled(run, count, rank, device=device).train() for name, run in UNLABELLED.items()}


BY_TORCHS_SEED = Run(RLW(), steps=3, options={"seed": None})


@scenario
def seeded_by_torch(count, rank, device):
    """Each process with a seed of its own, as loops with one seed a rank have it."""
    torch.manual_seed(100 + (rank or 0))
    found = Training(BY_TORCHS_SEED, count, rank, device=device).train()
    given = Training(Run(RLW(), options={"seed": 3 if rank else None}), count, rank, device=device)
    return found, message(lambda: given.combine(0))


@of_two
def not_averaged(count, rank, device):
    training = Training(Run(UW()), count, rank, device=device, averaged=False)
    before = on_cpu(training.model.state_dict())
    heard = message(lambda: training.step(0))
    return heard, equal(before, training.model.state_dict())


ALONE = Run(SLGrad("0") >> MGDA(), options={"process_group": None})


@of_two
def each_by_itself(count, rank, device):
    return Training(ALONE, count, rank, device=device, averaged=False).train()


@scenario
def a_group_of_some(count, rank, device):
    """The processes in pairs: each is a group, and so each has a model of its own."""
    groups = [dist.new_group([r, r + 1]) for r in range(0, count, 2)]
    mine, other = groups[rank // 2], groups[rank // 2 - 1]
    training = Training(Run(MGDA(), options={"process_group": mine}), 2, rank % 2, device=device, process_group=mine)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(training.optimizer)))
    refused = message(lambda: MultiTaskOptimizer(torch.optim.SGD([torch.ones(1)]), UW(), process_group=other))
    return training.train(), copied._record.settings.processes.group is mine, refused


@of_two
def checkpoints(count, rank, device):
    """Four steps; and two, a checkpoint of the first process that all load, and two more."""
    found = {}
    for weighting in (DWA(), UPGrad(), SLGrad("0", lookahead=True), FAMO()):
        run = Run(weighting, adam=True)
        whole = Training(run, count, rank, device=device).train(steps=4)
        first, then = Training(run, count, rank, device=device), Training(run, count, rank, device=device)
        first.train()
        file = io.BytesIO()
        torch.save([first.model.state_dict(), first.optimizer.state_dict()], file)
        sent = [file.getvalue() if rank == 0 else None]
        dist.broadcast_object_list(sent)
        model, optimizer = torch.load(io.BytesIO(sent[0]), weights_only=True)
        then.model.load_state_dict(model)
        if rank == 0:
            then.optimizer.load_state_dict(optimizer)
        heard = message(lambda then=then: then.combine(2))
        then.optimizer.load_state_dict(optimizer)
        found[repr(weighting)] = whole, heard, then.train(steps=2, start=2)
    return found


@of_two
def copies(count, rank, device):
    """An optimizer that is copied or pickled goes on to exchange, if it finds its group."""
    training = Training(Run(MGDA()), count, rank, device=device)
    training.step(0)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(training.optimizer)))
    training.step(1)
    return copied._record.settings.processes == training.optimizer._record.settings.processes, message(
        lambda: Processes("no such").group
    )


@scenario
def a_penalty_fails(count, rank, device):
    """In the second step the penalty is not finite in the last process alone."""

    def penalty(losses, view, environments):
        if view.step == 1 and rank == count - 1:
            raise NonFiniteError("The penalty is not finite.")
        return small(losses, view, environments)

    run = Run(UW(), uneven=False, options={"penalty": penalty, "on_nonfinite": "skip"})
    return Training(run, count, rank, device=device).train()


@of_two
def recorded(count, rank, device):
    """What each process remembers of its own samples."""
    training, record = Training(Run(SLGrad("0")), count, rank, device=device), SampleWeights()
    for k in range(2):
        training.step(k)
        record.add(training.optimizer.report, torch.arange(SAMPLES)[training.own])
    return record.table()


@of_two
def recorded_and_merged(count, rank, device):
    """What all processes remember, in each of them; none of the samples is in one process all the time."""
    training, record = Training(Run(SLGrad("0")), count, rank, device=device), SampleWeights()
    for k in range(3):
        training.step(k)
        record.add(training.optimizer.report, torch.arange(SAMPLES).roll(k)[training.own])
    if rank is not None:
        states = [None] * count
        dist.all_gather_object(states, record.state_dict())
        record = SampleWeights.merge(map(SampleWeights.from_state_dict, states))
    histories = [record.history(task, index) for task in record.tasks for index in range(SAMPLES)]
    return record.table(), record.rank("1"), histories


@scenario
def accumulated(count, rank, device):
    """Two batches before one step; the gradients of the first wait for those of the second."""
    training = Training(Run(MGDA()), count, rank, device=device)
    training.optimizer.zero_grad()
    with contextlib.nullcontext() if rank is None else training.forward.no_sync():
        training.combine(0).backward()
    training.combine(1).backward()
    training.optimizer.step()
    return training.everything()


@scenario
def sent(count, rank, device):
    """What each level hands to the collectives of torch.distributed, in bytes, in one call of ``combine``."""
    found = {}
    for level, weighting in (
        ("loss", DWA()),
        ("Gramian", MGDA()),
        ("features", MGDA()),
        ("Jacobian", GradDrop()),
        ("reference", SLGrad("0")),
    ):
        run = Run(weighting, uneven=False, options={"engine": "features"} if level == "features" else {})
        training = Training(run, count, rank, device=device)
        calls = []

        def spy(name, kind, place, calls=calls):
            plain = getattr(dist, name)

            def call(*args, **options):
                value = args[place]
                calls.append((kind, value.nbytes if isinstance(value, torch.Tensor) else 0))
                return plain(*args, **options)

            return mock.patch.object(dist, name, call)

        with spy("all_reduce", "reduce", 0), spy("all_gather", "gather", 1), spy("all_gather_object", "names", 1):
            training.combine(0)
        shared = [p.numel() for p in training.model.encoder.parameters()]
        sizes = {"tasks": run.tasks, "samples": SAMPLES // count, "parameters": sum(shared)}
        found[level] = calls, sizes, 2 + len(shared)
    return found


@of_two
def options_of_ddp(count, rank, device):
    """Buckets that gradients are views of; and static graphs, whose first gradients are averaged out of turn."""
    views = [Training(Run(w), count, rank, device=device, gradient_as_bucket_view=True) for w in (UW(), MGDA())]
    static = [Training(Run(w), count, rank, device=device, static_graph=True) for w in (UW(), MGDA())]
    return [*(training.train() for training in (*views, static[0]))], message(static[1].train)


class Sharded(Training):
    """The same with parameters that the processes share out."""

    def __init__(self, run, count, rank, **options):
        from torch.distributed.fsdp import fully_shard  # takes long to import, and only the processes need it

        super().__init__(run, count, rank, averaged=False, **options)
        fully_shard(self.model.encoder)
        for head in self.model.heads.values():
            fully_shard(head)
        fully_shard(self.model)
        inner = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        options = {**run.options, "shared": self.model.encoder, "model": self.model}
        if "outer" in options:
            options["outer"] = self.model.encoder[0].bias
        self.optimizer = MultiTaskOptimizer(inner, run.weighting, **options)

    def whole(self):
        return {name: on_cpu(p.full_tensor()) for name, p in self.model.named_parameters()}


SHARDED = {
    repr(weighting): Run(weighting, steps=3, options=options)
    for weighting, options in ((UW(), {}), (FAMO(), {}), (DWA(), {}), (MGDA(), {"engine": "features"}))
}


@of_two
def sharded(count, rank, device):
    found = {}
    for name, run in SHARDED.items():
        training = Sharded(run, count, rank, device=device)
        for k in range(run.steps):
            training.step(k)
        found[name] = training.whole()
    return found


@of_two
def sharded_and_refused(count, rank, device):
    found = {}
    weightings = (MGDA(), GradDrop(), SLGrad("0"), L2RW(), SLGrad("0", replay="official"))
    runs = [Run(UW(), options={"heads": "unweighted"}), Run(UW(), options={"outer": "bias"}), *map(Run, weightings)]
    for run in runs:
        training = Sharded(run, count, rank, device=device)
        before = training.whole()
        heard = message(lambda training=training: training.combine(0))
        found[repr(run)] = heard, equal(before, training.whole())
    return found


@of_two
def flattened(_count, _rank, device):
    """FSDP1, whose parameters are flat, or pieces of flat ones."""
    found = {}
    for pieces in (False, True):
        for weighting in (MGDA(), GradDrop(), SLGrad("0"), UW()):
            torch.manual_seed(0)
            network = Network(("0", "1")).to(device)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = FullyShardedDataParallel(network, use_orig_params=pieces, device_id=torch.device(device))
            shared = network.encoder if pieces else model
            optimizers = [
                MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), weighting, shared=shared, **options)
                for options in ({}, {"process_group": None})
            ]
            heard = []
            for optimizer in optimizers[: 2 if weighting == UW() else 1]:

                def act(optimizer=optimizer, model=model):
                    optimizer.zero_grad()
                    losses = model(torch.ones(3, 4, device=device))
                    reference = model(torch.ones(2, 4, device=device))["0"].square().mean()
                    optimizer.combine({t: y.square() for t, y in losses.items()}, reference=reference).backward()
                    optimizer.step()

                heard.append(message(act))
            found[f"{weighting!r}, {pieces}"] = heard
    return found


@of_two
def sharded_and_not_finite(count, rank, device):
    """A bad loss, then a gradient that is bad in one process's piece alone."""
    run = Run(UW(), options={"on_nonfinite": "skip"})
    training = Sharded(run, count, rank, device=device)
    training.step(0)
    before = training.whole()
    losses = training.losses(1)
    losses["1"] = losses["1"] * (torch.nan if rank == 0 else 1)
    training.step(1, losses=losses)
    after_loss = training.whole()
    training.optimizer.zero_grad()
    training.combine(2).backward()
    if rank == 0:
        next(p for p in training.model.parameters() if p.grad is not None).grad.to_local().fill_(torch.nan)
    training.optimizer.step()
    after_gradient, skipped = training.whole(), training.optimizer.report.skipped
    training.step(3)
    return before, after_loss, after_gradient, skipped, training.whole()


class Redundant(Training):
    """The same with an optimizer whose state is shared out."""

    def wrapped(self, inner):
        if self.rank is None:
            return inner
        from torch.distributed.optim import ZeroRedundancyOptimizer  # warns when imported

        return ZeroRedundancyOptimizer(self.model.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9)


@of_two
def redundant(count, rank, device):
    found = {}
    for weighting in (UW(), MGDA(), SLGrad("0")):
        training = Redundant(Run(weighting, steps=3), count, rank, device=device)
        for k in range(3):
            training.step(k)
        found[repr(weighting)] = on_cpu(training.model.state_dict())
    ahead = Redundant(Run(SLGrad("0", lookahead=True)), count, rank, device=device)
    return found, message(lambda: ahead.combine(0))
