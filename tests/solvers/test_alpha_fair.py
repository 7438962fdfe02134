"""Nash and alpha-fair weights: the equation from J in long doubles, exact coalitions, slow fixed points."""

from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mtlweight import MTLWeightError
from mtlweight.solvers import SolverError, alpha_fair, min_norm
from tests.solvers.jacobians import exact, large_jacobians, lengths, small_jacobians

alphas = st.sampled_from([0.5, 1.0, 1.0, 2.0, 2.0, 5.0])
small_integers = st.integers(1, 5).flatmap(
    lambda m: st.integers(1, 4).flatmap(lambda n: arrays(np.float64, (m, n), elements=st.integers(-3, 3)))
)


def backward_error(J, weights, alpha, coalition=None):
    """The documented residual, from J, in long doubles; zero rows left out."""
    coalition = np.zeros(len(J), bool) if coalition is None else coalition
    norms = lengths(J.astype(np.longdouble))
    alive = norms > 0
    if not alive.any():
        return 0.0
    U, y = J[alive].astype(np.longdouble) / norms[alive, None], weights[alive] * norms[alive]
    target = weights[alive].astype(np.longdouble) ** (-1 / np.longdouble(alpha)) / norms[alive]
    target[coalition[alive]] = 0
    return float((np.abs(U @ (y @ U) - target) / (np.abs(U @ U.T) @ y)).max())


def coalition(J):
    """The rows that occur in a vanishing combination with nonnegative coefficients, in exact arithmetic.

    Every such combination is a sum of elementary ones: their rows are dependent, but no proper subset is.
    """
    J = exact(J)
    found = np.zeros(len(J), bool)
    for size in range(1, len(J) + 1):
        for support in map(list, combinations(range(len(J)), size)):
            null = null_space(J[support].T)
            if len(null) == 1 and (min(null[0]) > 0 or max(null[0]) < 0):
                found[support] = True
    return found


def null_space(A):
    A, pivots = A.copy(), []
    for column in range(A.shape[1]):
        row = next((k for k in range(len(pivots), len(A)) if A[k, column]), None)
        if row is None:
            continue
        i = len(pivots)
        A[[i, row]] = A[[row, i]]
        A[i] = A[i] / Fraction(A[i, column])
        for k in range(len(A)):
            if k != i:
                A[k] = A[k] - A[k, column] * A[i]
        pivots.append(column)
    vectors = []
    for column in set(range(A.shape[1])) - set(pivots):
        x = np.array([Fraction(0)] * A.shape[1], dtype=object)
        x[column] = Fraction(1)
        for i, pivot in enumerate(pivots):
            x[pivot] = -A[i, column]
        vectors.append(x)
    return vectors


def by_turns(J, alpha, sweeps=3000):
    """One weight after the other, each the root of its own equation, in long doubles. Slow; needs a solution."""
    J = J.astype(np.longdouble)
    G = J @ J.T
    w = np.ones(len(J), np.longdouble)
    for _ in range(sweeps):
        last = w.copy()
        for i in range(len(J)):
            rest = G[i] @ w - G[i, i] * w[i]
            low, high = np.longdouble(-60), np.longdouble(60)  # in logarithms
            for _ in range(75):
                middle = (low + high) / 2
                if G[i, i] * np.exp(middle) + rest > np.exp(-middle / alpha):
                    high = middle
                else:
                    low = middle
            w[i] = np.exp(low)
        if np.abs(w / last - 1).max() < 1e-14:
            break
    return w.astype(np.float64)


@given(small_integers, alphas, st.lists(st.integers(-20, 20), min_size=5, max_size=5), st.integers(-30, 50))
def test_the_residual_is_below_1e_8_also_where_rows_cancel(J, alpha, rows, whole):
    S = coalition(J)
    J = J * 2.0 ** (np.array(rows[: len(J)])[:, None] + whole)  # exact: what cancels still does
    assert backward_error(J, alpha_fair(J @ J.T, alpha).weights, alpha, S) <= 1e-8


@settings(max_examples=150)
@given(st.one_of(st.tuples(large_jacobians(), st.just(1.0)), st.tuples(large_jacobians(spreads=(0, 3, 6)), alphas)))
def test_an_answer_solves_the_equation_or_leaves_the_losses_of_those_who_cancel(problem):
    J, alpha = problem
    weights = alpha_fair(J @ J.T, alpha).weights
    if backward_error(J, weights, alpha) > 1e-8:
        # Not this: then a convex combination cancels, and these rows have no share in the step.
        U = J[J.any(1)] / lengths(J[J.any(1)])[:, None]
        assert np.linalg.norm(min_norm(U @ U.T).weights @ U) < 1e-6
        y = (weights * lengths(J))[J.any(1)]
        gains = np.abs(U @ (y @ U)) / (np.abs(U @ U.T) @ y)
        assert backward_error(J, weights, alpha, embed(J, gains < 1e-6)) <= 1e-8  # as above


def embed(J, values):
    full = np.zeros(len(J), bool)
    full[J.any(1)] = values
    return full


@given(small_jacobians(), alphas)
def test_the_reported_residual_is_small_and_weights_are_positive_but_for_zero_rows(J, alpha):
    weights, residual = alpha_fair(J @ J.T, alpha)
    assert residual <= 1e-8
    np.testing.assert_array_equal(weights > 0, J.any(1))


@settings(max_examples=25)
@given(arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(2, 4)), elements=st.integers(-3, 3)), alphas)
def test_the_weights_are_those_of_a_slow_fixed_point(J, alpha):
    J = J[J.any(1)]
    if len(J) and not coalition(J).any():
        slow = by_turns(J, alpha)
        if backward_error(J, slow, alpha) < 1e-13:  # it has arrived
            fast = alpha_fair(J @ J.T, alpha).weights
            np.testing.assert_allclose(fast @ J, slow @ J, rtol=0.0, atol=1e-9 * (slow @ lengths(J)))
            if np.linalg.matrix_rank(J) == len(J):
                np.testing.assert_allclose(fast, slow, rtol=1e-7)


@given(small_integers, alphas)
def test_those_who_cancel_stay_as_they_are_and_the_others_share_what_is_left(J, alpha):
    S = coalition(J)
    if not S.any() or S.all():
        return
    weights = alpha_fair(J @ J.T, alpha).weights
    d = weights @ J
    unit = weights @ lengths(J)
    assert np.abs(J[S] @ d).max() <= 1e-9 * unit * lengths(J).max()
    # Project the other rows on the complement of those who cancel, and solve for them alone.
    basis = np.linalg.svd(J[S])[2][: np.linalg.matrix_rank(J[S])]
    rest = J[~S] - J[~S] @ basis.T @ basis
    alone = alpha_fair(rest @ rest.T, alpha).weights
    np.testing.assert_allclose(alone @ rest, d, atol=1e-8 * unit, rtol=0.0)
    np.testing.assert_allclose(weights[~S] @ rest, d, atol=1e-8 * unit, rtol=0.0)


@given(small_integers, alphas)
def test_those_who_cancel_have_at_least_the_weight_that_they_have_alone(J, alpha):
    S = coalition(J) & J.any(1)
    weights = alpha_fair(J @ J.T, alpha).weights
    assert (weights[S] >= lengths(J)[S] ** (-2 * alpha / (1 + alpha)) * (1 - 1e-9)).all()


@given(small_integers, alphas, st.integers(-30, 50))
def test_a_common_scale_has_the_power_that_the_equation_says(J, alpha, exponent):
    a, b = alpha_fair(J @ J.T, alpha).weights, alpha_fair(4.0**exponent * J @ J.T, alpha).weights
    power = -2 * alpha / (1 + alpha)
    unit = a @ lengths(J)
    np.testing.assert_allclose(b * 2.0 ** (-power * exponent) @ J, a @ J, atol=1e-9 * unit, rtol=0.0)


@given(small_integers, st.lists(st.integers(-20, 20), min_size=5, max_size=5))
def test_bargaining_does_not_depend_on_the_length_of_any_row(J, rows):
    K = J * 2.0 ** np.array(rows[: len(J)])[:, None]
    a, b = alpha_fair(J @ J.T).weights, alpha_fair(K @ K.T).weights
    np.testing.assert_allclose(b @ K, a @ J, atol=1e-8 * (a @ lengths(J)), rtol=0.0)


@given(small_integers, alphas, st.randoms(use_true_random=False))
def test_permuting_the_rows_permutes_the_step(J, alpha, random):
    order = random.sample(range(len(J)), len(J))
    a, b = alpha_fair(J @ J.T, alpha).weights, alpha_fair(J[order] @ J[order].T, alpha).weights
    np.testing.assert_allclose(b @ J[order], a @ J, atol=1e-8 * (a @ lengths(J)), rtol=0.0)


@given(arrays(np.float64, (2, 3), elements=st.integers(-5, 5)))
def test_two_rows_bargain_in_closed_form(J):
    if J.any(1).all():
        norms = lengths(J)
        cosine = J[0] @ J[1] / norms.prod()
        if cosine > -0.999:
            np.testing.assert_allclose(alpha_fair(J @ J.T).weights, 1 / norms / np.sqrt(1 + cosine), rtol=1e-9)


@given(st.floats(-0.999, 1.0), st.floats(-6, 6), st.sampled_from([0.1, 0.5, 1.0, 2.0, 10.0]))
@example(-0.999, 6.0, 10.0)
@example(0.0, -6.0, 0.1)
@example(1.0, 6.0, 0.1)
def test_two_rows_are_solved_as_more_are(cosine, exponent, alpha):
    norms = np.array([1.0, 10.0**exponent, 1.0])
    G = norms * norms[:, None] * np.array([[1.0, cosine, 0.0], [cosine, 1.0, 0.0], [0.0, 0.0, 1.0]])
    two, three = alpha_fair(G[:2, :2], alpha), alpha_fair(G, alpha)  # the third is orthogonal to them
    assert two.residual <= 1e-13
    np.testing.assert_allclose(two.weights, three.weights[:2], rtol=1e-9)


@given(arrays(np.float64, st.integers(1, 20), elements=st.floats(1e-6, 1e6)), alphas)
def test_orthogonal_rows_are_weighted_by_a_power_of_their_norms(norms, alpha):
    np.testing.assert_allclose(alpha_fair(np.diag(norms**2), alpha).weights, norms ** (-2 * alpha / (1 + alpha)), 1e-9)


@pytest.mark.parametrize(("alpha", "spread"), [(0.01, 0), (0.1, 6), (10.0, 6), (100.0, 0)])
@pytest.mark.parametrize("m", [2, 8, 64])
def test_an_extreme_alpha_is_solved_too(alpha, spread, m):
    J = np.random.default_rng(m).standard_normal((m, 2 * m)) * 10.0 ** np.linspace(-spread, spread, m)[:, None]
    assert backward_error(J, alpha_fair(J @ J.T, alpha).weights, alpha) <= 1e-8


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[2.0]], [0.5]),
        ([[1.0, 0.0], [0.0, 1.0]], [1.0, 1.0]),
        ([[1.0], [1.0]], [2**-0.5, 2**-0.5]),
        ([[2.0], [-1.0]], [0.5, 1.0]),  # opposed
        ([[2.0, 0.0], [-1.0, 0.0], [0.0, 4.0]], [0.5, 1.0, 0.25]),  # opposed, and a third that goes on alone
        ([[2.0, 0.0], [-1.0, 0.0], [1.0, 1.0]], [0.5, 2.0, 1.0]),  # whose part along them is taken away
        ([[0.0], [2.0]], [0.0, 0.5]),
        ([[0.0], [0.0]], [0.0, 0.0]),
    ],
)
def test_known_answers(rows, expected):
    J = np.array(rows)
    np.testing.assert_allclose(alpha_fair(J @ J.T).weights, expected, atol=1e-9)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 2.0, 10.0, 1e5])
def test_opposed_rows_have_the_weights_that_they_have_alone(alpha):
    weights, residual = alpha_fair(np.array([[1.0, -1.0], [-1.0, 1.0]]), alpha)
    np.testing.assert_allclose(weights, 1.0, rtol=1e-12)
    assert residual <= 1e-14


def test_rows_that_nearly_cancel_push_along_what_they_have_in_common():
    J = np.array([[1.0, 1e-4], [-1.0, 1e-4]])
    np.testing.assert_allclose(alpha_fair(J @ J.T).weights @ J, [0.0, np.sqrt(2)], atol=1e-6)


def test_the_gramian_is_not_changed():
    G = np.array([[1.0, -2.0, 0.0], [-2.0, 5.0, 0.0], [0.0, 0.0, 0.0]])
    before = G.copy()
    alpha_fair(G, 2.0)
    np.testing.assert_array_equal(G, before)


@pytest.mark.parametrize("alpha", [0.0, -1.0, np.nan, np.inf])
def test_an_alpha_that_is_none_is_refused(alpha):
    with pytest.raises(MTLWeightError, match="positive, finite alpha"):
        alpha_fair(np.eye(2), alpha)


def test_weights_outside_of_float64_are_refused():
    nearly_opposed = np.array([[1.0, -1.0 + 1e-10], [-1.0 + 1e-10, 1.0]])
    with pytest.raises(SolverError, match=r"gradients of lengths 1e-153 to 1e-153 and alpha=1000"):
        alpha_fair(1e-306 * nearly_opposed, 1000.0)


def test_an_answer_above_the_residual_is_withheld(monkeypatch):
    monkeypatch.setattr("mtlweight.solvers._alpha_fair._ROUNDS", 1)
    with pytest.raises(SolverError, match=r"alpha_fair expected .* stopped at 0\.\d+ \(m=3\)"):
        alpha_fair(np.array([[1.0, 0.9, 0.0], [0.9, 1.0, -0.4], [0.0, -0.4, 1.0]]))
