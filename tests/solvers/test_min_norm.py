"""The min-norm point, against exact arithmetic, an enumeration of all supports and closed forms."""

import importlib
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mtlweight import MTLWeightError
from mtlweight.solvers import SolverError, min_norm
from tests.solvers.jacobians import large_jacobians, shares, small_jacobians, solve


def residual(J, weights, number):
    """The documented residual, from J, in another arithmetic; the norms of rows only set the unit."""
    norms = np.sqrt(np.square(J).sum(1))
    total = weights @ norms
    if total == 0.0:
        return 0.0
    J, weights = np.vectorize(number, otypes=[object])(J), np.vectorize(number, otypes=[object])(weights)
    x = weights @ J
    products = J @ x
    square = weights @ products
    return max(float(square - p) / norm / total for p, norm in zip(products, norms, strict=True) if norm > 0)


def shortest(J):
    """The min-norm point by brute force in exact arithmetic: of each simplex of rows, the best stationary point."""
    J = np.vectorize(Fraction, otypes=[object])(J)
    points = []
    for size in range(1, len(J) + 1):
        for support in map(list, combinations(range(len(J)), size)):
            border = np.full((size, 1), Fraction(1))
            system = np.block([[J[support] @ J[support].T, border], [border.T, np.zeros((1, 1), int)]])
            solution = solve(system, np.array([0] * size + [1], dtype=object))
            if solution is not None and min(solution[:size]) >= 0:
                points.append(solution[:size] @ J[support])
    return min(points, key=lambda x: x @ x).astype(np.float64)


@given(small_jacobians())
def test_the_residual_is_below_1e_8_in_exact_arithmetic(J):
    assert residual(J, min_norm(J @ J.T).weights, Fraction) <= 1e-8


@settings(max_examples=150, deadline=None)
@given(large_jacobians())
def test_the_residual_is_below_1e_8_for_up_to_128_rows_of_every_kind(J):
    assert residual(J, min_norm(J @ J.T).weights, np.longdouble) <= 1e-8


@settings(max_examples=50, deadline=None)
@given(large_jacobians())
def test_the_weights_lie_on_the_simplex(J):
    weights, _ = min_norm(J @ J.T)
    assert (weights >= 0.0).all()
    assert weights.sum() == pytest.approx(1.0, rel=1e-14)


@given(small_jacobians())
def test_the_reported_residual_is_the_documented_one(J):
    weights, reported = min_norm(J @ J.T)
    assert reported == pytest.approx(residual(J, weights, Fraction), abs=1e-11)


@given(small_jacobians())
@example(np.array([[-1e6, 0.0], [1e6, 0.0], [1e-6, 1e-6]]))  # the large rows cancel, the small one is no part of that
@example(np.array([[-10.0, 0.0], [10.0, 0.0], [0.1, 0.1]]))
def test_the_point_is_the_shortest_over_all_supports(J):
    weights, _ = min_norm(J @ J.T)
    norms = np.sqrt(np.square(J).sum(1))
    unit = weights @ norms  # what rounding is measured in
    np.testing.assert_allclose(weights @ J, shortest(J), atol=1e-9 * unit, rtol=0.0)


@pytest.mark.parametrize("angle", [1e-1, 1e-2, 1e-3])
def test_what_little_remains_of_nearly_opposed_rows_has_the_right_direction(angle):
    J = np.array([[1.0, angle, 0.0], [-2.0, 3.0 * angle, angle], [1.0, 2.0 * angle, -angle]])
    expected = shortest(J)
    np.testing.assert_allclose(min_norm(J @ J.T).weights @ J, expected, atol=1e-10 * np.linalg.norm(expected), rtol=0.0)


@given(small_jacobians(), st.randoms(use_true_random=False))
def test_permuting_the_rows_permutes_the_weights(J, random):
    order = random.sample(range(len(J)), len(J))
    G = J @ J.T
    weights, permuted = min_norm(G).weights, min_norm(G[np.ix_(order, order)]).weights
    np.testing.assert_allclose(shares(J[order], permuted), shares(J, weights)[order], atol=1e-5)


@given(small_jacobians(), st.integers(-33, 50))
def test_a_common_scale_changes_nothing(J, exponent):
    unit = np.abs(J).max() or 1.0
    J = J / unit
    K = 2.0**exponent * J  # exactly: other factors round the Gramian, and so choose among weights that are not unique
    np.testing.assert_allclose(min_norm(K @ K.T).weights, min_norm(J @ J.T).weights, rtol=1e-12, atol=1e-15)


@given(small_jacobians(max_rows=4))
def test_duplicate_rows_share_their_weight(J):
    pair = np.concatenate([J, J])
    weights, _ = min_norm(pair @ pair.T)
    halves = shares(pair, weights).reshape(2, -1)
    np.testing.assert_allclose(halves[0], halves[1], atol=1e-5)


@given(arrays(np.float64, (2, 3), elements=st.floats(-10, 10, width=16)))
def test_two_rows_have_the_clipped_line_search_of_mgda(J):
    g, h = J
    if (gap := (g - h) @ (g - h)) > 1e-6 and g.any() and h.any():
        share = np.clip((h - g) @ h / gap, 0.0, 1.0)
        np.testing.assert_allclose(min_norm(J @ J.T).weights, [share, 1.0 - share], atol=1e-9)


@given(arrays(np.float64, st.integers(1, 20), elements=st.floats(1e-6, 1e6)))
def test_orthogonal_rows_are_weighted_by_their_inverse_squared_norms(norms):
    weights, _ = min_norm(np.diag(norms**2))
    np.testing.assert_allclose(weights, norms**-2 / (norms**-2).sum(), rtol=1e-9)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[7.0, 1.0]], [1.0]),
        ([[3.0], [-1.0]], [0.25, 0.75]),
        ([[1.0], [3.0]], [1.0, 0.0]),
        ([[2.0, 1.0], [2.0, 1.0]], [0.5, 0.5]),
        ([[1.0], [-1.0], [-1.0]], [0.5, 0.25, 0.25]),
        ([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], [1 / 3, 1 / 3, 1 / 3]),
        ([[1.0, 1.0], [-1.0, 1.0], [0.0, 5.0]], [0.5, 0.5, 0.0]),
        ([[0.0, 0.0], [1.0, 2.0], [0.0, 0.0]], [0.5, 0.0, 0.5]),
        ([[0.0], [0.0], [0.0], [0.0]], [0.25, 0.25, 0.25, 0.25]),
    ],
)
def test_known_answers(rows, expected):
    J = np.array(rows)
    np.testing.assert_allclose(min_norm(J @ J.T).weights, expected, atol=1e-9)


def test_the_least_of_all_minimisers_is_chosen():
    J = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    np.testing.assert_allclose(min_norm(J @ J.T).weights, np.full(4, 0.25), atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(large_jacobians())
def test_a_gramian_rounded_to_float32_is_ordinary_input(J):
    J = J / (np.sqrt(np.square(J).sum(1, keepdims=True)).max() or 1.0)
    G = (J @ J.T).astype(np.float32).astype(np.float64)
    J = np.where(np.diag(G)[:, None] > 0.0, J, 0.0)
    if (np.diag(G)[np.diag(G) > 0.0] > 1e-36).all():  # below, float32 has no digits left
        assert residual(J, min_norm(G).weights, np.longdouble) <= 1e-5


def test_the_gramian_is_not_changed():
    G = np.array([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 1.0]])
    before = G.copy()
    min_norm(G)
    np.testing.assert_array_equal(G, before)


@pytest.mark.parametrize(
    ("gramian", "message"),
    [
        (np.ones(3), r"square Gramian .* found shape \[3\]"),
        (np.ones((2, 3)), r"square Gramian .* found shape \[2, 3\]"),
        (np.ones((0, 0)), r"found shape \[0, 0\]"),
        (np.array([[1.0, np.nan], [np.nan, 1.0]]), "found 2 entries that are inf or nan"),
        (np.array([[np.inf]]), "found 1 entries that are inf or nan"),
        (np.array([[1.0, 2.0], [2.0, 1.0]]), "lowest eigenvalue of -1"),
        (np.array([[1.0, 0.5], [0.0, 1.0]]), r"asymmetry of 0\.5"),
    ],
)
def test_what_is_no_gramian_is_refused(gramian, message):
    with pytest.raises(MTLWeightError, match=message):
        min_norm(gramian)


def test_an_answer_above_the_residual_is_withheld(monkeypatch):
    module = importlib.import_module("mtlweight.solvers._min_norm")
    monkeypatch.setattr(module, "shortest", lambda C, _: np.ones(len(C)))
    with pytest.raises(SolverError, match=r"stopped at 0\.\d+ \(m=3\)"):
        min_norm(np.diag([1.0, 4.0, 9.0]))


@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_a_gramian_of_another_dtype_is_solved_in_float64(dtype):
    G = np.array([[4, -1, 2], [-1, 7, 1], [2, 1, 5]], dtype)
    weights, residual = min_norm(G)
    assert weights.dtype == np.float64
    assert residual <= 1e-14
    np.testing.assert_array_equal(weights, min_norm(G.astype(np.float64)).weights)
