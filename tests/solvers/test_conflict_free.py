"""ConFIG's direction: from J with a pseudo-inverse, its defining equations in long doubles, closed forms."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mtlweight.solvers import SolverError, conflict_free
from tests.solvers.jacobians import large_jacobians, lengths, small_jacobians


def residual(J, weights):
    """Of the weights as multiples of the pseudo-inverse's: the normal equations from J in long doubles."""
    norms = lengths(J.astype(np.longdouble))
    alive = norms > 0
    U, y = J[alive].astype(np.longdouble) / norms[alive, None], (weights * norms)[alive]
    if not y.any():
        return 0.0
    C = U @ U.T
    y = y * ((C @ y).sum() / ((C @ y) @ (C @ y)))  # the multiple that comes nearest to cosines of one
    return float((np.abs(C @ (1 - C @ y)) / (np.abs(C) @ (1 + np.abs(C) @ np.abs(y)))).max())


def by_pseudo_inverse(J):
    """Equations 2 and 3 of the paper, literally."""
    norms = lengths(J)
    U = np.divide(J, norms[:, None], out=np.zeros_like(J), where=norms[:, None] > 0)
    x = np.linalg.pinv(U, rcond=1e-6) @ np.ones(len(J))
    e = x / np.linalg.norm(x)
    return (J @ e).sum() * e


@given(small_jacobians())
def test_the_residual_is_below_1e_8(J):
    weights, reported = conflict_free(J @ J.T)
    assert reported <= 1e-8
    assert residual(J, weights) <= 1e-8


@settings(max_examples=100)
@given(large_jacobians())
def test_the_residual_is_below_1e_8_for_up_to_128_rows_of_every_kind(J):
    assert residual(J, conflict_free(J @ J.T).weights) <= 1e-8


@given(arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(1, 5)), elements=st.integers(-3, 3)))
def test_the_step_is_the_one_of_the_pseudo_inverse(J):
    weights = conflict_free(J @ J.T).weights
    U = J[J.any(1)] / lengths(J[J.any(1)])[:, None]
    if np.linalg.norm(np.linalg.pinv(U, rcond=1e-6) @ np.ones(len(U))) > 1e-6:
        expected = by_pseudo_inverse(J)
        np.testing.assert_allclose(weights @ J, expected, atol=1e-8 * max(1.0, np.abs(weights) @ lengths(J)), rtol=0.0)
    else:
        np.testing.assert_array_equal(weights, 0.0)


@given(arrays(np.float64, (3, 4), elements=st.floats(-10, 10, width=16)))
def test_independent_rows_have_one_positive_cosine_with_the_step(J):
    assume(lengths(J).min() > 0.1)
    U = J / lengths(J)[:, None]
    assume(np.linalg.svd(U)[1].min() > 0.01)
    d = conflict_free(J @ J.T).weights @ J
    cosines = U @ d
    assert cosines.min() > 0
    np.testing.assert_allclose(cosines, cosines[0], rtol=1e-7)
    assert np.linalg.norm(d) == pytest.approx((J @ d).sum() / np.linalg.norm(d))  # as long as the projections together


@given(arrays(np.float64, (2, 4), elements=st.floats(-10, 10, width=16)))
def test_two_rows_have_the_form_without_an_inverse(J):
    assume(lengths(J).min() > 0.1)
    g, h = J
    U = J / lengths(J)[:, None]
    assume(np.linalg.svd(U)[1].min() > 0.01)
    parts = np.array([g - (g @ h) / (h @ h) * h, h - (g @ h) / (g @ g) * g])
    e = (parts / lengths(parts)[:, None]).sum(0)
    e /= np.linalg.norm(e)
    np.testing.assert_allclose(conflict_free(J @ J.T).weights @ J, (J @ e).sum() * e, atol=1e-7)


@given(small_jacobians(), st.integers(-30, 50))
def test_a_common_scale_changes_nothing(J, exponent):
    K = 2.0**exponent * J
    np.testing.assert_allclose(conflict_free(K @ K.T).weights, conflict_free(J @ J.T).weights, rtol=1e-9, atol=1e-12)


@given(small_jacobians(), st.randoms(use_true_random=False))
def test_permuting_the_rows_permutes_the_weights(J, random):
    order = random.sample(range(len(J)), len(J))
    a, b = conflict_free(J @ J.T).weights, conflict_free(J[order] @ J[order].T).weights
    np.testing.assert_allclose(b * lengths(J)[order], (a * lengths(J))[order], rtol=1e-6, atol=1e-9 * lengths(J).max())


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[3.0]], [1.0]),
        ([[2.0, 0.0], [0.0, 0.5]], [0.625, 2.5]),
        ([[1.0], [3.0]], [2.0, 2 / 3]),
        ([[1.0], [-3.0]], [0.0, 0.0]),
        ([[1.0], [1.0], [-1.0]], [1 / 3, 1 / 3, -1 / 3]),  # two against one: the step conflicts with the third
        ([[1.0, 0.0], [0.0, 0.0]], [1.0, 0.0]),
        ([[0.0], [0.0]], [0.0, 0.0]),
    ],
)
def test_known_answers(rows, expected):
    J = np.array(rows)
    np.testing.assert_allclose(conflict_free(J @ J.T).weights, expected, atol=1e-9)


def test_the_gramian_is_not_changed():
    G = np.array([[1.0, -2.0, 0.0], [-2.0, 5.0, 0.0], [0.0, 0.0, 0.0]])
    before = G.copy()
    conflict_free(G)
    np.testing.assert_array_equal(G, before)


def test_an_answer_above_the_residual_is_withheld(monkeypatch):
    monkeypatch.setattr("mtlweight.solvers._conflict_free.eigen", lambda C: (np.ones(C.shape[:-1]), np.eye(3) + 0 * C))
    with pytest.raises(SolverError, match=r"conflict_free expected .* stopped at 0\.\d+ \(m=3\)"):
        conflict_free(np.array([[1.0, 1.0, 0.5], [1.0, 1.0, 0.5], [0.5, 0.5, 1.0]]))
