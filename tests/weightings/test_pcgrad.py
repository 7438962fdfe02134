"""PCGrad: nothing without conflicts, the literal algorithm on vectors with them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mtlweight import PCGrad, View
from mtlweight._statistics import Given
from mtlweight._weighting import evaluate

seeds = st.integers(0, 2**32)


def run(J, seed=0, step=0):
    return evaluate(PCGrad(), View(Given(jacobian=J), step=step, seed=seed), None)[0]


@given(st.integers(1, 5).flatmap(lambda m: arrays(np.float64, (m, 4), elements=st.floats(0, 10))), seeds)
def test_without_conflicts_the_weights_are_equal(J, seed):
    assert run(torch.from_numpy(J), seed).tolist() == [1.0] * len(J)


@given(
    st.integers(1, 5).flatmap(lambda m: arrays(np.float64, (m, 4), elements=st.integers(-5, 5))),
    st.integers(-10, 15),
    seeds,
)
def test_the_step_is_the_literal_algorithms(J, exponent, seed):
    J = torch.from_numpy(J)
    keys = torch.rand(len(J), len(J), dtype=torch.float64, generator=View(Given(jacobian=J), seed=seed).generator)
    total = torch.zeros(J.shape[1], dtype=torch.float64)
    for i in range(len(J)):
        g = J[i].clone()
        for j in keys[i].argsort().tolist():
            if j != i and g @ J[j] < 0:
                g -= (g @ J[j]) / (J[j] @ J[j]) * J[j]
        total += g
    scaled = 10.0**exponent * J
    torch.testing.assert_close(run(scaled, seed) @ J, total, rtol=0.0, atol=1e-9 * max(1.0, J.abs().max().item()))


@given(arrays(np.float64, (2, 4), elements=st.floats(-10, 10)), seeds)
def test_with_two_tasks_the_projected_gradients_conflict_no_more(J, seed):
    J = torch.from_numpy(J)
    assert (J @ (run(J, seed) @ J) >= -1e-9 * J.norm().square()).all()


@given(seeds)
def test_a_gradient_of_zero_changes_nothing(seed):
    J = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    assert torch.equal(run(torch.cat([J, torch.zeros(1, 2)]), seed), torch.cat([run(J), torch.ones(1)]))


def test_the_order_of_the_others_is_drawn_anew_at_each_step():
    J = torch.tensor([[1.0, 0.0], [-1.0, 2.0], [-1.0, -1.0]], dtype=torch.float64)
    assert len({tuple(run(J, step=step).tolist()) for step in range(20)}) > 3
    assert torch.equal(run(J, step=3), run(J, step=3))


def test_each_order_is_as_likely():
    # Each of the other two takes 1 from task 0, whatever the order; of task 0, the one that comes first takes more.
    J = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 1.0, 0.0], [-1.0, 0.0, 1.0]], dtype=torch.float64)
    weights = torch.stack([run(J, step=step) for step in range(600)])
    first_1 = (weights[:, 1] > weights[:, 2]).double().mean().item()
    assert first_1 == pytest.approx(0.5, abs=5 * 0.5 / 600**0.5)


@pytest.mark.parametrize("size", [1e-155, 1e-100, 1e100, 1e150])
def test_gradients_at_the_ends_of_float64_have_finite_weights(size):
    J = size * torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    assert run(J).isfinite().all()
    G = torch.tensor([[1e-310, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert PCGrad()(gramian=G).tolist() == [1.0, 1.0]
