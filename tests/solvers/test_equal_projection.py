"""IMTL-G's system: equal projections from J in long doubles, the paper's closed form, limits for dependent rows."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mtlweight.solvers import SolverError, equal_projection
from tests.solvers.jacobians import exact, large_jacobians, lengths, small_jacobians, solve

totals = st.sampled_from(["sum", "absolute"])


def residual(J, weights):
    """How far the projections are from equal, relative to what they sum; from J in long doubles, without zero rows."""
    norms = lengths(J.astype(np.longdouble))
    alive = norms > 0
    U, y = J[alive].astype(np.longdouble) / norms[alive, None], (weights * norms)[alive]
    if not y.any():
        return 0.0
    projections = U @ (y @ U)
    return float(np.ptp(projections) / 2 / np.abs(y).sum())


@given(small_jacobians(), totals)
def test_the_residual_is_below_1e_8(J, total):
    assert residual(J, equal_projection(J @ J.T, total).weights) <= 1e-8


@settings(max_examples=100)
@given(large_jacobians(), totals)
def test_the_residual_is_below_1e_8_for_up_to_128_rows_of_every_kind(J, total):
    assert residual(J, equal_projection(J @ J.T, total).weights) <= 1e-8


@given(small_jacobians(), totals)
def test_the_weights_are_scaled_as_asked_or_are_zero(J, total):
    weights, reported = equal_projection(J @ J.T, total)
    assert reported <= 1e-8
    if weights.any():
        assert (weights.sum() if total == "sum" else np.abs(weights).sum()) == pytest.approx(1.0, abs=1e-6)
    else:
        assert total == "sum"


@given(arrays(np.float64, (4, 5), elements=st.floats(-10, 10, width=16)))
def test_independent_rows_have_the_closed_form_of_the_paper(J):
    norms = lengths(J)
    assume(norms.min() > 0.1)
    U = J / norms[:, None]
    assume(np.linalg.svd(U)[1].min() > 0.05)
    differences, unit_differences = J[0] - J[1:], U[0] - U[1:]
    assume(np.linalg.cond(differences @ unit_differences.T) < 1e4)
    rest = J[0] @ unit_differences.T @ np.linalg.inv(differences @ unit_differences.T)
    expected = np.array([1 - rest.sum(), *rest])
    np.testing.assert_allclose(equal_projection(J @ J.T).weights, expected, rtol=1e-6, atol=1e-6 * np.abs(rest).max())


@given(arrays(np.float64, (4, 5), elements=st.floats(-10, 10, width=16)))
def test_absolute_scaling_never_climbs(J):
    products = J @ (equal_projection(J @ J.T, "absolute").weights @ J)
    assert (products >= -1e-7 * lengths(J) * lengths(J).max()).all()


def test_a_sum_of_one_can_climb_on_all_losses():
    J = np.array([[0.0, 0.0, 1.0], [1.0, 1.0, 3.0], [-2.0, 0.0, 0.0]])
    climbing, descending = (J @ (equal_projection(J @ J.T, total).weights @ J) for total in ("sum", "absolute"))
    assert (climbing < -0.1).all()
    assert (descending > 0.01).all()


@given(small_jacobians(), st.integers(-30, 50), totals)
def test_a_common_scale_changes_nothing(J, exponent, total):
    K = 2.0**exponent * J
    a, b = equal_projection(J @ J.T, total).weights, equal_projection(K @ K.T, total).weights
    np.testing.assert_allclose(b, a, rtol=1e-6, atol=1e-9)


@given(small_jacobians(), st.randoms(use_true_random=False))
def test_permuting_the_rows_permutes_the_weights(J, random):
    order = random.sample(range(len(J)), len(J))
    a = equal_projection(J @ J.T, "absolute").weights
    b = equal_projection(J[order] @ J[order].T, "absolute").weights
    np.testing.assert_allclose(b * lengths(J)[order], (a * lengths(J))[order], atol=1e-6 * (np.abs(a) @ lengths(J)))


@pytest.mark.parametrize("shift", [1e-3, 1e-4])
def test_dependent_rows_have_the_limit_of_independent_ones(shift):
    for J in ([[1.0, 2.0], [2.0, 4.0], [0.0, 1.0]], [[1.0, 2.0], [-2.0, -4.0], [0.0, 1.0]], [[3.0], [-1.0], [2.0]]):
        J = np.array(J)
        K = np.hstack([J, shift * lengths(J)[:, None] * np.eye(len(J))])
        near, limit = equal_projection(K @ K.T).weights, equal_projection(J @ J.T).weights
        np.testing.assert_allclose(near, limit, atol=20 * shift**2 + 1e-8)


@pytest.mark.parametrize("gap", [1e-4, 1e-6, 1e-7])
def test_nearly_dependent_rows_are_solved_to_the_last_digits_that_they_have(gap):
    cosines = np.array([[1.0, 1.0 - gap, 0.3], [1.0 - gap, 1.0, 0.3 + 0.4 * gap], [0.3, 0.3 + 0.4 * gap, 1.0]])
    v = solve(exact(cosines), exact(np.ones(3))).astype(np.float64)
    np.testing.assert_allclose(equal_projection(cosines).weights, v / v.sum(), rtol=1e-7)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[3.0]], [1.0]),
        ([[2.0, 0.0], [0.0, 0.5]], [0.2, 0.8]),
        ([[1.0], [3.0]], [0.75, 0.25]),
        ([[1.0], [-3.0]], [0.75, 0.25]),  # opposed: the step is zero
        ([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], [0.25, 0.25, 0.5]),  # duplicates share
        ([[1.0, 0.0], [0.0, 0.0]], [1.0, 0.0]),
        ([[0.0], [0.0]], [0.5, 0.5]),
        ([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]], [0.0, 0.0, 0.0]),  # the one in the middle cancels both: 1 - 2 + 1 = 0
    ],
)
def test_known_answers(rows, expected):
    J = np.array(rows)
    np.testing.assert_allclose(equal_projection(J @ J.T).weights, expected, atol=1e-9)


def test_weights_that_cancel_are_scaled_by_their_absolute_values():
    J = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
    weights = equal_projection(J @ J.T, "absolute").weights
    np.testing.assert_allclose(np.abs(weights), [0.25, 0.5, 0.25], atol=1e-9)
    np.testing.assert_allclose(weights @ J, 0.0, atol=1e-9)


def test_the_gramian_is_not_changed():
    G = np.array([[1.0, -2.0, 0.0], [-2.0, 5.0, 0.0], [0.0, 0.0, 0.0]])
    before = G.copy()
    equal_projection(G)
    np.testing.assert_array_equal(G, before)


def test_an_answer_above_the_residual_is_withheld(monkeypatch):
    monkeypatch.setattr("mtlweight.solvers._equal_projection.solved", lambda *_: np.arange(1.0, 4.0))
    with pytest.raises(SolverError, match=r"equal_projection expected .* stopped at 0\.\d+ \(m=3\)"):
        equal_projection(np.diag([1.0, 4.0, 9.0]))
