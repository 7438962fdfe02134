"""A task keeps its place: whatever the order of the mapping at hand, whoever is absent, in parts and micro-batches."""

import functools
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtlweight import (
    COSMOS,
    FAMO,
    PBI,
    PCD,
    RLW,
    STCH,
    UW,
    Constant,
    GradVac,
    MTLWeightError,
    MultiTaskOptimizer,
    Needs,
    PCGrad,
    SLGrad,
    View,
    weighting,
)
from mtlweight._statistics import Given
from mtlweight._weighting import evaluate
from tests.optimizer.registered import every_weighting
from tests.problems import Problem, own, same, same_numbers, step
from tests.registry import BY_READING

TOGETHER = [case for case in BY_READING if case.weighting.writes != "entry" and min(case.tasks) <= 3]


def tasks_of(case):
    return tuple(map(str, range(3 if 3 in case.tasks else max(case.tasks))))


def optimizer_of(p, weighting, **options):
    # Without momentum, which moves the head of an absent task if its gradient is zero, and not if it has none.
    sgd = torch.optim.SGD(p.model.parameters(), lr=0.05)
    return MultiTaskOptimizer(sgd, weighting, shared=p.encoder, model=p.model, **options)


def turned(losses, turn):
    """The same losses in another order."""
    names = list(losses)
    names = names[turn % len(names) :] + names[: turn % len(names)]
    return {name: losses[name] for name in (names if turn % 2 else names[::-1])}


def report_of(optimizer):
    report = optimizer.report
    parts = (report.losses, report.weights, report.gramian, report.alignment, report.task_losses, report.task_weights)
    return [report.tasks, *(dict(part) if isinstance(part, dict) else part for part in parts)]


@every_weighting
def test_a_task_keeps_its_place_whatever_the_order_of_the_mapping(case):
    p, q = Problem(tasks_of(case)), Problem(tasks_of(case))
    optimizer, other = (optimizer_of(each, case.weighting) for each in (p, q))
    for k in range(4):
        step(optimizer, functools.partial(p.samples, k), reference=p.reference)
        step(other, lambda k=k: turned(q.samples(k), k) if k else q.samples(k), reference=q.reference)
        assert same(report_of(optimizer), report_of(other))
        assert list(other.report.tasks) == list(q.tasks)
    assert same(p.everything(optimizer), q.everything(other))


@every_weighting
def test_places_are_saved_with_the_state(case):
    p, q = Problem(tasks_of(case)), Problem(tasks_of(case))
    optimizer, other = (optimizer_of(each, case.weighting) for each in (p, q))
    for k in range(2):
        step(optimizer, functools.partial(p.samples, k), reference=p.reference)
    file = io.BytesIO()
    torch.save([p.model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    model, saved = torch.load(file, weights_only=True)
    q.model.load_state_dict(model)
    other.load_state_dict(saved)
    step(optimizer, functools.partial(p.samples, 2), reference=p.reference)
    step(other, lambda: turned(q.samples(2), 1), reference=q.reference)
    assert same(p.everything(optimizer), q.everything(other))


# By position, with tasks that come and go

POSITIONS = {
    "Constant": lambda give: Constant(give(2.0, 0.5, 3.0)),
    "COSMOS": lambda give: COSMOS(give(0.2, 0.5, 0.3), penalty=0.3),
    "PBI": lambda give: PBI(preference=give(1.0, 2.0, 3.0), ideal=give(0.0, -0.5, -1.0)),
    "STCH": lambda give: STCH(preference=give(1.0, 2.0, 3.0), ideal=give(0.0, -0.5, -1.0)),
    "FAMO": lambda give: FAMO(ideal=give(0.0, -0.5, -1.0)),
    "a callable": lambda give: COSMOS(lambda: give(0.2, 0.5, 0.3)),
    "inside a chain": lambda give: UW() >> Constant(give(2.0, 0.5, 3.0)),
}
ABC = ("a", "b", "c")


def in_order(*values):
    return list(values)


def by_name(*values):
    return dict(zip(ABC, values, strict=True))


@pytest.mark.parametrize("kind", POSITIONS)
@settings(max_examples=15)
@given(data=st.data())
def test_numbers_by_position_are_those_by_name_whoever_is_absent_and_in_whatever_order(kind, data):
    p, q = Problem(ABC), Problem(ABC)
    optimizer, other = (optimizer_of(each, POSITIONS[kind](give)) for each, give in ((p, in_order), (q, by_name)))
    present = st.lists(st.sampled_from(ABC), min_size=1, unique=True)
    for k in range(3):
        names = data.draw(present, label=f"tasks of step {k}") if k else ABC
        left_out = data.draw(st.booleans(), label="absent by None")

        def losses(problem, k=k, names=names, left_out=left_out):
            found = problem.losses(k)
            absent = {} if left_out or k == 0 else dict.fromkeys([t for t in ABC if t not in names])
            return {**{task: found[task] for task in names}, **absent}

        step(optimizer, functools.partial(losses, p))
        step(other, functools.partial(losses, q))
        assert same(report_of(optimizer), report_of(other))
    assert same(p.parameters(), q.parameters())


@pytest.mark.parametrize("form", ["None", "mask"])
def test_a_task_has_a_place_once_it_is_mentioned(form):
    p = Problem(("a", "b"))
    optimizer = optimizer_of(p, Constant([10.0, 1.0]))
    if form == "None":
        step(optimizer, {"a": None, "b": p.losses()["b"]})
    else:
        step(optimizer, p.samples(), mask={"a": torch.zeros(6, dtype=torch.bool)})
    assert optimizer.report.tasks == ("b",)
    assert optimizer.report.weights.tolist() == [1.0]
    assert own(optimizer)["tasks"] == ["a", "b"]


@pytest.mark.parametrize("kind", POSITIONS)
def test_numbers_by_position_ask_for_names_while_not_all_tasks_have_a_place(kind):
    p = Problem(ABC)
    optimizer = optimizer_of(p, POSITIONS[kind](in_order))
    before = p.everything(optimizer)
    wanted = r"expected 3 tasks, one for each number in \w+, found 2 \(b, a\)\. Give a mapping by name.* None"
    with pytest.raises(MTLWeightError, match=wanted):
        optimizer.combine(lambda: {task: p.losses()[task] for task in ("b", "a")})
    assert same(p.everything(optimizer), before)
    step(optimizer, lambda: {**p.losses(), "b": None})  # which mentions all, in another order
    assert own(optimizer)["tasks"] == ["a", "b", "c"]
    step(optimizer, lambda: {"b": p.losses(1)["b"]})
    assert optimizer.report.tasks == ("b",)


# Micro-batches, each with tasks of its own


def micro(p, k, task):
    """A micro-batch with one task."""
    x, y = p.batch(k)
    rows = slice(2 * p.tasks.index(task), 2 * p.tasks.index(task) + 2)
    return {task: (p.model(x[rows])[task] - y[task][rows]).square()}


def whole(p, k):
    """The same samples and labels as one batch."""
    mask = {t: torch.arange(6).div(2, rounding_mode="floor") == i for i, t in enumerate(p.tasks)}
    return functools.partial(p.samples, k), mask


@pytest.mark.parametrize("way", ["accumulate", "parts"])
@pytest.mark.parametrize("case", TOGETHER, ids=lambda case: repr(case.weighting))
def test_micro_batches_with_one_task_each_are_the_whole_batch(case, way):
    p, q = Problem(tasks_of(case)[:3]), Problem(tasks_of(case)[:3])
    optimizer, other = (optimizer_of(each, case.weighting) for each in (p, q))
    for k in range(3):
        order = p.tasks if k == 0 else turned(dict.fromkeys(p.tasks), k)
        parts = [functools.partial(micro, p, k, task) for task in order]
        optimizer.zero_grad()
        if way == "parts":
            optimizer.combine(parts, reference=p.reference).backward()
        else:
            for part in parts:
                with optimizer.accumulate(len(parts)):
                    (optimizer.combine(part, reference=p.reference) / len(parts)).backward()
        optimizer.step()
        losses, mask = whole(q, k)
        columns = torch.cat([torch.arange(6)[mask[task]] for task in order])
        taken = {t: row[columns] for t, row in mask.items()}
        step(other, lambda c=columns, f=losses: {t: x[c] for t, x in f().items()}, reference=q.reference, mask=taken)
        assert optimizer.report.tasks == other.report.tasks == q.tasks
        same_numbers(optimizer.report.weights, other.report.weights, rtol=1e-7)
        same_numbers(p.parameters(), q.parameters(), rtol=1e-7)
        same_numbers(own(optimizer)["state"], own(other)["state"], rtol=1e-7)


def test_new_tasks_of_parts_have_the_places_that_they_would_have_in_the_whole_batch():
    p = Problem(ABC)
    optimizer = optimizer_of(p, Constant([1.0, 2.0, 3.0]))

    def part(names):
        return {t: p.samples()[t] for t in names}

    step(optimizer, [lambda: part("ac"), lambda: part("abc")])
    assert optimizer.report.tasks == ("a", "b", "c")
    assert own(optimizer)["tasks"] == ["a", "b", "c"]


def test_each_micro_batch_of_a_step_sees_the_same_draw_for_its_task():
    p, q = Problem(ABC), Problem(ABC)
    optimizer, other = (optimizer_of(each, RLW(), seed=5) for each in (p, q))
    for each, problem in ((optimizer, p), (other, q)):
        step(each, problem.losses())
    ratios = {}
    with optimizer.accumulate(2, weigh="each"):
        for names in (("c", "b"), ("a", "b")):
            losses = p.losses(1)
            (optimizer.combine({t: losses[t] for t in names}) / 2).backward()
            weights = optimizer._record.pending.report.task_weights
            ratios.update({t: weights[t] / weights["b"] for t in names})
    step(other, q.losses(1))
    expected = other.report.task_weights
    assert ratios == pytest.approx({t: expected[t] / expected["b"] for t in ABC})


# Draws


@given(seed=st.integers(0, 2**32), k=st.integers(0, 100), present=st.sets(st.sampled_from(range(5)), min_size=1))
def test_a_random_weight_belongs_to_its_task_whoever_is_absent(seed, k, present):
    names = tuple("abcde")
    all_ = View(Given(losses=torch.ones(5), tasks=names), step=k, seed=seed)
    some = tuple(names[i] for i in sorted(present))
    view = View(Given(losses=torch.ones(len(some)), tasks=some, known=names), step=k, seed=seed)
    logs = evaluate(RLW(), all_, None)[0].log()[list(view.places)]
    assert torch.allclose(evaluate(RLW(), view, None)[0], logs.softmax(dim=0), rtol=1e-12)


@pytest.mark.parametrize("each", [PCGrad(), GradVac()], ids=repr)
@given(seed=st.integers(0, 2**32), m=st.integers(2, 6), data=st.data())
def test_a_random_order_of_others_is_the_same_whoever_is_absent(each, seed, m, data):
    """An absent task is a task with a zero gradient, which projects nothing and is projected by nothing."""
    names = tuple(map(str, range(m)))
    present = sorted(data.draw(st.sets(st.integers(0, m - 1), min_size=1)))
    order = data.draw(st.permutations(present))
    rows = torch.randn(m, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = torch.where(torch.tensor([[i in present] for i in range(m)]), rows, 0.0)
    expected = evaluate(each, View(Given(jacobian=rows, tasks=names), step=3, seed=seed), None)[0]
    given_ = Given(jacobian=rows[order], tasks=tuple(names[i] for i in order), known=names)
    found = evaluate(each, View(given_, step=3, seed=seed), None)[0]
    assert torch.allclose(found, expected[order], rtol=1e-9, atol=1e-12)


# Rows of a tensor


@pytest.mark.parametrize(
    ("case", "way"),
    [
        pytest.param(case, way, id=f"{case.weighting!r}-{way}")
        for case in BY_READING
        for way in ("whole", "parts")
        if way == "whole" or case.weighting.writes != "entry"  # weights per entry need the whole batch
    ],
)
def test_a_row_without_any_label_has_its_place_from_the_first_batch_on(case, way):
    p, q = Problem(tasks_of(case)), Problem(tasks_of(case))
    optimizer, other = (optimizer_of(each, case.weighting) for each in (p, q))
    missing = str(len(p.tasks) - 1) if len(p.tasks) > 1 else None
    main = case.weighting.reference.main if case.weighting.reference else ()
    missing = None if missing in main else missing
    cuts = (slice(0, 3), slice(3, 6)) if way == "parts" else (slice(0, 6),)
    for k, gone in enumerate((missing, None, missing if k_of(case) else None, None)):
        mask = torch.ones(len(p.tasks), 6, dtype=torch.bool)
        if gone is not None:
            mask[int(gone)] = False

        def part(problem, cut, k=k):
            return torch.stack([row[cut] for row in problem.samples(k).values()])

        closures = [functools.partial(part, p, cut) for cut in cuts]
        masks = [mask[:, cut] for cut in cuts]
        single = way == "whole"
        step(
            optimizer,
            closures[0] if single else closures,
            reference=p.reference,
            mask=masks[0] if single else masks,
        )
        step(other, lambda k=k, g=gone: {**q.samples(k), **({} if g is None else {g: None})}, reference=q.reference)
        assert optimizer.report.tasks == other.report.tasks
        same_numbers(optimizer.report.weights, other.report.weights, rtol=1e-7)
        same_numbers(p.parameters(), q.parameters(), rtol=1e-7)
        assert own(optimizer)["tasks"] == own(other)["tasks"] == list(p.tasks)


def k_of(case):
    """Whether a task may be absent again: not where the state's rows of it would be of the last batch alone."""
    return "replay" not in repr(case.weighting)


# What a weighting knows of places


def test_a_view_tells_all_tasks_that_have_a_place_and_the_places_of_those_that_are_present():
    seen = []

    @weighting(Needs.LOSSES)
    def looking(view):
        seen.append((view.tasks, view.places, view.known))
        return torch.ones_like(view.losses)

    p = Problem(ABC)
    optimizer = optimizer_of(p, Constant(1.0) >> looking)
    losses = p.losses()
    step(optimizer, {"b": losses["b"], "c": None})
    losses = p.losses(1)
    step(optimizer, {"a": losses["a"], "b": losses["b"]})
    losses = p.losses(2)
    step(optimizer, {"a": losses["a"], "c": losses["c"]})
    assert seen == [
        (("b",), (0,), ("b", "c")),
        (("b", "a"), (0, 2), ("b", "c", "a")),
        (("c", "a"), (1, 2), ("b", "c", "a")),
    ]
    looking(losses=torch.ones(2))
    assert seen[-1] == (("0", "1"), (0, 1), ("0", "1"))


def test_the_first_task_is_the_one_with_the_first_place():
    p = Problem(ABC)
    optimizer = optimizer_of(p, PCD())
    step(optimizer, {**p.losses(), "a": None})
    assert list(own(optimizer)["state"]["main"]) == ["a"]
    assert not optimizer.report.weights.any()
    step(optimizer, turned(p.losses(1), 1))
    assert optimizer.report.task_weights["a"] > 0


def test_masks_go_by_name_whatever_their_order_and_that_of_the_losses():
    p, q = Problem(ABC), Problem(ABC)
    optimizer, other = (optimizer_of(each, SLGrad("a")) for each in (p, q))
    masks = {t: torch.arange(6) % 3 != i for i, t in enumerate(ABC)}
    for k in range(2):
        step(optimizer, lambda k=k: p.samples(k), reference=p.reference, mask=masks)
        step(
            other,
            lambda k=k: q.samples(k) if k == 0 else turned(q.samples(k), k),
            reference=q.reference,
            mask=turned(masks, k + 1),
        )
    assert same(report_of(optimizer), report_of(other))
    assert same(p.parameters(), q.parameters())
    assert not math.isnan(sum(other.report.task_losses.values()))
