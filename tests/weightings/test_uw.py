"""UW: the log-variances find the losses' logarithms, from everywhere, at every step size."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mtlweight import UW, MTLWeightError, View
from mtlweight._statistics import Given
from mtlweight._weighting import evaluate


def powers(low, high):
    return st.floats(low, high).map(lambda exponent: 10.0**exponent)


def run(weighting, losses, steps):
    source, state = Given(losses=torch.tensor(losses, dtype=torch.float64)), None
    for k in range(steps):
        weights, state = evaluate(weighting, View(source, step=k), state)
    return weights, torch.stack(list(state["log_variance"].values()))


def step(s, loss, step_size):
    return run(UW(step_size, initial=s), [loss], 1)[1].item()


@settings(max_examples=300)
@given(st.floats(-40, 40), powers(-12, 12), powers(-6, 6))
@example(0.0, 1e12, 1e6)
@example(0.0, 1e-12, 1e6)
@example(0.0, 1e12, 1e-6)
@example(40.0, 1e-12, 1e-6)
@example(-40.0, 1e12, 1e6)
def test_the_step_solves_the_implicit_equation_to_1e_12(s, loss, step_size):
    found = step(s, loss, step_size)
    pull = step_size * (1 - math.exp(math.log(loss) - found))
    # The distance to the root is the residual over the slope; beyond, the sizes of the terms set what rounding allows.
    slope = 1 + step_size * math.exp(math.log(loss) - found)
    assert abs(found - s + pull) / slope <= 1e-12 * max(1.0, abs(s), abs(found))


@given(st.floats(-40, 40), powers(-12, 12), powers(-6, 6))
def test_the_step_goes_towards_the_logarithm_of_the_loss_and_not_beyond(s, loss, step_size):
    found, goal = step(s, loss, step_size), math.log(loss)
    slack = 1e-12 * max(1.0, abs(s), abs(goal))
    assert min(s, goal) - slack <= found <= max(s, goal) + slack


@given(st.floats(-2, 2), powers(-1, 1), powers(-6, -4))
def test_a_small_step_is_a_gradient_step(s, loss, step_size):
    explicit = s - step_size * (1 - math.exp(-s) * loss)
    assert step(s, loss, step_size) == pytest.approx(explicit, abs=1e5 * step_size**2)


@settings(max_examples=30)
@given(st.lists(powers(-12, 12), min_size=1, max_size=4), st.sampled_from([0.5, 10.0, 1e6]))
def test_the_log_variances_converge_to_the_logarithms_of_the_losses(losses, step_size):
    weights, s = run(UW(step_size), losses, 200)
    expected = torch.tensor(losses, dtype=torch.float64)
    torch.testing.assert_close(s, expected.log(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(weights * expected, torch.ones_like(expected), rtol=1e-7, atol=0.0)


@given(st.lists(powers(-12, 12), min_size=1, max_size=4), powers(-6, 6))
def test_nothing_overflows(losses, step_size):
    weights, s = run(UW(step_size), losses, 20)
    assert weights.isfinite().all()
    assert s.isfinite().all()
    assert (weights > 0).all()


@pytest.mark.parametrize("loss", [5e-324, 1e-310, 1e308])
def test_losses_at_the_ends_of_float64_are_fine_too(loss):
    assert math.isfinite(step(0.0, loss, 0.02))
    assert step(0.0, loss, 1e6) == pytest.approx(math.log(loss), rel=1e-2)


def test_the_log_variance_of_a_loss_of_zero_rests():
    assert run(UW(0.25, initial=1.0), [0.0], 1000)[1].item() == 1.0


def test_tasks_do_not_see_each_other():
    both, _ = run(UW(0.5), [3.0, 0.2], 5)
    alone, _ = run(UW(0.5), [3.0], 5)
    assert both[0] == alone[0]


def test_an_absent_task_keeps_its_log_variance():
    state, weighting = None, UW(0.5)
    for k, batch in enumerate([{"a": 3.0, "b": 0.2}, {"b": 0.2}, {"a": 3.0}]):
        source = Given(losses=torch.tensor(list(batch.values()), dtype=torch.float64), tasks=tuple(batch))
        before = state
        weights, state = evaluate(weighting, View(source, step=k), state)
        if k == 1:
            assert state["log_variance"]["a"] == before["log_variance"]["a"]
    assert weights.item() == run(weighting, [3.0], 2)[0].item()


def test_a_negative_loss_is_named():
    with pytest.raises(MTLWeightError, match=r"UW: expected losses >= 0.*found 1 = -2"):
        UW()(losses=torch.tensor([1.0, -2.0]))


@pytest.mark.parametrize("step_size", [0.0, -1.0, math.nan, math.inf])
def test_the_step_size_is_positive_and_finite(step_size):
    with pytest.raises(MTLWeightError, match="UW: expected a finite step_size > 0"):
        UW(step_size)


def test_the_error_names_the_negative_losses_and_no_others():
    with pytest.raises(MTLWeightError, match=r"found 0 = -1, 3 = -0\.25\."):
        UW()(losses=torch.tensor([-1.0, 0.0, 0.5, -0.25]))
