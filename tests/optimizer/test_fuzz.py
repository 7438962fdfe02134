"""Any sequence of what a training loop may do, beside the same by hand: a bare optimizer, weights, and plain counts."""

import contextlib
import copy
import io
import pickle
import warnings
from collections import Counter

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

from mtlweight import (
    DWA,
    FAMO,
    MGDA,
    RLW,
    UW,
    GradNorm,
    MultiTaskOptimizer,
    Needs,
    NonFiniteError,
    PCGrad,
    SLGrad,
    View,
    ema,
    every,
)
from mtlweight._statistics import Given
from mtlweight._weighting import evaluate
from tests.problems import own

# Random calls may add up the gradients of several combines, of which another file tests the warning.
pytestmark = pytest.mark.filterwarnings("ignore:mtlweight. combine was called again before step")
TASKS = ("a", "b", "c")
WEIGHTINGS = [
    UW(0.5),
    DWA(period=2),
    RLW(),
    MGDA(),
    PCGrad(),
    GradNorm(step_size=0.5),
    FAMO(step_size=0.5),
    SLGrad("a"),
    ema(UW(), decay=0.5),
    every(2, MGDA()),
    UW() >> PCGrad(),
]
INNER = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9),
    "Adam": lambda ps: torch.optim.Adam(ps, lr=0.01),
}
LOW = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Precisions in which both sides round in their own ways, and how far they may differ after one call."""
SEED = 4


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.3, -0.5], [0.8, 0.2]]))
        self.bias = nn.Parameter(torch.tensor([0.1, -0.1]))
        self.extras = nn.ParameterList()

    def forward(self, x):
        return (x @ self.weight + self.bias + sum(self.extras)).tanh()


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = Encoder()
        self.heads = nn.ParameterDict(
            {"a": torch.tensor([0.5, -1.0]), "b": torch.ones(2), "c": torch.tensor([-0.7, 0.4])}
        )
        self.double()

    def samples(self, k, tasks=TASKS, bad=()):
        """Losses per sample; ``None`` for absent tasks."""
        random = torch.Generator().manual_seed(k)
        data = torch.randn(3, 5, generator=random, dtype=torch.float64).to(self.encoder.weight.dtype)
        features = self.encoder(data[:, :2])
        losses = {t: (features @ self.heads[t] - data[:, 2 + i]).square() for i, t in enumerate(TASKS)}
        return {t: None if t not in tasks else loss * torch.nan if t in bad else loss for t, loss in losses.items()}

    def reference(self, k):
        return self.samples(k + 10)["a"].mean()


class ByHand:
    """What should happen, without engines and without a wrapper."""

    def __init__(self, weighting, policy, inner):
        self.weighting, self.policy = weighting, policy
        self.model = Network()
        self.inner = INNER[inner](self.model.parameters())
        self.step_count, self.state, self.tasks = 0, None, ()
        self.skipped, self.dropped = 0, Counter()
        self.pending, self.report = None, None

    def combine(self, k, tasks, bad):
        """What backward does; leaves what the step commits."""
        self.pending = None
        bad = [task for task in tasks if task in bad]
        if bad and self.policy == "raise":
            raise NonFiniteError("")
        present = [task for task in tasks if task not in bad]
        dropped = bad if self.policy == "drop" else []
        if not present or (bad and self.policy == "skip"):
            self.pending = {"skip": True, "dropped": dropped}
            trainable = [p for p in self.parameters() if p.requires_grad]
            return lambda: self.add_zeros(trainable)
        losses = torch.stack([loss for task, loss in self.model.samples(k).items() if task in present])
        given = {"losses": losses, "tasks": tuple(present), "known": TASKS, **self.measured(losses, k)}
        view = View(Given(**given), step=self.step_count, seed=SEED)
        weights, state = evaluate(self.weighting, view, self.state)
        self.pending = {
            "skip": False,
            "dropped": dropped,
            "state": state,
            "tasks": TASKS,  # absent ones are mentioned
            "report": {"tasks": tuple(present), "weights": weights},
            "batch": (k, present),
        }
        return (weights if weights.ndim == 2 else weights[:, None] / 3).to(losses.dtype).mul(losses).sum().backward

    def measured(self, losses, k):
        needs, found = self.weighting.needs, {}
        shared = [p for p in self.model.encoder.parameters() if p.requires_grad]

        def gradient(loss):
            parts = torch.autograd.grad(loss, shared, retain_graph=True)
            return torch.cat([part.flatten() for part in parts]).to(torch.promote_types(losses.dtype, torch.float32))

        if Needs.GRAMIAN in needs:
            found["jacobian"] = torch.stack([gradient(row.mean()) for row in losses])
        if Needs.ALIGNMENT in needs:
            reference = gradient(self.model.reference(k))
            found["alignment"] = torch.stack([torch.stack([gradient(x) @ reference for x in row]) for row in losses])
        return found

    @staticmethod
    def add_zeros(parameters):
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad

    def parameters(self):
        return [p for group in self.inner.param_groups for p in group["params"]]

    def finite(self):
        return all(bool(p.grad.isfinite().all()) for p in self.parameters() if p.grad is not None)

    def verdict(self):
        if self.pending is None:
            return "step"
        if self.pending["skip"]:
            return "skip"
        return "step" if self.finite() else "raise" if self.policy == "raise" else "skip"

    def commit(self, verdict):
        pending, self.pending = self.pending, None
        if pending is None:
            return
        self.dropped.update(pending["dropped"])
        if verdict == "skip":
            self.skipped += 1
            return
        self.step_count += 1
        self.state, self.tasks, self.report = pending["state"], pending["tasks"], pending["report"]
        if self.weighting.observes:
            k, present = pending["batch"]
            with torch.no_grad():
                after = torch.stack([loss for task, loss in self.model.samples(k).items() if task in present])
            view = View(Given(losses=after, tasks=tuple(present), known=TASKS), step=self.step_count - 1, seed=SEED)
            self.state = self.weighting.observe(view, self.state)

    COUNTS = ("step_count", "state", "tasks", "skipped", "dropped")

    def save(self):
        counts = {name: getattr(self, name) for name in self.COUNTS}
        return copy.deepcopy({"model": self.model.state_dict(), "inner": self.inner.state_dict(), "counts": counts})

    def load(self, saved):
        saved = copy.deepcopy(saved)  # a bare optimizer goes on with the very tensors that it loads
        self.model.load_state_dict(saved["model"])
        self.inner.load_state_dict(saved["inner"])
        self.pending, self.report = None, None
        for name, value in saved["counts"].items():
            setattr(self, name, value)


def scheduler_of(optimizer, before=None):
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.9)
    if before is not None:
        scheduler.load_state_dict(before)
    return scheduler


batches = st.integers(0, 3)
some_tasks = st.sampled_from([TASKS, TASKS, ("a", "b"), ("b", "c"), ("c",), ()])
bad_tasks = st.sampled_from([(), (), (), ("b",), ("a", "c"), TASKS])


class Loop(RuleBasedStateMachine):
    """Both sides, call by call."""

    @initialize(
        weighting=st.sampled_from(WEIGHTINGS),
        policy=st.sampled_from(["raise", "skip", "drop"]),
        inner=st.sampled_from(list(INNER)),
        callables=st.booleans(),
    )
    def start(self, weighting, policy, inner, callables):
        self.hand = ByHand(weighting, policy, inner)
        self.model = Network()
        self.inner, self.callables = inner, callables or weighting.observes
        self.optimizer = MultiTaskOptimizer(
            INNER[inner](self.model.parameters()),
            weighting,
            shared=self.model.encoder,
            model=self.model,
            on_nonfinite=policy,
            seed=SEED,
        )
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        self.scalars, self.saved, self.extras = [], [], 0
        self.fired, self.expected = [0, 0], [0, 0]
        self.schedulers = [scheduler_of(self.optimizer), scheduler_of(self.hand.inner)]
        self.watch()

    def watch(self):
        def count(i):
            self.fired[i] += 1

        self.optimizer.register_step_pre_hook(lambda *_: count(0))
        self.optimizer.register_step_post_hook(lambda *_: count(1))

    @property
    def dtype(self):
        return self.model.encoder.weight.dtype

    # The ordinary calls

    def given(self, k, tasks, bad):
        if self.callables:
            return (lambda: self.model.samples(k, tasks, bad)), lambda: {"a": self.model.reference(k)}
        return self.model.samples(k, tasks, bad), {"a": self.model.reference(k)}

    def combined(self, k, tasks, bad):
        """The scalar and the one by hand; or the same error from both."""
        losses, reference = self.given(k, tasks, bad)
        try:
            theirs = self.hand.combine(k, tasks, bad)
        except NonFiniteError:
            with pytest.raises(NonFiniteError, match="The loss of task"):
                self.optimizer.combine(losses, reference=reference)
            raise
        return self.optimizer.combine(losses, reference=reference), theirs

    def stepped(self, call):
        """Steps both, or expects the error; whether the wrapped optimizer stepped."""
        verdict = self.hand.verdict()
        if verdict == "raise":
            with pytest.raises(NonFiniteError, match="A gradient is not finite"):
                call()
            return False
        call()
        if verdict == "step":
            self.hand.inner.step()
            self.agree()
            self.scalars.clear()  # parameters have moved
            self.expected = [n + 1 for n in self.expected]
        self.hand.commit(verdict)
        return verdict == "step"

    @rule(k=batches, tasks=some_tasks, bad=bad_tasks)
    def combine(self, k, tasks, bad):
        with contextlib.suppress(NonFiniteError):
            self.scalars.append(self.combined(k, tasks, bad))

    @precondition(lambda self: self.scalars)
    @rule(which=st.integers(0, 3))
    def backward(self, which):
        ours, theirs = self.scalars.pop(which % len(self.scalars))
        ours.backward()
        theirs()

    @rule()
    def step(self):
        if self.hand.pending is None and not self.hand.finite():
            return  # the wrapped optimizer's own step, and its own ruin
        self.stepped(self.optimizer.step)

    @rule(to_none=st.booleans())
    def zero_grad(self, to_none):
        self.optimizer.zero_grad(set_to_none=to_none)
        self.hand.inner.zero_grad(set_to_none=to_none)

    @rule(
        k=batches,
        tasks=some_tasks,
        bad=bad_tasks,
        between=st.sampled_from(["nothing", "nothing", "a copy", "a load", "another combine", "a spoilt gradient"]),
    )
    def train(self, k, tasks, bad, between):
        self.zero_grad(True)
        try:
            ours, theirs = self.combined(k, tasks, bad)
        except NonFiniteError:
            return
        ours.backward()
        theirs()
        if between == "a copy":
            self.go_on_with_a_copy(copy.deepcopy)
        elif between == "a load" and self.saved:
            self.load(-1)
        elif between == "another combine":
            self.combine(k + 1, TASKS, bad)
        elif between == "a spoilt gradient":
            self.spoil_a_gradient(torch.inf)
        self.step()

    @rule(k=batches, tasks=some_tasks, bad=bad_tasks)
    def train_with_a_closure(self, k, tasks, bad):
        losses, reference = self.given(k, tasks, bad)

        def closure():
            self.optimizer.zero_grad()
            loss = self.optimizer.combine(losses, reference=reference)
            loss.backward()
            return loss

        self.expected[0] += 1  # the hook before the step fires before the closure is known to fail
        try:
            self.hand.inner.zero_grad()
            self.hand.combine(k, tasks, bad)()
        except NonFiniteError:
            with pytest.raises(NonFiniteError, match="The loss of task"):
                self.optimizer.step(closure)
            return
        if self.stepped(lambda: self.optimizer.step(closure)):
            self.expected[0] -= 1  # it is counted already

    # Steps that a gradient scaler takes or skips

    @rule(k=batches, tasks=some_tasks.filter(bool), overflows=st.booleans())
    def train_with_a_scaler(self, k, tasks, overflows):
        self.zero_grad(True)
        ours, theirs = self.combined(k, tasks, ())
        self.scaler.scale(ours).backward()
        theirs()
        if overflows:
            for model in (self.model, self.hand.model):
                model.encoder.weight.grad[0, 0] = torch.inf
            self.scaler.step(self.optimizer)
        else:
            self.stepped(lambda: self.scaler.step(self.optimizer))
        self.scaler.update()

    @precondition(lambda self: self.model.encoder.weight.grad is not None)
    @rule(value=st.sampled_from([torch.inf, torch.nan]))
    def spoil_a_gradient(self, value):
        for model in (self.model, self.hand.model):
            model.encoder.weight.grad[0, 1] = value

    # What surrounds a training

    @rule()
    def schedule(self):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of")  # of schedulers that step first
            for scheduler in self.schedulers:
                scheduler.step()

    @rule()
    def save(self):
        file = io.BytesIO()
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.schedulers[0]}
        torch.save({name: part.state_dict() for name, part in parts.items()}, file)
        self.saved.append((file, self.hand.save(), self.schedulers[1].state_dict(), self.extras))

    @precondition(lambda self: self.saved)
    @rule(which=st.integers(0, 3))
    def load(self, which):
        file, by_hand, scheduler, extras = self.saved[which % len(self.saved)]
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        if extras != self.extras:
            with pytest.raises(ValueError, match="different number of parameter groups"):
                self.optimizer.load_state_dict(saved["optimizer"])
            return
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.hand.load(by_hand)
        self.schedulers[0].load_state_dict(saved["scheduler"])
        self.schedulers[1].load_state_dict(scheduler)
        self.scalars.clear()

    @rule(copied=st.sampled_from([copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))]))
    def go_on_with_a_copy(self, copied):
        self.model, self.optimizer = copied((self.model, self.optimizer))
        self.hand.inner.zero_grad()  # a copied parameter has no gradient
        self.hand.pending = None
        self.schedulers[0] = scheduler_of(self.optimizer, self.schedulers[0].state_dict())
        self.scalars.clear()
        self.watch()

    @precondition(lambda self: self.extras < 2)
    @rule()
    def add_a_group(self):
        self.extras += 1
        for model, optimizer in ((self.model, self.optimizer), (self.hand.model, self.hand.inner)):
            model.encoder.extras.append(nn.Parameter(torch.full((2,), 0.1, dtype=self.dtype)))
            optimizer.add_param_group({"params": [model.encoder.extras[-1]], "lr": 0.02})

    @rule()
    def freeze_or_thaw(self):
        for model in (self.model, self.hand.model):
            model.encoder.bias.requires_grad_(not model.encoder.bias.requires_grad)
        self.scalars.clear()

    # Adam refuses a state of another dtype. What waits for its step would be compared in another precision.
    @precondition(lambda self: self.inner == "SGD" and self.hand.pending is None)
    @rule(dtype=st.sampled_from([torch.float64, torch.float64, *LOW]))
    def change_dtype(self, dtype):
        self.model.to(dtype)
        self.hand.model.to(dtype)
        self.scalars.clear()

    # What must hold after each call

    def agree(self):
        """Compares parameters, gradients and momenta; in low precision the other side then takes over ours."""
        ours, theirs = (
            self.tensors(*side) for side in ((self.model, self.optimizer), (self.hand.model, self.hand.inner))
        )
        assert ours.keys() == theirs.keys()
        for name, a in ours.items():
            self.close(a, theirs[name])
            if self.dtype in LOW:
                theirs[name].data.copy_(a)  # unseen by the graphs that still wait for their backward

    @staticmethod
    def tensors(model, inner):
        found = {}
        for name, p in model.named_parameters():
            kept = {key: value for key, value in inner.state.get(p, {}).items() if value is not None}
            found.update({(name, key): value for key, value in kept.items()})
            found.update({(name, "itself"): p} if p.grad is None else {(name, "itself"): p, (name, "gradient"): p.grad})
        return found

    def close(self, a, b):
        rtol = LOW.get(self.dtype, 1e-9)
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol, equal_nan=True)

    @invariant()
    def everything_is_as_by_hand(self):
        hand, kept, report = self.hand, own(self.optimizer), self.optimizer.report
        assert kept["step"] == report.step == hand.step_count
        assert kept["skipped"] == report.skipped == hand.skipped
        assert kept["dropped"] == report.dropped == dict(hand.dropped)
        assert tuple(kept["tasks"]) == hand.tasks
        assert report.tasks == (hand.report or {"tasks": ()})["tasks"]
        if hand.report is not None:
            self.close(report.weights, hand.report["weights"])
        self.agree()
        self.close(kept["state"] or {}, hand.state or {})
        assert (kept["state"] is None) == (hand.state is None)
        if self.dtype in LOW:
            hand.state = copy.deepcopy(kept["state"])
            if hand.report is not None:
                hand.report = {**hand.report, "weights": report.weights}
        assert self.fired == self.expected
        groups = zip(self.optimizer.param_groups, hand.inner.param_groups, strict=True)
        assert all(a["lr"] == b["lr"] for a, b in groups)


quick = settings().max_examples <= 100
TestLoop = Loop.TestCase
TestLoop.settings = settings(max_examples=25 if quick else 1000, stateful_step_count=30)
