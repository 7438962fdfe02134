"""Losses in parts, for batches too large for memory: the step is that of the whole batch."""

import copy
import functools

import pytest
import torch
from torch import nn

from mtlweight import (
    FAMO,
    MGDA,
    UW,
    Equal,
    ExcessMTL,
    GradDrop,
    MTLWeightError,
    MultiTaskOptimizer,
    PCGrad,
    SLGrad,
    every,
)
from tests.problems import Problem, same_numbers, step, wrap
from tests.zoo import NETWORKS, SEED, Recipe, TwoTasks, close, numbers, problem

CUTS = [slice(0, 1), slice(1, 4), slice(4, 6)]
WEIGHTINGS = [
    Equal(),
    FAMO(),
    UW(step_size=0.5) >> MGDA(),
    SLGrad("left"),
    SLGrad("left", scope="main", learn_reference=True, temperature=0.5),
    SLGrad("left") >> PCGrad(),
    UW() >> SLGrad("left", normalize="task"),
    SLGrad("left", lookahead=True),
    SLGrad("left", lookahead=True, samples_at="ahead"),
    every(2, SLGrad("left")),
]


def part_of(p, k, cut):
    x, y = p.batch(k)
    outputs = p.model(x[cut])
    return {task: (outputs[task] - y[task][cut]).square() for task in p.tasks}


def parts(p, k=0):
    return [lambda cut=cut: part_of(p, k, cut) for cut in CUTS]


@pytest.mark.parametrize("by", WEIGHTINGS, ids=repr)
@pytest.mark.parametrize("heads", ["weighted", "unweighted"])
@pytest.mark.parametrize("masked", [False, True])
def test_steps_are_those_of_the_whole_batch(by, heads, masked):
    p, q = Problem(), Problem()
    optimizer, other = (wrap(each, by, shared=each.encoder, model=each.model, heads=heads) for each in (p, q))
    mask = {"right": torch.tensor([0, 1, 0, 1, 1, 0]).bool()}  # the first part has no label on the right
    masks = [{"right": mask["right"][cut]} for cut in CUTS]
    for k in range(3):
        value = step(optimizer, parts(p, k), reference=p.reference, mask=masks if masked else None)
        expected = step(other, lambda k=k: q.samples(k), reference=q.reference, mask=mask if masked else None)
        same_numbers(value, expected, rtol=1e-9)
        same_numbers(optimizer.report.weights, other.report.weights, rtol=1e-9)
        same_numbers(p.parameters(), q.parameters(), rtol=1e-9)
        assert optimizer.report.task_losses == pytest.approx(other.report.task_losses)


@pytest.mark.parametrize("engine", ["forward", "pullback", "samples", "rows", "batched"])
def test_every_engine_measures_parts(engine):
    p, q = Problem(), Problem()
    optimizer, other = (
        wrap(each, SLGrad("left") >> MGDA(), shared=each.encoder, model=each.model, engine=engine) for each in (p, q)
    )
    step(optimizer, parts(p), reference=p.reference)
    step(other, q.samples, reference=q.reference)
    assert optimizer.report.engine == other.report.engine
    same_numbers(p.parameters(), q.parameters(), rtol=1e-9)


def noisy():
    return TwoTasks(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4)), 4)


def test_masks_and_running_statistics_are_those_of_one_pass_over_the_parts():
    p = problem(Recipe(noisy, numbers(5)))
    cuts = [slice(0, 3), slice(3, 6)]

    def part(model, cut):
        outputs = model(p.x[cut])
        return {task: output.square().mean(dim=1) for task, output in outputs.items()}

    once = copy.deepcopy(p.model)
    optimizer = MultiTaskOptimizer(
        torch.optim.SGD(p.model.parameters(), lr=0.1), SLGrad("left"), shared=p.model.encoder, model=p.model
    )
    torch.manual_seed(SEED)
    held_out = p.model.eval()(p.held_out)["left"].square().mean()  # no masks, no statistics
    p.model.train()
    optimizer.combine([lambda cut=cut: part(p.model, cut) for cut in cuts], reference=held_out).backward()
    after = torch.get_rng_state()
    optimizer.step()
    torch.manual_seed(SEED)
    rows = [part(once, cut) for cut in cuts]
    assert torch.equal(torch.get_rng_state(), after)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(p.model.buffers(), once.buffers(), strict=True))
    losses = torch.cat([torch.stack([*row.values()]) for row in rows], dim=1)
    (optimizer.report.weights * losses).sum().backward()
    for a, b in zip(p.model.parameters(), once.parameters(), strict=True):
        assert close(a.grad, b.grad, 1e-9) or not b.grad.abs().max() > 1e-12  # a bias before BatchNorm has none


def test_only_one_parts_graph_is_alive_at_a_time():
    p = problem(NETWORKS["linear"])
    alive, most = [0], [0]

    class Counted(torch.autograd.Function):
        """Counts the graphs that it is part of."""

        @staticmethod
        def forward(ctx, x):
            ctx.token = Token()
            return x.clone()

        @staticmethod
        def backward(_ctx, incoming):
            return incoming

    class Token:
        def __init__(self):
            alive[0] += 1
            most[0] = max(most[0], alive[0])

        def __del__(self):
            alive[0] -= 1

    def part(i):
        outputs = p.model(p.x[i : i + 1])
        return {task: Counted.apply(output).square().mean(dim=1) for task, output in outputs.items()}

    optimizer = MultiTaskOptimizer(
        torch.optim.SGD(p.model.parameters(), lr=0.1),
        SLGrad("left") >> PCGrad(),
        shared=p.model.encoder,
        engine="pullback",
    )
    optimizer.combine([lambda i=i: part(i) for i in range(6)], reference=p.reference).backward()
    assert most[0] <= 2 * 2  # two tasks; the last part may go as the next one comes


def test_a_part_that_takes_other_data_the_second_time_is_noticed():
    p = Problem()
    batches = iter(range(10))
    optimizer = wrap(p, SLGrad("left"), shared=p.encoder)
    with pytest.raises(MTLWeightError, match="evaluated twice: expected the same ones each time, found others of task"):
        optimizer.combine([lambda: p.samples(next(batches))], reference=p.reference)


def test_a_task_that_is_not_finite_is_dropped_from_all_parts():
    p, q = Problem(), Problem()
    optimizer = wrap(p, SLGrad("left"), shared=p.encoder, on_nonfinite="drop")
    other = wrap(q, SLGrad("left"), shared=q.encoder)
    bad = lambda cut: {**part_of(p, 0, cut), "right": part_of(p, 0, cut)["right"] * torch.nan}  # noqa: E731
    step(optimizer, [lambda cut=cut: bad(cut) for cut in CUTS], reference=p.reference)
    step(other, lambda: {**q.samples(), "right": None}, reference=q.reference)
    assert dict(optimizer.report.dropped) == {"right": 1}
    same_numbers(p.parameters(), q.parameters(), rtol=1e-9)


@pytest.mark.parametrize(
    ("by", "options", "given", "message"),
    [
        (GradDrop(), {}, {}, "per gradient entry: expected the losses of the whole batch at once"),
        (MGDA(), {"engine": "features"}, {}, "the representation of the whole batch: expected its losses at once"),
        (Equal(), {}, {"mask": [None]}, "expected a list of 3 masks .* found list beside 3"),
        (Equal(), {}, {"mask": {}}, "expected a list of 3 masks .* found dict beside 3"),
    ],
)
def test_what_parts_cannot_do_says_so(by, options, given, message):
    p = Problem()
    optimizer = wrap(p, by, shared=p.encoder, **options)
    with pytest.raises(MTLWeightError, match=message):
        optimizer.combine(parts(p), **given)


def test_parts_of_scalars_say_that_they_come_per_sample():
    p = Problem()
    with pytest.raises(MTLWeightError, match=r"in parts come per sample.* found scalars\. Compute"):
        wrap(p, Equal()).combine([p.losses, p.losses])


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("by", [*WEIGHTINGS, ExcessMTL()], ids=repr)
def test_a_part_without_any_task_is_as_if_it_were_not_there(by, place):
    p, q = Problem(), Problem()
    for each in (p, q):
        each.model.encoder.append(nn.Dropout(0.5))
    optimizer, other = (wrap(each, by, shared=each.encoder, model=each.model) for each in (p, q))

    def draws(part):
        torch.rand(3)  # as a model does that is called for nothing
        return part()

    for k in range(2):
        with_gap, without = parts(p, k), parts(q, k)
        with_gap.insert(place, lambda: draws(lambda: dict.fromkeys(p.tasks)))
        without[place] = functools.partial(draws, without[place])
        for each, losses, problem_ in ((optimizer, with_gap, p), (other, without, q)):
            torch.manual_seed(k)
            step(each, losses, reference=problem_.reference)
        same_numbers(p.parameters(), q.parameters(), rtol=1e-9)


@pytest.mark.parametrize("by", [UW(), MGDA(), SLGrad("left")], ids=repr)
def test_a_part_whose_only_task_is_dropped_is_as_if_it_were_not_there(by):
    p, q = Problem(), Problem()
    dropping = wrap(p, by, shared=p.encoder, on_nonfinite="drop")
    bad = lambda: {"left": None, "right": p.samples()["right"] * torch.nan}  # noqa: E731
    step(dropping, [lambda: {**p.samples(), "right": None}, bad], reference=p.reference)
    step(wrap(q, by, shared=q.encoder), lambda: {**q.samples(), "right": None}, reference=q.reference)
    assert dict(dropping.report.dropped) == {"right": 1}
    same_numbers(p.parameters(), q.parameters(), rtol=1e-9)


class Added(nn.Module):
    """Two long parameters that are added: autograd gives both the same gradient."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.zeros(1 << 17, dtype=torch.float64)) for _ in range(2))

    def losses(self, x):
        total = self.first + self.second
        return {"left": (x * total).sum(dim=1) + 1, "right": (x.square() * total).sum(dim=1) + total.sum()}


def test_parameters_that_share_one_gradient_get_each_their_own_in_parts_too():
    x = torch.randn(4, 1 << 17, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for cuts in ([slice(0, 4)], [slice(0, 1), slice(1, 3), slice(3, 4)]):
        model = Added()
        optimizer = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), MGDA(), shared=model)
        step(optimizer, [functools.partial(model.losses, x[cut]) for cut in cuts])
        found.append((optimizer.report.gramian, model.first.grad, model.second.grad))
    same_numbers(found[1], found[0], rtol=1e-9)
