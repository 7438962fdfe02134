"""Weightings that look at the same batch again after the step."""

import copy
import random
import weakref
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from mtlweight import DWA, FAMO, MGDA, MTLWeightError, MultiTaskOptimizer, Needs, PCGrad, Weighting, ema, every
from tests.problems import Problem, own, plain_step, same, step, wrap


@dataclass(frozen=True)
class Looking(Weighting):
    """Equal weights; keeps the losses before and after the step."""

    needs = Needs.LOSSES
    observes = True

    def init(self, view):
        return {"before": {}, "after": {}}

    def weigh(self, view, state):
        return torch.ones_like(view.losses), {**state, "before": view.scatter(state["before"], view.losses)}

    def observe(self, view, state):
        return {**state, "after": view.scatter(state["after"], view.losses)}


class Noisy(nn.Module):
    """Whatever a second look could disturb: BatchNorm's buffers and dropout's random numbers."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.heads = nn.ModuleDict({task: nn.Linear(8, 1) for task in ("left", "right")})

    def losses(self, x):
        features = self.body(x)
        return {task: head(features).square().mean() for task, head in self.heads.items()}


def noisy():
    torch.manual_seed(0)
    model = Noisy()
    return model, torch.randn(16, 4)


def values(table):
    return {task: float(value) for task, value in table.items()}


def test_observe_sees_the_same_batchs_losses_at_the_new_parameters():
    p = Problem()
    optimizer = wrap(p, Looking())
    for k in range(3):
        with torch.no_grad():
            before = values(p.losses(k))
        step(optimizer, lambda k=k: p.losses(k))
        with torch.no_grad():
            after = values(p.losses(k))
        state = own(optimizer)["state"]
        assert values(state["before"]) == pytest.approx(before, rel=1e-12)
        assert values(state["after"]) == pytest.approx(after, rel=1e-12)
        assert before != after


@pytest.mark.parametrize("named", ["model", "shared"])
def test_the_second_look_leaves_buffers_and_random_numbers_untouched(named):
    model, x = noisy()
    twin = copy.deepcopy(model)
    parts = {"model": model} if named == "model" else {"shared": [model.body, model.heads]}
    optimizer = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), Looking(), **parts)
    bare = torch.optim.SGD(twin.parameters(), lr=0.1)
    torch.manual_seed(1)
    for _ in range(4):
        step(optimizer, lambda: model.losses(x))
    random = torch.get_rng_state()
    torch.manual_seed(1)
    for _ in range(4):
        plain_step(bare, twin.losses(x))
    assert torch.equal(random, torch.get_rng_state())
    assert same(dict(model.state_dict()), dict(twin.state_dict()))  # the buffers are in it
    assert int(model.body[1].num_batches_tracked) == 4


def test_dropout_draws_the_same_masks_in_the_second_look():
    model, x = noisy()
    optimizer = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), Looking(), model=model)
    seen = []
    for _ in range(3):
        step(optimizer, lambda: model.losses(x))
        state = own(optimizer)["state"]
        assert values(state["before"]) == values(state["after"])  # lr = 0: only another mask could tell them apart
        seen.append(values(state["before"])["left"])
    assert len(set(seen)) == 3  # while each step has masks of its own


DRAWS = {
    "torch": lambda: float(torch.rand(())),
    "Python": random.random,
    "numpy": np.random.random_sample,
}
"""Global random numbers, as augmentations of data draw them."""


def global_states():
    return torch.get_rng_state().tolist(), random.getstate(), [*map(str, np.random.get_state())]  # noqa: NPY002


@pytest.mark.parametrize("source", DRAWS)
@pytest.mark.parametrize("in_parts", [False, True])
def test_the_second_look_draws_the_global_random_numbers_of_the_first_wherever_they_come_from(source, in_parts):
    p = Problem()
    optimizer = MultiTaskOptimizer(torch.optim.SGD(p.model.parameters(), lr=0.0), Looking())
    drawn, seen = [], []

    def noisy():
        drawn.append(DRAWS[source]())
        return {task: loss * (1 + drawn[-1]) for task, loss in p.samples().items()}

    for _ in range(3):
        step(optimizer, [noisy, noisy] if in_parts else noisy)
        state = own(optimizer)["state"]
        assert values(state["before"]) == values(state["after"])  # lr = 0: only other numbers could tell them apart
        seen.append(values(state["before"])["left"])
    assert len(set(seen)) == 3  # while each step has numbers of its own


def test_after_the_second_look_all_global_random_numbers_go_on_as_after_one_evaluation():
    p, q = Problem(), Problem()
    optimizer, bare = MultiTaskOptimizer(p.sgd(), Looking()), q.sgd()

    def noisy(problem):
        return {task: loss * (1 + sum(draw() for draw in DRAWS.values())) for task, loss in problem.losses().items()}

    ends = []
    for train in (lambda: step(optimizer, lambda: noisy(p)), lambda: plain_step(bare, noisy(q))):
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002
        for _ in range(3):
            train()
        ends.append(global_states())
    assert ends[0] == ends[1]
    assert same(p.parameters(), q.parameters())


def with_a_derivative(p, k=0):
    """A physics-informed loss beside a plain one: it has a derivative inside."""
    x, y = p.batch(k)
    x.requires_grad_()
    outputs = p.model(x)
    (slope,) = torch.autograd.grad(outputs["left"].sum(), x, create_graph=True)
    return {"left": slope.square().sum(dim=1).mean(), "right": (outputs["right"] - y["right"]).square().mean()}


@pytest.mark.parametrize("each", [Looking(), FAMO()], ids=repr)
def test_losses_with_derivatives_inside_are_looked_at_again(each):
    p = Problem()
    optimizer = wrap(p, each)
    for k in range(2):
        step(optimizer, lambda k=k: with_a_derivative(p, k))
    assert optimizer.report.step == 2
    if isinstance(each, Looking):
        assert values(own(optimizer)["state"]["after"]) == pytest.approx(
            {task: loss.item() for task, loss in with_a_derivative(p, 1).items()}, rel=1e-12
        )


def test_the_second_look_runs_the_code_that_the_first_one_ran():
    """Layers may ask whether gradients are enabled, which mode they are in, and under which autocast."""
    p, seen = Problem(), []
    optimizer = wrap(p, Looking(), model=p.model)
    p.model.encoder.eval()

    def looking(_module, _args, output):
        modes = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), p.model.training, p.encoder.training
        seen.append((*modes, torch.is_inference_mode_enabled(), output.requires_grad))

    p.encoder.register_forward_hook(looking)
    with torch.autocast("cpu", torch.bfloat16):
        scalar = optimizer.combine(p.losses)
    scalar.backward()
    optimizer.step()
    first, second = seen
    assert first == second == (True, True, True, False, False, True)


class Marked(torch.autograd.Function):
    """Hangs an object into the graph, by which one can tell how long it lives."""

    @staticmethod
    def forward(ctx, x, alive):
        ctx.kept = Problem()
        alive.append(weakref.ref(ctx.kept))
        return x.clone()

    @staticmethod
    def backward(_ctx, incoming):
        return incoming, None


def test_the_second_look_leaves_gradients_alone_and_frees_each_graph_before_the_next():
    p, alive, counts = Problem(), [], []
    optimizer = wrap(p, Looking())

    def part():
        counts.append(sum(each() is not None for each in alive))
        return {task: Marked.apply(loss, alive) for task, loss in p.samples().items()}

    optimizer.combine([part, part, part]).backward()
    before = p.gradients()
    del alive[:], counts[:]
    optimizer.step()
    assert counts == [0, 0, 0]
    assert same(p.gradients(), before)


class OutOfOrderError(Exception):
    """Of the user's."""


@pytest.mark.parametrize("each", [Looking(), FAMO(), DWA() >> Looking()], ids=repr)
def test_an_error_in_the_second_look_is_raised_after_the_step_that_was_taken_has_been_committed(each):
    p, q, calls = Problem(), Problem(), []
    optimizer, other = wrap(p, each), wrap(q, each)

    def failing():
        calls.append(len(calls))
        if len(calls) == 2:
            random.random()
            raise OutOfOrderError
        return p.losses()

    start = global_states()
    scalar = optimizer.combine(failing)
    scalar.backward()
    pending = copy.deepcopy(optimizer._record.pending.state)
    with pytest.raises(OutOfOrderError):
        optimizer.step()
    step(other, q.losses)
    assert same(p.parameters(), q.parameters())  # it was taken
    assert optimizer.report.step == own(optimizer)["step"] == 1
    assert same(own(optimizer)["state"], pending)  # what was decided before the look
    assert optimizer.report.fallbacks == {"the losses after the step could not be evaluated: not observed": 1}
    assert global_states() == start
    step(optimizer, lambda: p.losses(1))  # and goes on
    assert optimizer.report.step == 2


def test_a_second_look_that_finds_no_loss_of_a_task_says_so():
    p, calls = Problem(), []
    optimizer = wrap(p, FAMO())

    def forgetful():
        calls.append(0)
        losses = p.losses()
        return losses if len(calls) == 1 else {"left": losses["left"]}

    optimizer.combine(forgetful).backward()
    with pytest.raises(MTLWeightError, match=r"FAMO looks .* again .* same tasks, found none of right\. Take the data"):
        optimizer.step()
    assert optimizer.report.step == 1


@pytest.mark.parametrize("each", [Looking() >> PCGrad(), DWA() >> Looking(), ema(Looking())], ids=repr)
def test_a_part_of_a_combinator_observes_too(each):
    p = Problem()
    optimizer = wrap(p, each, shared=p.encoder)
    for _ in range(2):
        step(optimizer, p.losses)
    with torch.no_grad():
        after = values(p.losses())
    states = [s for s in own(optimizer)["state"].values() if "after" in s]
    assert len(states) == 1
    assert values(states[0]["after"]) == pytest.approx(after, rel=1e-12)


def test_absent_tasks_are_not_observed():
    p = Problem()
    optimizer = wrap(p, Looking())
    step(optimizer, p.losses)
    kept = own(optimizer)["state"]["after"]["right"].clone()
    step(optimizer, lambda: {**p.losses(1), "right": None})
    assert torch.equal(own(optimizer)["state"]["after"]["right"], kept)


def test_dropped_tasks_are_not_observed():
    p = Problem()
    optimizer = wrap(p, Looking(), on_nonfinite="drop")
    step(optimizer, lambda: {**p.losses(), "right": p.losses()["right"] * torch.nan})
    assert set(own(optimizer)["state"]["after"]) == {"left"}
    assert optimizer.report.fallbacks == {}


def test_a_step_that_is_not_taken_is_not_observed():
    p = Problem()
    optimizer = wrap(p, Looking(), on_nonfinite="skip")
    step(optimizer, p.losses)
    before = copy.deepcopy(own(optimizer)["state"])
    optimizer.combine(lambda: p.losses(1)).backward()
    step(optimizer, lambda: {"left": p.losses(2)["left"] * torch.nan})
    assert same(own(optimizer)["state"], before)


def test_losses_that_are_not_finite_after_the_step_are_not_observed_and_counted():
    p = Problem()
    optimizer = MultiTaskOptimizer(torch.optim.SGD(p.model.parameters(), lr=1e300), Looking())
    step(optimizer, p.losses)
    assert own(optimizer)["state"]["after"] == {}
    assert list(optimizer.report.fallbacks.values()) == [1]
    assert "losses after the step were not finite" in next(iter(optimizer.report.fallbacks))


def test_a_state_that_is_not_finite_after_observe_is_not_kept_and_counted():
    @dataclass(frozen=True)
    class Breaking(Looking):
        def observe(self, view, state):
            return {**state, "after": view.scatter(state["after"], view.losses * torch.inf)}

    p = Problem()
    optimizer = wrap(p, Breaking())
    step(optimizer, p.losses)
    assert own(optimizer)["state"]["after"] == {}
    assert sum(optimizer.report.fallbacks.values()) == 1
    assert optimizer.report.step == 1


@pytest.mark.parametrize("given", ["mapping", "tensor"])
def test_losses_that_are_computed_already_are_an_error_that_says_what_to_pass(given):
    p = Problem(("0", "1"))
    optimizer = wrap(p, Looking())
    step(optimizer, p.losses)
    before = p.everything(optimizer)
    losses = p.losses() if given == "mapping" else torch.stack(list(p.losses().values()))
    with pytest.raises(MTLWeightError, match=r"Looking.* expected losses as a callable, found computed ones. Pass"):
        optimizer.combine(losses)
    assert same(p.everything(optimizer), before)


@pytest.mark.parametrize("each", [every(3, FAMO(decay=0)), ema(every(3, FAMO(decay=0)) >> DWA())], ids=repr)
def test_between_renewals_every_neither_looks_again_nor_learns(each):
    p, calls = Problem(), []
    optimizer = MultiTaskOptimizer(torch.optim.SGD(p.model.parameters(), lr=0.0), each)

    def losses(k):
        calls.append(k)
        return p.losses(k)

    for k in range(5):  # other batches, at the same parameters: nothing has improved
        step(optimizer, lambda k=k: losses(k))
    assert calls == [0, 0, 1, 2, 3, 3, 4]
    state = own(optimizer)["state"]
    while "kept" not in state:
        state = state["0"]
    assert values(state["0"]["logit"]) == {"left": 0.0, "right": 0.0}


def test_a_callable_that_returns_the_tensors_of_its_first_call_is_an_error_after_the_step_is_committed():
    p = Problem()
    optimizer = wrap(p, FAMO())
    computed = p.losses()
    optimizer.combine(lambda: computed).backward()
    with pytest.raises(MTLWeightError, match="computed anew, found the tensors of the first time"):
        optimizer.step()
    assert optimizer.report.step == 1


class Advancing(torch.nn.Module):
    """Its output depends on a buffer that it changes, as with spectral norms and codebooks."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x * (1 + 1 / self.calls)


def test_the_losses_after_a_step_are_seen_with_the_buffers_that_the_first_ones_began_with():
    p = Problem()
    p.encoder.append(Advancing())
    seen = []

    def losses():
        found = p.losses()
        seen.append([float(loss.detach()) for loss in found.values()])
        return found

    optimizer = MultiTaskOptimizer(p.sgd(lr=0.0), FAMO(), shared=p.encoder, model=p.model)
    for k in range(3):
        step(optimizer, losses)
        assert seen[-1] == seen[-2]
        assert float(p.encoder[-1].calls) == k + 1


def test_the_look_after_a_step_leaves_no_graph_in_the_record_of_the_representation():
    p = Problem()
    optimizer = wrap(p, FAMO() >> MGDA(), shared=p.encoder, engine="features")
    step(optimizer, p.losses)
    assert optimizer._record.settings.capture.take() == []
