"""Projections on the dual cone, against exact arithmetic, an enumeration of all supports and closed forms."""

import importlib
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mtlweight import MTLWeightError
from mtlweight.solvers import SolverError, dual_cone
from tests.solvers.jacobians import exact, large_jacobians, lengths, small_jacobians, solve


def residual(J, u, v, number):
    """The documented residual, from J, in another arithmetic."""
    norms = lengths(J)
    unit = (np.abs(u) + np.maximum(v - u, 0.0)) @ norms
    if unit == 0.0:
        return 0.0
    J, u, v = exact(J, number), exact(u, number), exact(v, number)
    products = J @ (v @ J)
    pairs = [(float(v[i] - u[i]) * n, float(products[i]) / n) for i, n in enumerate(norms) if n > 0.0]
    return max(abs(min(pair)) for pair in pairs) / unit


def nearest(J, u):
    """The projection by brute force, in exact arithmetic: of all faces of the cone, the one with the right signs."""
    J, u = exact(J), exact(u)
    for size in range(len(J) + 1):
        for support in map(list, combinations(range(len(J)), size)):
            d = u @ J
            if size:
                multipliers = solve(J[support] @ J[support].T, -(J[support] @ d))
                if multipliers is None or min(multipliers) < 0:
                    continue
                d = d + multipliers @ J[support]
            if min(J @ d) >= 0:
                return d.astype(np.float64)
    raise AssertionError("every cone has a nearest point")


def preferences(m):
    return st.one_of(
        st.just(np.eye(m)), st.just(np.full((1, m), 1 / m)), arrays(np.float64, (3, m), elements=st.integers(-2, 3))
    )


@st.composite
def small_problems(draw, max_rows=5):
    J = draw(small_jacobians(max_rows))
    return J, draw(preferences(len(J)))


@given(small_problems())
def test_the_residual_is_below_1e_8_in_exact_arithmetic(problem):
    J, U = problem
    for u, v in zip(U, dual_cone(J @ J.T, U).weights, strict=True):
        assert residual(J, u, v, Fraction) <= 1e-8


@settings(max_examples=80)
@given(large_jacobians())
def test_the_residual_is_below_1e_8_for_up_to_128_rows_of_every_kind(J):
    U = np.vstack([np.eye(len(J))[:: max(1, len(J) // 8)], np.full(len(J), 1 / len(J))])
    for u, v in zip(U, dual_cone(J @ J.T, U).weights, strict=True):
        assert residual(J, u, v, np.longdouble) <= 1e-8


@given(small_problems())
def test_the_reported_residual_is_the_largest_of_the_documented_ones(problem):
    J, U = problem
    weights, reported = dual_cone(J @ J.T, U)
    found = max(residual(J, u, v, Fraction) for u, v in zip(U, weights, strict=True))
    assert reported == pytest.approx(found, abs=1e-11)


@given(small_problems(max_rows=4))
def test_the_point_is_the_nearest_of_all_faces(problem):
    J, U = problem
    for u, v in zip(U, dual_cone(J @ J.T, U).weights, strict=True):
        unit = (np.abs(u) + np.abs(v)) @ lengths(J)
        np.testing.assert_allclose(v @ J, nearest(J, u), atol=1e-9 * unit, rtol=0.0)


@given(small_problems())
def test_all_at_once_are_as_one_by_one(problem):
    J, U = problem
    G, norms = J @ J.T, lengths(J)
    for u, v in zip(U, dual_cone(G, U).weights, strict=True):
        alone = dual_cone(G, u).weights
        unit = (np.abs(u) + np.abs(v)) @ norms
        np.testing.assert_allclose(alone * norms, v * norms, atol=1e-4 * unit)  # which need not be unique
        np.testing.assert_allclose(alone @ J, v @ J, atol=1e-9 * unit, rtol=0.0)


@given(small_problems())
def test_multipliers_are_not_negative_and_zero_rows_keep_their_preference(problem):
    J, U = problem
    V = dual_cone(J @ J.T, U).weights
    assert (V >= U).all()
    np.testing.assert_array_equal(V[:, ~J.any(1)], U[:, ~J.any(1)])


@given(small_problems())
def test_projecting_twice_changes_nothing(problem):
    J, U = problem
    V = dual_cone(J @ J.T, U).weights
    again = dual_cone(J @ J.T, V).weights
    for u, v, w in zip(U, V, again, strict=True):
        unit = (np.abs(u) + np.abs(w)) @ lengths(J)
        np.testing.assert_allclose(w @ J, v @ J, atol=1e-8 * unit, rtol=0.0)


@given(small_problems(), st.randoms(use_true_random=False))
def test_permuting_the_rows_permutes_the_weights(problem, random):
    J, U = problem
    order = random.sample(range(len(J)), len(J))
    G, norms = J @ J.T, lengths(J)
    V, permuted = dual_cone(G, U).weights, dual_cone(G[np.ix_(order, order)], U[:, order]).weights
    for u, v, w in zip(U, V, permuted, strict=True):
        unit = (np.abs(u) + np.abs(v)) @ norms
        np.testing.assert_allclose(w * norms[order], (v * norms)[order], atol=1e-5 * unit)


@given(small_problems(), st.integers(-30, 50))
def test_a_common_scale_changes_nothing(problem, exponent):
    J, U = problem
    K = 2.0**exponent * J
    np.testing.assert_allclose(dual_cone(K @ K.T, U).weights, dual_cone(J @ J.T, U).weights, rtol=1e-9, atol=1e-9)


@given(small_problems(), st.lists(st.integers(-20, 20), min_size=5, max_size=5))
def test_the_lengths_of_the_rows_do_not_change_the_cone(problem, exponents):
    J, U = problem
    scales = 2.0 ** np.array(exponents[: len(J)])
    V = dual_cone(J @ J.T, U).weights
    K = scales[:, None] * J
    W = dual_cone(K @ K.T, U / scales).weights
    for u, v, w in zip(U, V, W, strict=True):
        unit = (np.abs(u) + np.abs(v)) @ lengths(J)
        np.testing.assert_allclose(w @ K, v @ J, atol=1e-9 * unit, rtol=0.0)


@given(arrays(np.float64, (2, 3), elements=st.floats(-10, 10, width=16)))
def test_of_two_rows_each_gives_up_its_part_along_the_other(J):
    if J.any(1).all():
        for i in range(2):
            g, h = J[i], J[1 - i]
            expected = g - min(g @ h, 0.0) / (h @ h) * h
            np.testing.assert_allclose(dual_cone(J @ J.T, np.eye(2)).weights[i] @ J, expected, atol=1e-9)


@pytest.mark.parametrize(
    ("rows", "u", "expected"),
    [
        ([[7.0, 1.0]], [1.0], [1.0]),
        ([[1.0, 0.0], [0.0, 1.0]], [0.3, 0.7], [0.3, 0.7]),
        ([[1.0, 0.0], [-1.0, 1.0]], [0.0, 1.0], [1.0, 1.0]),
        ([[3.0], [-1.0]], [0.5, 0.5], [0.5, 1.5]),
        ([[3.0], [-1.0]], [-1.0, 0.0], [0.0, 0.0]),
        ([[1.0, 0.0], [1.0, 0.0], [-2.0, 0.0]], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]),
        ([[1.0, 0.0], [0.0, 0.0]], [-1.0, 5.0], [0.0, 5.0]),
        ([[0.0], [0.0]], [1.0, -2.0], [1.0, -2.0]),
    ],
)
def test_known_answers(rows, u, expected):
    J = np.array(rows)
    np.testing.assert_allclose(dual_cone(J @ J.T, np.array(u)).weights, expected, atol=1e-9)


@pytest.mark.parametrize("angle", [1e-1, 1e-2, 1e-3, 1e-4])
def test_what_little_remains_between_nearly_opposed_rows_is_exact(angle):
    J = np.array([[1.0, angle, 0.0], [-2.0, 3.0 * angle, angle], [1.0, -2.0 * angle, angle], [0.5, angle, -angle]])
    u = np.array([1.0, 0.0, 0.5, 0.0])
    expected = nearest(J, u)
    found = dual_cone(J @ J.T, u).weights @ J
    np.testing.assert_allclose(found, expected, atol=1e-14 / angle**2 + 1e-13, rtol=0.0)


def test_the_multipliers_of_least_length_are_taken():
    J = np.array([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0], [-1.0, 0.0]])
    v = dual_cone(J @ J.T, np.array([0.0, 0.0, 0.0, 3.0])).weights
    np.testing.assert_allclose(v * lengths(J), [1.0, 1.0, 1.0, 3.0], atol=1e-9)


@pytest.mark.parametrize("m", [8, 40])
def test_rows_that_never_settle_are_left_to_the_active_set(monkeypatch, m):
    module = importlib.import_module("mtlweight.solvers._nonnegative")
    J = np.random.default_rng(0).standard_normal((m, m + 5))
    expected = dual_cone(J @ J.T, np.eye(m)).weights
    monkeypatch.setattr(module, "_ROUNDS", 0)
    np.testing.assert_allclose(dual_cone(J @ J.T, np.eye(m)).weights, expected, atol=1e-12)


def test_nothing_given_is_changed():
    G, U = np.array([[1.0, -2.0, 0.0], [-2.0, 5.0, 0.0], [0.0, 0.0, 0.0]]), np.eye(3)
    before = G.copy(), U.copy()
    dual_cone(G, U)
    np.testing.assert_array_equal(G, before[0])
    np.testing.assert_array_equal(U, before[1])


@pytest.mark.parametrize(
    ("preferences", "message"),
    [
        (np.ones(3), r"preferences \[2\] or \[r, 2\], but found shape \[3\]"),
        (np.ones((2, 2, 2)), r"found shape \[2, 2, 2\]"),
        (np.array([1.0, np.inf]), "1 entries that are inf or nan"),
    ],
)
def test_preferences_that_do_not_fit_are_refused(preferences, message):
    with pytest.raises(MTLWeightError, match=message):
        dual_cone(np.eye(2), preferences)


def test_an_answer_above_the_residual_is_withheld(monkeypatch):
    module = importlib.import_module("mtlweight.solvers._nonnegative")
    monkeypatch.setattr(module, "nonnegative_quadratics", lambda _, Q, *__: np.ones_like(Q))
    J = np.array([[1.0, 0.0, 0.0], [-1.0, 1.0, 0.0], [0.0, -1.0, 1.0]])
    with pytest.raises(SolverError, match=r"dual_cone expected .* stopped at 0\.\d+ \(m=3\)"):
        dual_cone(J @ J.T, np.eye(3))
