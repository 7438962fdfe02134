"""GradDrop: keeps what agrees, draws a sign by its share where gradients disagree."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mtlweight import GradDrop, MTLWeightError, View
from mtlweight._statistics import Given
from mtlweight._weighting import evaluate

jacobians = st.tuples(st.integers(1, 4), st.integers(1, 5)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.integers(-5, 5)).map(torch.from_numpy)
)


def run(J, leak=0.0, step=0, seed=0):
    return evaluate(GradDrop(leak), View(Given(jacobian=J), step=step, seed=seed), None)[0]


@given(jacobians, st.integers(0, 2**32), st.floats(0, 1), st.integers(-10, 15))
def test_entries_whose_signs_all_agree_stay(J, seed, leak, exponent):
    agree = (J >= 0).all(dim=0) | (J <= 0).all(dim=0)
    assert (run(J * 10.0**exponent, leak, seed=seed)[:, agree] == 1).all()


@pytest.mark.parametrize("draw", [0.0, math.nextafter(1.0, 0.0)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_least_and_the_greatest_draw_drop_no_sign_that_all_agree_on(draw, sign, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.full(shape, draw, dtype=options["dtype"]))
    assert (run(sign * torch.tensor([[1.0, 2.0], [3.0, 0.5]], dtype=torch.float64)) == 1).all()


@given(jacobians, st.integers(0, 2**32))
def test_of_entries_that_disagree_one_sign_stays(J, seed):
    W = run(J, seed=seed)
    stays_positive, stays_negative = W.clone(), W.clone()
    stays_positive[J <= 0] = stays_negative[J >= 0] = math.nan
    for k in range(J.shape[1]):
        column = J[:, k]
        if (column > 0).any() and (column < 0).any():
            kept = {float(torch.sign(column[t])) for t in range(len(J)) if W[t, k] == 1 and column[t] != 0}
            lost = {float(torch.sign(column[t])) for t in range(len(J)) if W[t, k] == 0}
            assert {frozenset(kept), frozenset(lost)} == {frozenset({1.0}), frozenset({-1.0})}


@settings(max_examples=10)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.3, 1.0]))
def test_the_expected_step_is_the_formulas(seed, leak):
    rng = np.random.default_rng(seed)
    column = torch.from_numpy(rng.standard_normal(4))
    draws = 20_000
    J = column[:, None].repeat(1, draws)  # one entry, drawn many times
    steps = (run(J, leak, seed=seed) * J).sum(dim=0)
    up, down = column.clamp(min=0).sum(), column.clamp(max=0).sum()
    P = (1 + column.sum() / column.abs().sum()) / 2  # eq. 1: the probability that the positive entries stay
    expected = (leak + (1 - leak) * P) * up + (leak + (1 - leak) * (1 - P)) * down
    spread = (1 - leak) * (P * (1 - P)).sqrt() * (up - down)
    assert abs(steps.mean() - expected) <= 5 * spread / math.sqrt(draws) + 1e-9


@given(jacobians, st.floats(0, 1), st.integers(0, 2**32))
def test_what_is_lost_keeps_the_leak(J, leak, seed):
    hard, soft = run(J, seed=seed), run(J, leak, seed=seed)
    torch.testing.assert_close(soft, torch.where(hard == 1, 1.0, leak * torch.ones_like(hard)), rtol=0.0, atol=0.0)


def test_entries_are_drawn_one_by_one_and_anew_at_each_step():
    J = torch.tensor([[1.0], [-1.0]], dtype=torch.float64).repeat(1, 1000)
    first, second = run(J)[0], run(J, step=1)[0]
    assert 400 < first.sum() < 600
    assert 400 < (first == second).sum() < 600
    assert torch.equal(run(J), run(J))


@given(jacobians, st.integers(0, 2**32), st.integers(-10, 15))
def test_a_common_scale_changes_nothing(J, seed, exponent):
    assert torch.equal(run(J * 2.0 ** (3 * exponent), seed=seed), run(J, seed=seed))


@pytest.mark.parametrize("leak", [-0.1, 1.1, math.nan])
def test_the_leak_lies_between_0_and_1(leak):
    with pytest.raises(MTLWeightError, match=r"GradDrop: expected leak in \[0, 1\]"):
        GradDrop(leak)
