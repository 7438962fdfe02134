"""What holds for every solver alike, on every kind of input that the conformance kit draws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mtlweight import MTLWeightError, solvers
from mtlweight.testing import arbitrary

SOLVERS = {
    "min_norm": solvers.min_norm,
    "dual_cone": lambda G: solvers.dual_cone(G, np.eye(len(G)) / max(1, len(G))),
    "conflict_averse": lambda G: solvers.conflict_averse(G, 0.4),
    "alpha_fair": lambda G: solvers.alpha_fair(G, 2.0),
    "equal_projection": solvers.equal_projection,
    "conflict_free": solvers.conflict_free,
}

OF_MANY = {
    "equal_projection": solvers.equal_projection,
    "equal_projection, absolute": lambda G: solvers.equal_projection(G, "absolute"),
    "conflict_free": solvers.conflict_free,
}


@st.composite
def gramians(draw, m):
    """Many of one size: every kind, every scale, and what rounding leaves a little indefinite or asymmetric."""
    kinds = st.sampled_from(sorted(arbitrary.kinds_for(m)))
    Gs = []
    for _ in range(draw(st.integers(1, 6))):
        J = draw(arbitrary.jacobians(m, kind=draw(kinds), scales=arbitrary.ALL_SCALES, spread=3)).numpy()
        norms = np.sqrt(np.square(J).sum(axis=1))
        noise = np.random.default_rng(draw(st.integers(0, 99))).standard_normal((m, m))
        rounding = draw(st.sampled_from([0.0, 1e-7]))
        Gs.append(J @ J.T + rounding * noise * norms * norms[:, None])
    return np.stack(Gs)


def test_every_solver_is_here():
    functions = {name for name in solvers.__all__ if name.islower()}
    assert functions == set(SOLVERS)


@pytest.mark.parametrize("kind", arbitrary.KINDS)
@pytest.mark.parametrize("name", SOLVERS)
@settings(max_examples=40)
@given(data=st.data())
def test_the_residual_is_kept_on_every_kind_of_input_and_scale(name, kind, data):
    m = data.draw(st.sampled_from([m for m in (1, 2, 3, 8) if kind in arbitrary.kinds_for(m)]))
    J = data.draw(arbitrary.jacobians(m, kind=kind, scales=arbitrary.ALL_SCALES, spread=6)).numpy()
    weights, residual = SOLVERS[name](J @ J.T)
    assert np.isfinite(weights).all()
    assert 0.0 <= residual <= 1e-8


@pytest.mark.parametrize("name", SOLVERS)
@given(exponent=st.integers(-162, -140) | st.integers(78, 150), data=st.data())
def test_gradients_whose_squares_or_their_squares_are_hardly_numbers_have_an_answer(name, exponent, data):
    m = data.draw(st.integers(1, 5))
    J = data.draw(arrays(np.float64, (m, 4), elements=st.floats(-1, 1, width=16))) * 10.0**exponent
    assert np.isfinite(SOLVERS[name](J @ J.T).weights).all()


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("m", [2, 3, 8])
@settings(max_examples=40)
@given(data=st.data())
def test_the_residual_is_kept_on_what_rounding_leaves_of_a_gramian(name, m, data):
    for G in data.draw(gramians(m)):
        weights, residual = SOLVERS[name](G)
        assert np.isfinite(weights).all()
        assert 0.0 <= residual <= 1e-8


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(
    ("gramian", "message"),
    [
        (np.ones(3), r"square Gramian .* found shape \[3\]"),
        (np.ones((2, 3)), r"square Gramian .* found shape \[2, 3\]"),
        (np.ones((0, 0)), r"found shape \[0, 0\]"),
        (np.array([[1.0, np.nan], [np.nan, 1.0]]), "found 2 entries that are inf or nan"),
        (np.array([[1.0, 2.0], [2.0, 1.0]]), "lowest eigenvalue of -1"),
        (np.array([[1.0, 0.5], [0.0, 1.0]]), r"asymmetry of 0\.5"),
        (np.array([[-1.0, 0.0], [0.0, 1.0]]), "found entries up to 1 beside a squared length of -1"),
        (np.array([[0.0, 5.0], [5.0, 1.0]]), "found entries up to 5 beside a squared length of 0"),
        (np.array([[0.0, 1.0], [1.0, 0.0]]), "found entries up to 1 beside a squared length of 0"),
    ],
)
def test_what_is_no_gramian_is_refused_by_name(name, gramian, message):
    with pytest.raises(MTLWeightError, match=f"{name} expected.*{message}"):
        SOLVERS[name](gramian)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("m", [1, 2, 5])
def test_a_zero_gramian_has_an_answer(name, m):
    weights, residual = SOLVERS[name](np.zeros((m, m)))
    assert np.isfinite(weights).all()
    assert residual == 0.0


@pytest.mark.parametrize("name", SOLVERS)
def test_a_gramian_that_rounding_left_asymmetric_counts_as_its_symmetric_part(name):
    J = np.random.default_rng(0).standard_normal((4, 9))
    G = J @ J.T
    rounding = 1e-3 * np.triu(G, 1)
    weights, _ = SOLVERS[name](G + rounding)
    expected, _ = SOLVERS[name](G + (rounding + rounding.T) / 2)
    np.testing.assert_allclose(weights, expected, rtol=1e-9)


@pytest.mark.parametrize("name", OF_MANY)
@pytest.mark.parametrize("m", [1, 2, 3, 8])
@given(data=st.data())
def test_many_gramians_at_once_are_solved_as_each_by_itself(name, m, data):
    Gs = data.draw(gramians(m))
    before = Gs.copy()
    weights, residual = OF_MANY[name](Gs)
    alone = [OF_MANY[name](G) for G in Gs]
    assert weights.shape == Gs.shape[:-1]
    assert 0.0 <= residual <= 1e-8
    for one, (expected, _) in zip(weights, alone, strict=True):
        np.testing.assert_allclose(one, expected, rtol=1e-9, atol=1e-12 * np.abs(expected).max())
    np.testing.assert_array_equal(Gs, before)


@pytest.mark.parametrize("name", OF_MANY)
def test_a_stack_can_have_any_number_of_dimensions(name):
    J = np.random.default_rng(0).standard_normal((2, 3, 4, 9))
    Gs = J @ J.swapaxes(-2, -1)
    weights, _ = OF_MANY[name](Gs)
    assert weights.shape == (2, 3, 4)
    np.testing.assert_array_equal(weights.reshape(6, 4), OF_MANY[name](Gs.reshape(6, 4, 4)).weights)


@pytest.mark.parametrize("name", sorted(set(SOLVERS) - set(OF_MANY)))
def test_a_solver_of_one_gramian_refuses_a_stack(name):
    with pytest.raises(MTLWeightError, match=rf"{name} expected a square Gramian \[m, m\] with .* shape \[3, 2, 2\]"):
        SOLVERS[name](np.stack([np.eye(2)] * 3))


@pytest.mark.parametrize("name", OF_MANY)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.array([[1.0, 2.0], [2.0, 1.0]]), r", at \[1\], .*lowest eigenvalue of -1"),
        (np.array([[1.0, 0.5], [0.0, 1.0]]), r", at \[1\], .*asymmetry of 0\.5"),
        (np.array([[0.0, 5.0], [5.0, 1.0]]), r", at \[1\], .*found entries up to 5 beside a squared length of 0"),
        (np.array([[1.0, np.inf], [np.inf, 1.0]]), "found 2 entries that are inf or nan"),
    ],
)
def test_one_wrong_gramian_among_many_is_refused(name, wrong, message):
    with pytest.raises(MTLWeightError, match=message):
        OF_MANY[name](np.stack([np.eye(2), wrong, np.ones((2, 2))]))


@pytest.mark.parametrize("name", OF_MANY)
@pytest.mark.parametrize("shape", [(0, 2, 2), (3, 2, 1), (3, 0, 0)])
def test_what_is_no_stack_of_gramians_is_refused(name, shape):
    with pytest.raises(MTLWeightError, match=r"or a stack of them \[\.\.\., m, m\], but found shape"):
        OF_MANY[name](np.ones(shape))
