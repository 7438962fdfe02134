"""A task whose gradient is exactly 0: the report says so, and a warning comes where nothing shared moves."""

import warnings

import pytest

from mtlweight import CRMOGM, MGDA, PCD, ConFIG, Needs, SLGrad, UPGrad, ema
from tests import problems
from tests.optimizer.registered import losses_of, tasks_of
from tests.problems import Problem, own, step, wrap
from tests.registry import CASES

# Behind weights per sample the report alone says so: the last test.
READ_GRAMIANS = list(
    {repr(w): c for c in CASES if Needs.GRAMIAN in (w := c.weighting).needs and w.writes == "task"}.values()
)
STALL = [MGDA(), CRMOGM(MGDA()), ema(MGDA(), decay=0.5), PCD(main="right", progress=0.0)]
STALLS = r"gradient of task right .* is exactly 0, and .* gives no other task any weight: .* pass None for it"


def with_a_zero(p, k=0):
    losses = p.losses(k)
    return {**losses, "right": losses["right"] * 0}


@pytest.mark.parametrize("form", ["at once", "in parts"])
@pytest.mark.parametrize("by", STALL, ids=repr)
def test_a_zero_gradient_that_stops_all_shared_parameters_is_warned_of_once_with_its_task(by, form):
    p = Problem()
    optimizer = wrap(p, by, shared=p.encoder, model=p.model)

    def parts(k):
        def part():
            losses = p.samples(k)
            return {**losses, "right": losses["right"] * 0}

        return part if form == "at once" else [part, part]

    with pytest.warns(UserWarning, match=STALLS) as caught:
        step(optimizer, parts(0))
    assert caught[0].filename == problems.__file__  # whose step calls combine
    assert not any(q.grad.any() for q in p.encoder.parameters())
    for k in (1, 2):
        step(optimizer, parts(k))  # and no warning, since warnings are errors
        assert optimizer.report.notes["zero_gradient"].tolist() == [False, True]


@pytest.mark.parametrize("engine", ["rows", "batched", "samples", "features"])
def test_every_engine_that_measures_gramians_reports_zero_gradients(engine):
    p = Problem()
    optimizer = wrap(p, UPGrad(), shared=p.encoder, engine=engine)
    step(optimizer, lambda: with_a_zero(p))
    assert optimizer.report.notes["zero_gradient"].tolist() == [False, True]
    step(optimizer, p.losses)
    assert optimizer.report.notes["zero_gradient"].tolist() == [False, False]


@pytest.mark.parametrize("case", READ_GRAMIANS, ids=lambda case: repr(case.weighting))
def test_a_zero_gradient_stops_the_shared_parameters_only_with_a_warning(case):
    p = Problem(tasks_of(case, 3))
    optimizer = wrap(p, case.weighting, shared=p.encoder)
    losses = losses_of(p, case.weighting, 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.combine({**losses, "1": losses["1"] * 0}, reference=p.reference).backward()
    moved = any(q.grad is not None and q.grad.any() for q in p.encoder.parameters())
    said = [w for w in caught if "gives no other task any weight" in str(w.message)]
    assert moved == (not said)


def test_nothing_is_warned_of_where_all_gradients_are_zero_or_the_task_is_absent():
    p = Problem()
    optimizer = wrap(p, MGDA(), shared=p.encoder)
    step(optimizer, {task: loss * 0 for task, loss in p.losses().items()})
    step(optimizer, {**p.losses(), "right": None})
    assert own(optimizer)["step"] == 2


def test_opposed_gradients_that_cancel_are_no_fault():
    p = Problem()
    optimizer = wrap(p, ConFIG(), shared=p.encoder)
    loss = p.losses()["left"]
    step(optimizer, {"left": loss, "right": -loss})
    assert not optimizer.report.weights.any()
    assert not optimizer.report.notes["zero_gradient"].any()


def test_weights_per_sample_that_make_a_gradient_zero_are_in_the_report():
    p = Problem()
    optimizer = wrap(p, SLGrad("left") >> MGDA(), shared=p.encoder)
    losses = p.samples()
    step(optimizer, {**losses, "right": losses["right"] * 0}, reference=p.reference())
    assert not optimizer.report.weights[0].any()
    assert optimizer.report.notes["zero_gradient"].tolist() == [False, True]
