"""FAMO: what improved fastest loses weight; it looks at the losses again after the step."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mtlweight
from mtlweight import FAMO, MTLWeightError
from tests.oracles import famo
from tests.weightings._run import run

positive = st.floats(-12, 12).map(lambda e: 10.0**e)
triples = st.lists(positive, min_size=3, max_size=3)
with_zeros = st.lists(positive | st.just(0.0), min_size=3, max_size=3)
rules = st.sampled_from(["adam", "gradient"])


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def agree(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-12)


@given(st.lists(st.tuples(with_zeros, with_zeros), min_size=1, max_size=6), rules, st.floats(0.001, 1), st.floats(0, 1))
def test_it_agrees_with_the_oracle(steps, rule, step_size, decay):
    found = run(FAMO(step_size, decay, rule=rule), [a for a, _ in steps], [b for _, b in steps])[0]
    both = [{"losses": f64(a), "after": f64(b)} for a, b in steps]
    agree(found, famo.weights(both, None, step_size=step_size, decay=decay, rule=rule))


@given(st.lists(st.tuples(triples, triples), min_size=1, max_size=6), rules)
def test_a_bound_and_an_epsilon_shift_the_losses(steps, rule):
    weighting = FAMO(ideal=-2.0, epsilon=0.5, rule=rule)
    found = run(weighting, [a for a, _ in steps], [b for _, b in steps])[0]
    both = [{"losses": f64(a), "after": f64(b)} for a, b in steps]
    agree(found, famo.weights(both, None, ideal=-2.0, epsilon=0.5, rule=rule))


@given(triples)
def test_weighted_log_slopes_start_equal(losses):
    weights = FAMO()(losses=f64(losses))
    torch.testing.assert_close(weights, (1 / f64(losses)) / (1 / f64(losses)).sum())


@given(triples, rules)
def test_the_task_that_improved_most_loses_weight(losses, rule):
    after = [losses[0] / 2, losses[1], losses[2] * 2]
    first, second = run(FAMO(rule=rule), [losses, losses], [after, after])[0]
    share = (second * f64(losses)) / (second * f64(losses)).sum()  # z
    assert share[0] < share[1] < share[2]
    assert first.sum().item() == pytest.approx(1.0)


@given(triples, positive, rules)
def test_units_do_not_matter(losses, factor, rule):
    after = [0.5 * losses[0], 0.9 * losses[1], losses[2]]
    one = run(FAMO(rule=rule), [losses] * 3, [after] * 3)[0]
    other = run(FAMO(rule=rule), [[factor * x for x in losses]] * 3, [[factor * x for x in after]] * 3)[0]
    agree(one, other)


def test_losses_that_are_zero_are_left_out_and_their_logits_rest():
    history, states = run(FAMO(), [[1.0, 0.0, 2.0], [1.0, 1.0, 2.0]], [[0.5, 0.0, 2.0], [1.0, 1.0, 2.0]])
    assert history[0].tolist() == pytest.approx([2 / 3, 0.0, 1 / 3])
    assert float(states[0]["logit"]["1"]) == 0.0
    assert float(states[0]["logit"]["0"]) < 0.0 < float(states[0]["logit"]["2"])
    assert run(FAMO(), [[0.0, 0.0]])[0][0].tolist() == [0.5, 0.5]


def test_a_loss_that_becomes_zero_or_negative_in_the_step_is_not_observed():
    _, states = run(FAMO(), [[1.0, 1.0, 1.0]], [[0.0, -1.0, 0.5]])
    assert [float(states[0]["logit"][task]) for task in "01"] == [0.0, 0.0]


def test_absent_tasks_keep_their_logits():
    batches = [{"a": 1.0, "b": 1.0}, {"b": 1.0}, {"a": 1.0, "b": 1.0, "c": 1.0}]
    after = [{"a": 0.5, "b": 1.0}, {"b": 0.5}, {"a": 1.0, "b": 1.0, "c": 1.0}]
    history, states = run(FAMO(), batches, after)
    assert torch.equal(states[0]["logit"]["a"], states[1]["logit"]["a"])
    assert history[1].tolist() == [1.0]
    assert len(history[2]) == 3


def test_the_optimizer_shows_it_the_losses_after_the_step():
    theta = torch.nn.Parameter(torch.tensor([3.0, 3.0], dtype=torch.float64))
    optimizer = mtlweight.MultiTaskOptimizer(torch.optim.SGD([theta], lr=0.1), FAMO())
    steps = []
    for _ in range(5):
        optimizer.zero_grad()
        optimizer.combine(lambda: {"a": theta[0] ** 2 + 1, "b": (10 * theta[1]) ** 2 + 1}).backward()
        losses = torch.stack([theta[0] ** 2 + 1, (10 * theta[1]) ** 2 + 1]).detach()
        optimizer.step()
        after = torch.stack([theta[0] ** 2 + 1, (10 * theta[1]) ** 2 + 1]).detach()
        steps.append({"losses": losses, "after": after, "weights": optimizer.report.weights})
    agree([step["weights"] for step in steps], famo.weights(steps, None))


def test_computed_losses_are_refused():
    theta = torch.nn.Parameter(torch.ones(2))
    optimizer = mtlweight.MultiTaskOptimizer(torch.optim.SGD([theta], lr=0.1), FAMO())
    with pytest.raises(MTLWeightError, match="FAMO looks at the losses again after the step"):
        optimizer.combine({"a": theta[0] ** 2, "b": theta[1] ** 2})


@pytest.mark.parametrize("ideal", [0.5, {"0": 0.0, "1": 0.5}])
def test_a_loss_below_its_bound_raises(ideal):
    with pytest.raises(MTLWeightError, match=r"FAMO: expected losses >= ideal"):
        FAMO(ideal=ideal)(losses=torch.tensor([1.0, 0.25]))


@pytest.mark.parametrize(
    "options",
    [
        {"step_size": 0.0},
        {"step_size": math.inf},
        {"decay": -1.0},
        {"epsilon": -1.0},
        {"rule": "other"},
        {"ideal": math.nan},
    ],
)
def test_hyperparameters_are_in_range(options):
    with pytest.raises(MTLWeightError, match=f"FAMO: expected .*{next(iter(options))}"):
        FAMO(**options)
