"""IMTL-L: scales that bring each loss to 1; UW under another name."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtlweight import IMTLL, UW, MTLWeightError
from tests.oracles import imtll
from tests.weightings._run import run

positive = st.floats(-12, 12).map(lambda e: 10.0**e)
batches = st.lists(st.lists(positive, min_size=3, max_size=3), min_size=1, max_size=8)
rates = st.floats(-4, 3).map(lambda e: 10.0**e)


@given(batches, rates, st.floats(-3, 3))
def test_it_agrees_with_the_oracle(batches, step_size, initial):
    steps = [{"losses": torch.tensor(batch, dtype=torch.float64)} for batch in batches]
    expected = imtll.weights(steps, None, step_size=step_size, initial=initial)
    for a, b in zip(run(IMTLL(step_size, initial), batches)[0], expected, strict=True):
        torch.testing.assert_close(a.log(), b.log(), rtol=1e-9, atol=1e-9)


@given(batches, rates)
def test_it_is_uncertainty_weighting_with_both_terms_doubled(batches, step_size):
    for a, b in zip(run(IMTLL(step_size), batches)[0], run(UW(step_size), batches)[0], strict=True):
        torch.testing.assert_close(a, b)


@given(st.lists(positive, min_size=2, max_size=2))
def test_with_losses_that_stay_the_weighted_losses_go_to_one(losses):
    weights = run(IMTLL(step_size=1.0), [losses] * 100)[0][-1]
    torch.testing.assert_close(weights * torch.tensor(losses, dtype=torch.float64), torch.ones(2, dtype=torch.float64))


def test_the_scale_of_a_loss_of_zero_rests():
    weights = run(IMTLL(), [{"a": 2.0, "b": 1.0}, *[{"a": 0.0, "b": 1.0}] * 3, {"a": 2.0, "b": 1.0}])[0]
    assert weights[1][0] == weights[4][0] != 1.0


@pytest.mark.parametrize("options", [{"step_size": 0.0}, {"step_size": math.nan}, {"initial": math.inf}])
def test_hyperparameters_are_in_range(options):
    with pytest.raises(MTLWeightError, match="IMTLL: expected a finite"):
        IMTLL(**options)


def test_a_negative_loss_raises():
    with pytest.raises(MTLWeightError, match="IMTLL: expected losses >= 0"):
        IMTLL()(losses=torch.tensor([1.0, -1.0]))
