"""MGDA: the closed form for two tasks, and a step that harms no task."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mtlweight import MGDA, View
from mtlweight._statistics import Given
from mtlweight._weighting import evaluate

rows = st.integers(1, 5).flatmap(lambda m: arrays(np.float64, (m, 4), elements=st.integers(-5, 5)))


@given(arrays(np.float64, (2, 3), elements=st.floats(-10, 10, width=16)), st.integers(-10, 15))
def test_two_tasks_have_the_papers_closed_form(J, exponent):
    g, h = J
    gap = (g - h) @ (g - h)
    if gap > 1e-6 and g.any() and h.any():
        share = min(max((h - g) @ h / gap, 0.0), 1.0)  # eq. 5
        J = torch.from_numpy(J) * 10.0**exponent
        expected = torch.tensor([share, 1 - share], dtype=torch.float64)
        torch.testing.assert_close(MGDA()(gramian=J @ J.T), expected, rtol=0.0, atol=1e-8)


@given(rows, st.integers(-10, 15))
def test_the_step_raises_no_tasks_loss(J, exponent):
    J = torch.from_numpy(J) * 10.0**exponent
    products = J @ (MGDA()(jacobian=J) @ J)
    assert (products >= -1e-8 * J.norm(dim=1) * J.norm()).all()


@given(rows)
def test_no_combination_is_shorter(J):
    J = torch.from_numpy(J)
    length = (MGDA()(jacobian=J) @ J).norm()
    for other in torch.rand(20, len(J), dtype=torch.float64, generator=torch.Generator().manual_seed(0)):
        assert length <= ((other / other.sum()) @ J).norm() + 1e-9


@given(arrays(np.float64, 3, elements=st.integers(1, 100)))
def test_the_smallest_of_orthogonal_gradients_gets_the_most_weight(norms):
    weights = MGDA()(jacobian=torch.from_numpy(norms).diag())
    assert weights[norms.argmin()] == weights.max()


def test_the_solvers_residual_is_noted():
    view = View(Given(jacobian=torch.tensor([[1.0, 0.0], [0.0, 2.0]])))
    evaluate(MGDA(), view, None)
    assert view.notes["mgda_residual"] <= 1e-8
