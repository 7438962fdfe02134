"""Micro-batches one by one, as trainers hand them out: the step is that of the whole batch."""

import copy
import functools
import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mtlweight import (
    DWA,
    FAMO,
    MGDA,
    UW,
    Equal,
    MTLWeightError,
    MultiTaskOptimizer,
    NonFiniteError,
    SLGrad,
    every,
)
from tests.problems import Counting, Problem, own, same, same_numbers, step, wrap
from tests.registry import BY_READING

CUTS = (slice(0, 1), slice(1, 4), slice(4, 6))
MASK = {"1": torch.tensor([0, 1, 0, 1, 1, 0]).bool()}  # the first micro-batch has no label of the second task
TOGETHER = [case for case in BY_READING if case.weighting.writes != "entry"]
ENTRIES = [case.weighting for case in BY_READING if case.weighting.writes == "entry"]


def part_of(p, k, cut):
    x, y = p.batch(k)
    outputs = p.model(x[cut])
    return {task: (outputs[task] - y[task][cut]).square() for task in p.tasks}


def micro_batches(p, k=0, cuts=CUTS):
    return [functools.partial(part_of, p, k, cut) for cut in cuts]


def accumulated(optimizer, parts, *, count=None, divide=None, references=None, masks=None, scaler=None, **options):
    """The loop that trainers have: a scalar a micro-batch, divided by their number, then the step."""
    count = count or len(parts)
    divide = divide or count
    optimizer.zero_grad()
    values = []
    for i, part in enumerate(parts):
        given = {} if references is None else {"reference": references[i]}
        given.update({} if masks is None else {"mask": masks[i]})
        with optimizer.accumulate(count, **options):
            scalar = optimizer.combine(part, **given)
        (scalar / divide if scaler is None else scaler.scale(scalar / divide)).backward()
        values.append(scalar.detach())
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    return torch.stack(values)


def optimizers(weighting, *problems, **options):
    return [wrap(p, weighting, shared=p.encoder, model=p.model, **options) for p in problems]


@pytest.mark.parametrize("case", TOGETHER, ids=lambda case: repr(case.weighting))
def test_the_step_after_micro_batches_is_that_of_the_whole_batch(case):
    tasks = [str(i) for i in range(2 if 2 in case.tasks else case.tasks[0])]
    p, q = Problem(tasks), Problem(tasks)
    optimizer, other = optimizers(case.weighting, p, q)
    for k in range(3):
        mask = MASK if k % 2 else None
        masks = [{"1": MASK["1"][cut]} for cut in CUTS] if k % 2 else None
        values = accumulated(optimizer, micro_batches(p, k), references=[p.reference, None, None], masks=masks)
        value = step(other, lambda k=k: q.samples(k), reference=q.reference, mask=mask)
        same_numbers(values.mean(), value, rtol=1e-9)
        same_numbers(optimizer.report.weights, other.report.weights, rtol=1e-7)
        same_numbers(p.parameters(), q.parameters(), rtol=1e-7)
        same_numbers(own(optimizer)["state"], own(other)["state"], rtol=1e-7)
        assert optimizer.report.step == other.report.step == k + 1


@pytest.mark.parametrize("by", ENTRIES, ids=repr)
def test_weights_per_gradient_entry_say_that_they_need_the_whole_batch(by):
    p = Problem()
    (optimizer,) = optimizers(by, p)
    with pytest.raises(MTLWeightError, match="per gradient entry: expected the losses of the whole batch at once"):
        accumulated(optimizer, micro_batches(p))


@settings(max_examples=30)
@given(
    groups=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=4),
    by=st.sampled_from([UW(step_size=0.5) >> MGDA(), SLGrad("left"), FAMO(), every(2, DWA())]),
    told=st.booleans(),
    data=st.data(),
)
def test_groups_of_any_sizes_with_skipped_steps_between_are_steps_of_whole_batches(groups, by, told, data):
    p, q = Problem(), Problem()
    optimizer, other = optimizers(by, p, q)
    scaler = torch.amp.GradScaler("cpu", growth_interval=10**6)
    for k, sizes in enumerate(groups):
        count = 4 if told else len(sizes)  # an incomplete group must be told
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        cuts = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        overflow = data.draw(st.booleans(), label="skipped")
        optimizer.zero_grad()
        for i, cut in enumerate(cuts):
            with optimizer.accumulate(count, last=i + 1 == len(cuts) if told else None):
                scalar = optimizer.combine(functools.partial(sized, p, k, ends[-1], cut), reference=p.reference)
            if data.draw(st.booleans(), label="zero_grad"):
                optimizer.zero_grad()  # Lightning calls it between combine and backward
            scaler.scale(scalar / count * (torch.inf if overflow and i + 1 == len(cuts) else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        if not overflow:
            step(other, functools.partial(sized, q, k, ends[-1], slice(None)), reference=q.reference)
        same_numbers(p.parameters(), q.parameters(), rtol=1e-7)
        same_numbers(own(optimizer)["state"], own(other)["state"], rtol=1e-7)
        assert optimizer.report.step == other.report.step


def sized(p, k, size, cut):
    x, y = p.batch(k, size)
    outputs = p.model(x[cut])
    return {task: (outputs[task] - y[task][cut]).square() for task in p.tasks}


def test_micro_batches_that_wait_leave_gradients_alone_and_hold_no_graph(device):
    p = Problem(device=device)
    p.model.unused = nn.Parameter(torch.ones(3, device=device, dtype=torch.float64))
    optimizer = MultiTaskOptimizer(
        torch.optim.AdamW(p.model.parameters(), lr=0.1, weight_decay=0.5), MGDA(), shared=p.encoder
    )
    calls = []

    def part(cut):
        calls.append(cut)
        return part_of(p, 0, cut)

    for i, cut in enumerate(CUTS):
        with optimizer.accumulate(3):
            scalar = optimizer.combine(functools.partial(part, cut))
        assert scalar.device.type == device
        (scalar / 3).backward()
        if i < 2:
            assert float(scalar.detach()) == 0
            assert not calls
            assert all(p.grad is None for p in p.model.parameters())
    optimizer.step()
    assert p.model.unused.tolist() == [1, 1, 1]  # a gradient of zeros would let it decay


def test_what_waited_is_let_go_after_the_step():
    p = Problem()
    (optimizer,) = optimizers(UW(), p)

    def data():
        parts = micro_batches(p)
        accumulated(optimizer, parts)
        return [weakref.ref(part) for part in parts]

    held = data()
    gc.collect()
    assert [ref() for ref in held] == [None] * 3


def test_around_the_loop_is_the_same_as_around_each_call():
    p, q = Problem(), Problem()
    optimizer, other = optimizers(UW(step_size=0.5), p, q)
    with optimizer.accumulate(3):
        for k in range(2):
            optimizer.zero_grad()
            for part in micro_batches(p, k):
                (optimizer.combine(part) / 3).backward()
            optimizer.step()
    for k in range(2):
        accumulated(other, micro_batches(q, k))
    assert same(p.parameters(), q.parameters())
    step(optimizer, p.losses())  # outside it counts nothing
    step(other, q.losses())
    assert same(p.parameters(), q.parameters())


@pytest.mark.parametrize("how", ["closure", "plain"])
def test_a_step_that_comes_too_early_raises_and_the_micro_batches_still_wait(how):
    p, q = Problem(), Problem()
    optimizer, other = optimizers(MGDA(), p, q)
    parts = micro_batches(p)
    with optimizer.accumulate(3):
        (optimizer.combine(parts[0]) / 3).backward()
        before = p.everything(optimizer)
        with pytest.raises(MTLWeightError, match=r"step\(\) after 3 micro-batches, found it after [12], .*last="):
            optimizer.step(lambda: optimizer.combine(parts[1]) / 3) if how == "closure" else optimizer.step()
        assert same(before, p.everything(optimizer))
    with optimizer.accumulate(3, last=True):
        (optimizer.combine(parts[2] if how == "closure" else lambda: part_of(p, 0, slice(1, 6))) / 3).backward()
    optimizer.step()
    step(other, q.samples)
    same_numbers(p.parameters(), q.parameters(), rtol=1e-9)


def test_a_combine_outside_says_once_that_micro_batches_still_wait_and_drops_them():
    p, q = Problem(), Problem()
    optimizer, other = optimizers(MGDA(), p, q)
    with optimizer.accumulate(2):
        optimizer.combine(micro_batches(p)[0]).backward()
    with pytest.raises(MTLWeightError, match=r"outside while 1 still waited for it\. They are dropped now\. Say"):
        optimizer.combine(p.samples)
    step(optimizer, p.samples)
    step(other, q.samples)
    assert same(p.parameters(), q.parameters())


def test_more_micro_batches_than_the_loop_divides_by_are_an_error():
    p = Problem()
    (optimizer,) = optimizers(Equal(), p)
    with pytest.raises(MTLWeightError, match="at most 2 micro-batches a step, found one more"):
        accumulated(optimizer, micro_batches(p), count=2, last=False)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("count", "divide"), [(3, 3), (3, 1), (4, 3), (8, 3), (5, 1)])
def test_whatever_the_loop_divides_by_the_step_is_the_whole_batchs_if_it_says_so(count, divide, scaled):
    p, q = Problem(), Problem()
    optimizer, other = optimizers(UW(step_size=0.5) >> MGDA(), p, q)
    for k in range(3):
        last = iter([False, False, True])
        optimizer.zero_grad()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (8 * scaled), enabled=scaled)
        for part in micro_batches(p, k):
            with optimizer.accumulate(count, last=next(last), divisor=divide):
                scalar = optimizer.combine(part)
            scaler.scale(scalar / divide).backward()
        scaler.step(optimizer)
        step(other, lambda k=k: q.samples(k))
        same_numbers(p.parameters(), q.parameters(), rtol=1e-7)


def for_each(optimizer, parts, count, factor):
    """A loop that does not say what it divides by."""
    optimizer.zero_grad()
    for i, part in enumerate(parts):
        with optimizer.accumulate(count, last=i + 1 == len(parts)):
            scalar = optimizer.combine(part)
        (factor * scalar).backward()
    optimizer.step()


@pytest.mark.parametrize(("count", "divide"), [(3, 1), (3, 2), (4, 3), (4, 2)])
def test_a_loop_that_divides_by_another_number_than_it_says_is_warned_of_once(count, divide):
    p = Problem()
    (optimizer,) = optimizers(MGDA(), p)
    message = rf"divides each scalar by {count}, found a factor of 1/{divide}.*divisor={divide}"
    with pytest.warns(UserWarning, match=message) as caught:
        for_each(optimizer, micro_batches(p), count, 1 / divide)
    assert caught[0].filename == __file__
    for_each(optimizer, micro_batches(p), count, 1 / divide)  # and no warning, since warnings are errors
    assert optimizer.report.step == 2


@pytest.mark.parametrize("factor", [1024 / 3, 3.0, 2 / 3, 0.4])
def test_factors_that_no_loop_divides_by_are_not_warned_of(factor):
    p = Problem()
    (optimizer,) = optimizers(MGDA(), p)
    for_each(optimizer, micro_batches(p), 3, factor)
    assert optimizer.report.step == 1


@pytest.mark.parametrize("closure_holds", ["the last", "all"])
def test_a_closure_that_is_evaluated_again_counts_its_micro_batches_once(closure_holds):
    p, q = Problem(), Problem()
    lbfgs, other = (
        MultiTaskOptimizer(torch.optim.LBFGS(each.model.parameters(), max_iter=4), UW(step_size=0.5)) for each in (p, q)
    )
    for k in range(2):
        *early, last = micro_batches(p, k)
        if closure_holds == "all":
            early, closing = [], [*early, last]
        else:
            closing = [last]

        def take(parts):
            for part in parts:
                with lbfgs.accumulate(3):
                    loss = lbfgs.combine(part) / 3
                loss.backward()
            return loss

        def closure(closing=closing):
            lbfgs.zero_grad()
            return take(closing)

        def plain(k=k):
            other.zero_grad()
            loss = other.combine(q.samples(k))
            loss.backward()
            return loss

        if early:
            take(early)
        lbfgs.step(closure)
        other.step(plain)
        same_numbers(p.parameters(), q.parameters(), rtol=1e-7)
        same_numbers(own(lbfgs)["state"], own(other)["state"], rtol=1e-7)


@pytest.mark.parametrize("forget", ["copy", "load", "an error", "a step"])
def test_micro_batches_that_wait_are_forgotten_with_what_was_pending(forget):
    p, q = Problem(), Problem()
    optimizer, other = optimizers(UW(step_size=0.5), p, q)
    with optimizer.accumulate(3):
        optimizer.combine(functools.partial(part_of, p, 9, slice(0, 6)))
    if forget == "copy":
        p.model, optimizer = copy.deepcopy((p.model, optimizer))
    elif forget == "load":
        optimizer.load_state_dict(optimizer.state_dict())
    elif forget == "an error":
        with pytest.raises(KeyError), optimizer.accumulate(3):
            raise KeyError
    else:
        with optimizer.accumulate(3, last=True):
            optimizer.combine(functools.partial(part_of, p, 9, slice(0, 6)))
    accumulated(optimizer, micro_batches(p))
    accumulated(other, micro_batches(q))
    assert same(p.parameters(), q.parameters())
    assert same(own(optimizer)["state"], own(other)["state"])


def test_references_of_all_micro_batches_count_by_their_mean():
    p, q = Problem(), Problem()
    optimizer, other = optimizers(SLGrad("left"), p, q)
    references = lambda p: [functools.partial(p.reference, k) for k in (50, 51, 52)]  # noqa: E731
    accumulated(optimizer, micro_batches(p), references=references(p))
    step(other, q.samples, reference=references(q))
    same_numbers(p.parameters(), q.parameters(), rtol=1e-9)


def test_references_by_name_count_by_their_mean_too_also_without_losses_of_that_task():
    p, q = Problem(), Problem()
    optimizer, other = optimizers(SLGrad("main"), p, q)
    named = lambda p: [{"main": functools.partial(p.reference, k)} for k in (50, 51, 52)]  # noqa: E731
    accumulated(optimizer, micro_batches(p), references=named(p))
    step(other, q.samples, reference={"main": [one["main"] for one in named(q)]})
    same_numbers(p.parameters(), q.parameters(), rtol=1e-9)


batch = None


def losses_of_a_global(p):
    return lambda: part_of(p, *batch)


class LossesOfAGlobal:
    def __init__(self, p):
        self.p = p

    def __call__(self):
        return part_of(self.p, *batch)


@pytest.mark.parametrize(
    "where",
    [
        "a variable of the function",
        "a global",
        "a function that it calls",
        "an object that is called",
        "the reference",
        "under autocast",
    ],
)
def test_a_callable_that_takes_its_data_from_the_loop_is_an_error_that_names_the_variable(where):
    global batch  # noqa: PLW0603
    p = Problem()
    (optimizer,) = optimizers(SLGrad("left"), p)
    inner = losses_of_a_global(p)
    given = {
        "a global": inner,
        "a function that it calls": lambda: inner(),  # noqa: PLW0108
        "an object that is called": LossesOfAGlobal(p),
    }
    name = "batch" if where in given else "mine"
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "under autocast"), optimizer.accumulate(3):
        for i, cut in enumerate(CUTS):
            batch = mine = (0, cut)
            part = given.get(where, lambda: part_of(p, *mine))  # noqa: B023
            reference = p.reference
            if where == "the reference":
                part = functools.partial(part_of, p, *mine)
                reference = lambda: part_of(p, *mine)["left"]  # noqa: B023, E731
            with pytest.raises(MTLWeightError, match=f"'{name}' outside.*Bind it") if i == 2 else nullcontext():
                optimizer.combine(part, reference=reference)


def test_a_callable_may_look_for_what_stays_the_same():
    p, q = Problem(), Problem()
    optimizer, other = optimizers(Equal(), p, q)
    optimizer.zero_grad()
    for cut in CUTS:
        scale = len("ab") / 2.0  # another object each time, and equal
        part = lambda cut=cut: {t: scale * loss for t, loss in part_of(p, 0, cut).items()}  # noqa: B023, E731
        with optimizer.accumulate(3):
            (optimizer.combine(part) / 3).backward()
    optimizer.step()
    step(other, q.samples)
    same_numbers(p.parameters(), q.parameters(), rtol=1e-9)


def test_each_micro_batch_runs_under_the_autocast_of_its_own_call():
    p = Problem(dtype=torch.float32)
    (optimizer,) = optimizers(Equal(), p)
    seen = []

    def part(cut):
        seen.append(torch.is_autocast_enabled("cpu"))
        return part_of(p, 0, cut)

    for i, cut in enumerate(CUTS):
        with torch.autocast("cpu", torch.bfloat16, enabled=i == 1), optimizer.accumulate(3):
            optimizer.combine(functools.partial(part, cut))
    assert seen == [False, True, False] * 2


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (lambda p: p.samples(), {}, "expected losses as a callable, found dict.*or choose weigh='each'"),
        (lambda p: [p.samples], {}, "expected losses as a callable, found list"),
        (lambda p: p.losses, {}, "in parts come per sample"),
        (lambda p: p.samples, {"count": -1}, "expected micro-batches a step >= 1, found -1"),
        (lambda p: p.samples, {"weigh": "all"}, "expected weigh='together' or 'each', found 'all'"),
        (lambda p: p.samples, {"divisor": 0}, "expected divisor >= 1, found 0"),
        (lambda p: p.samples, {"divisor": 2, "weigh": "each"}, "weigh='each'.*expected no divisor, found 2"),
    ],
)
def test_what_cannot_be_accumulated_says_so(given, options, message):
    p = Problem()
    (optimizer,) = optimizers(MGDA(), p)
    with pytest.raises(MTLWeightError, match=message):
        accumulated(optimizer, [given(p)] * 2, **options)


def test_each_weighs_every_micro_batch_by_itself_and_the_state_sees_all_of_them():
    p, q = Problem(), Problem()
    optimizer, other = optimizers(Counting(), p, q)
    for k in range(2):
        accumulated(optimizer, micro_batches(p, k), weigh="each")
        other.optimizer.zero_grad()
        losses = [{t: loss.mean() for t, loss in part().items()} for part in micro_batches(q, k)]
        for i, each in enumerate(losses):
            ((3 * k + i + 1) * sum(each.values()) / 3).backward()
        other.optimizer.step()
        same_numbers(p.parameters(), q.parameters(), rtol=1e-9)
        assert own(optimizer)["state"]["count"] == 3 * (k + 1)
        assert optimizer.report.step == k + 1


def test_each_begins_anew_after_a_step_that_came_early():
    p = Problem()
    (optimizer,) = optimizers(Counting(), p)
    accumulated(optimizer, micro_batches(p)[:2], count=4, weigh="each")
    accumulated(optimizer, micro_batches(p, cuts=[slice(0, 3)] * 4), weigh="each")
    assert own(optimizer)["state"]["count"] == 2 + 4


def test_each_takes_losses_that_are_computed_already_and_scalars():
    p, q = Problem(), Problem()
    optimizer, other = optimizers(UW(step_size=0.5), p, q)
    accumulated(optimizer, [p.losses(k) for k in range(3)], weigh="each")
    accumulated(other, [functools.partial(q.losses, k) for k in range(3)], weigh="each")
    assert same(p.parameters(), q.parameters())


@pytest.mark.parametrize("bad", range(3))
def test_each_skips_the_step_if_one_micro_batch_is_not_finite(bad):
    p = Problem()
    (optimizer,) = optimizers(Counting(), p, on_nonfinite="skip")
    accumulated(optimizer, micro_batches(p, 0), weigh="each")
    before = p.everything(optimizer)
    parts = micro_batches(p, 1)
    parts[bad] = lambda: {task: loss * torch.nan for task, loss in part_of(p, 1, slice(0, 6)).items()}
    accumulated(optimizer, parts, weigh="each")
    assert same(before["parameters"], p.parameters())
    assert same(before["optimizer"]["mtlweight"]["state"], own(optimizer)["state"])
    assert optimizer.report.skipped == 1


def test_each_counts_the_tasks_dropped_from_every_micro_batch():
    p = Problem()
    (optimizer,) = optimizers(Equal() >> MGDA(), p, on_nonfinite="drop")
    parts = [
        lambda cut=cut: {**part_of(p, 0, cut), "right": part_of(p, 0, cut)["right"] * torch.nan} for cut in CUTS[:2]
    ]
    accumulated(optimizer, [*parts, micro_batches(p)[2]], weigh="each")
    assert dict(optimizer.report.dropped) == {"right": 2}
    assert optimizer.report.tasks == ("left", "right")


def test_each_begins_from_the_committed_state_after_a_step_that_the_scaler_skipped():
    p, q = Problem(), Problem()
    optimizer, other = optimizers(Counting(), p, q)
    scaler = torch.amp.GradScaler("cpu")
    overflow = [lambda cut=cut: {t: loss * 1e305 for t, loss in part_of(p, 0, cut).items()} for cut in CUTS]
    before = p.everything(optimizer)
    accumulated(optimizer, overflow, weigh="each", scaler=scaler)
    assert same(before["parameters"], p.parameters())
    accumulated(optimizer, micro_batches(p), weigh="each")
    accumulated(other, micro_batches(q), weigh="each")
    assert same(p.parameters(), q.parameters())
    assert own(optimizer)["state"]["count"] == 3


def test_an_error_in_the_last_micro_batch_changes_nothing_and_the_next_group_is_whole():
    p, q = Problem(), Problem()
    optimizer, other = optimizers(UW(step_size=0.5), p, q)
    before = p.everything(optimizer)
    parts = [lambda: {t: loss * torch.nan for t, loss in p.samples().items()}, *micro_batches(p)[1:]]
    with pytest.raises(NonFiniteError, match="The loss of task left, right is not finite"):
        accumulated(optimizer, parts)
    optimizer.zero_grad()
    assert same(before["parameters"], p.parameters())
    accumulated(optimizer, micro_batches(p))
    accumulated(other, micro_batches(q))
    assert same(p.parameters(), q.parameters())
