"""What holds for every solver alike, on every kind of input that the conformance kit draws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtlweight import solvers
from mtlweight._errors import MTLWeightError
from mtlweight.testing import arbitrary

SOLVERS = {
    "min_norm": solvers.min_norm,
    "dual_cone": lambda G: solvers.dual_cone(G, np.eye(len(G)) / max(1, len(G))),
    "conflict_averse": lambda G: solvers.conflict_averse(G, 0.4),
    "alpha_fair": lambda G: solvers.alpha_fair(G, 2.0),
    "equal_projection": solvers.equal_projection,
    "conflict_free": solvers.conflict_free,
}


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
@pytest.mark.parametrize(
    ("gramian", "message"),
    [
        (np.ones(3), r"square Gramian .* found shape \[3\]"),
        (np.ones((2, 3)), r"square Gramian .* found shape \[2, 3\]"),
        (np.ones((0, 0)), r"found shape \[0, 0\]"),
        (np.array([[1.0, np.nan], [np.nan, 1.0]]), "found 2 entries that are inf or nan"),
        (np.array([[1.0, 2.0], [2.0, 1.0]]), "lowest eigenvalue of -1"),
        (np.array([[1.0, 0.5], [0.0, 1.0]]), r"asymmetry of 0\.5"),
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
