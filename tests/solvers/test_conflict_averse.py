"""CAGrad's problem: its conditions from J in long doubles, competitors from the ball, closed forms."""

import importlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mtlweight import MTLWeightError
from mtlweight.solvers import SolverError, conflict_averse, dual_cone, min_norm
from tests.solvers.jacobians import large_jacobians, lengths, small_jacobians

radii = st.sampled_from([0.01, 0.1, 0.4, 0.5, 0.9, 1.0, 1.5, 10.0])


def residual(J, weights, radius):
    """The documented residual, from J, in long doubles."""
    m = len(J)
    J = J.astype(np.longdouble)
    norms = lengths(J)
    alive = norms > 0
    if not alive.any():
        return 0.0
    v = weights.astype(np.longdouble) - np.longdouble(1) / m
    v[np.abs(v) <= 4e-16] = 0  # 1/m is rounded in the weights
    average, d = J.mean(0), J.mean(0) + v @ J
    unit = (np.longdouble(1) / m + v) @ norms
    gains = J @ d
    off = np.linalg.norm(d - average) - radius * np.linalg.norm(average)
    if np.linalg.norm(average) <= 1e-6 * norms.sum() / m:
        off = 0  # G has the square of the average's length, and half of its digits are lost in the root
        if np.linalg.norm(average) <= 3e-8 * norms.sum() / m:  # the average is rounding
            return float(abs(v @ norms) / unit)
    candidates = [np.longdouble(0)]  # for t; where rows differ much in length, none can be told from J and v alone
    if off < -1e-9 * unit:
        off = 0  # inside of the ball: only where no greater t than 0 is possible
        assert stationary(J[alive])
    elif v.any():
        candidates.append((v @ gains) / v.sum())
    worst = min(
        np.abs(np.minimum((v * norms)[alive], ((gains - t) / np.where(alive, norms, 1))[alive])).max()
        for t in candidates
    )
    return float(max(worst, abs(off)) / unit)


def stationary(J):
    """Whether a convex combination of the rows vanishes."""
    U = (J / lengths(J)[:, None]).astype(np.float64)
    w = min_norm(U @ U.T).weights
    return np.linalg.norm(w @ U) < 1e-6


@given(small_jacobians(), radii)
def test_the_residual_is_below_1e_8(J, radius):
    assert residual(J, conflict_averse(J @ J.T, radius).weights, radius) <= 1e-8


@settings(max_examples=100)
@given(large_jacobians(), radii)
def test_the_residual_is_below_1e_8_for_up_to_128_rows_of_every_kind(J, radius):
    assert residual(J, conflict_averse(J @ J.T, radius).weights, radius) <= 1e-8


@given(small_jacobians(), radii)
def test_the_reported_residual_is_as_small(J, radius):
    assert conflict_averse(J @ J.T, radius).residual <= 1e-8


@given(arrays(np.float64, (4, 3), elements=st.integers(-3, 3)), radii, st.integers(0, 2**32))
def test_no_other_step_in_the_ball_is_better_in_the_worst_case(J, radius, seed):
    J = J[J.any(1)]
    if not len(J):
        return
    average, d = J.mean(0), conflict_averse(J @ J.T, radius).weights @ J
    ball = radius * np.linalg.norm(average)
    assert np.linalg.norm(d - average) <= ball + 1e-7
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((200, 3)) * 10.0 ** rng.uniform(-4, 0, (200, 1)) + d - average  # near and far
    others = average + noise * np.minimum(1.0, ball / np.linalg.norm(noise, axis=1))[:, None]
    assert (others @ J.T).min(1).max() <= (J @ d).min() + 1e-7


@given(arrays(np.float64, (4, 3), elements=st.integers(-3, 3)), radii, st.integers(0, 2**32))
def test_no_point_of_the_dual_is_below_the_worst_case(J, radius, seed):
    J = J[J.any(1)]
    if not len(J):
        return
    average, d = J.mean(0), conflict_averse(J @ J.T, radius).weights @ J
    p = np.random.default_rng(seed).dirichlet(np.full(len(J), 0.3), 200)
    bounds = p @ J @ average + radius * np.linalg.norm(average) * np.linalg.norm(p @ J, axis=1)
    assert bounds.min() >= (J @ d).min() - 1e-7


@given(small_jacobians(), radii, st.integers(-30, 50))
def test_a_common_scale_changes_nothing(J, radius, exponent):
    K = 2.0**exponent * J
    a, b = conflict_averse(K @ K.T, radius).weights, conflict_averse(J @ J.T, radius).weights
    np.testing.assert_allclose(a, b, rtol=1e-9)


@given(small_jacobians(), radii, st.randoms(use_true_random=False))
def test_permuting_the_rows_permutes_the_step(J, radius, random):
    order = random.sample(range(len(J)), len(J))
    a, b = conflict_averse(J @ J.T, radius).weights, conflict_averse(J[order] @ J[order].T, radius).weights
    unit = (a + b) @ lengths(J)
    np.testing.assert_allclose(b @ J[order], a @ J, atol=1e-6 * unit, rtol=0.0)


@given(small_jacobians(), radii)
def test_zero_rows_change_the_average_alone(J, radius):
    alive = J.any(1)
    weights = conflict_averse(J @ J.T, radius).weights
    np.testing.assert_array_equal(weights[~alive], 1 / len(J))
    assert (weights >= 1 / len(J)).all()


@given(small_jacobians())
def test_a_radius_of_zero_is_the_average(J):
    np.testing.assert_array_equal(conflict_averse(J @ J.T, 0.0).weights, 1 / len(J))


@given(arrays(np.float64, (3, 5), elements=st.floats(-10, 10, width=16)))
def test_a_huge_radius_is_the_min_norm_point(J):
    w = min_norm(J @ J.T).weights
    average, shortest = np.linalg.norm(J.mean(0)), np.linalg.norm(w @ J)
    if shortest > 0.1 and average > 0.1:
        found = conflict_averse(J @ J.T, 1e6).weights - 1 / 3
        np.testing.assert_allclose(found / found.sum(), w, atol=1e-4)


@given(st.floats(0.1, 3.0), st.floats(0.01, 2.0))
def test_one_task_takes_a_longer_step(norm, radius):
    assert conflict_averse(np.array([[norm**2]]), radius).weights[0] == pytest.approx(1 + radius)


@pytest.mark.parametrize(
    ("rows", "radius", "expected"),
    [
        ([[1.0, 0.0], [0.0, 1.0]], 0.5, [0.75, 0.75]),
        ([[1.0, 0.0], [-0.5, 0.5]], 0.5, [0.5, 0.75]),
        ([[3.0], [-1.0]], 0.5, [0.5, 1.0]),  # d is 1 -> 0.5: nearest to 0 in the ball
        ([[3.0], [-1.0]], 1.0, [0.5, 1.5]),  # the ball reaches 0
        ([[3.0], [-1.0]], 2.0, [0.5, 1.5]),  # no step is better than none
        ([[1.0], [-1.0]], 0.5, [0.5, 0.5]),  # the average is zero
        ([[0.0], [2.0]], 0.5, [0.5, 0.75]),
        ([[0.0], [0.0]], 0.5, [0.5, 0.5]),
    ],
)
def test_known_answers(rows, radius, expected):
    J = np.array(rows)
    np.testing.assert_allclose(conflict_averse(J @ J.T, radius).weights, expected, atol=1e-9)


def test_where_many_steps_are_equally_good_the_one_nearest_to_the_average_is_taken():
    J = np.array([[1.0, 0.0], [-2.0, 0.0], [0.0, 3.0]])
    weights = conflict_averse(J @ J.T, 0.5).weights
    np.testing.assert_allclose(weights @ J, [0.0, 1.0], atol=1e-9)
    np.testing.assert_allclose(weights, dual_cone(J @ J.T, np.full(3, 1 / 3)).weights, atol=1e-9)


@pytest.mark.parametrize("m", [2, 3, 8, 64])
@pytest.mark.parametrize("radius", [0.1, 0.4, 0.9, 2.0])
def test_independent_rows_are_solved_up_to_rounding(m, radius):
    J = np.random.default_rng(m).standard_normal((m, 3 * m)) * 10.0 ** np.linspace(-1, 1, m)[:, None]
    assert conflict_averse(J @ J.T, radius).residual <= 1e-12


def test_the_gramian_is_not_changed():
    G = np.array([[1.0, -2.0, 0.0], [-2.0, 5.0, 0.0], [0.0, 0.0, 0.0]])
    before = G.copy()
    conflict_averse(G, 0.5)
    np.testing.assert_array_equal(G, before)


@pytest.mark.parametrize("radius", [-0.1, np.nan, np.inf])
def test_a_radius_that_is_none_is_refused(radius):
    with pytest.raises(MTLWeightError, match="radius >= 0"):
        conflict_averse(np.eye(2), radius)


def test_an_answer_above_the_residual_is_withheld(monkeypatch):
    module = importlib.import_module("mtlweight.solvers._conflict_averse")
    monkeypatch.setattr(module._Problem, "solve", lambda self: (np.ones_like(self.b), 0.5))
    with pytest.raises(SolverError, match=r"conflict_averse expected .* stopped at 0\.\d+ \(m=3\)"):
        conflict_averse(np.diag([1.0, 4.0, 9.0]), 0.5)
