"""Jacobians on which solvers are tried, and exact arithmetic to check them with."""

from fractions import Fraction

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

SHAPES = {
    "generic": lambda J, _: J,
    "conflicting": lambda J, _: J - 0.9 * J.mean(0),
    "opposed": lambda J, _: _pairs(J, -3.0),
    "duplicates": lambda J, _: _pairs(J, 1.0),
    "nearly opposed": lambda J, rng: _pairs(J, -1.0) + 1e-6 * rng.standard_normal(J.shape),
    "rank one": lambda J, rng: np.outer(J[:, 0], rng.standard_normal(J.shape[1])),
    "one dominated ray": lambda J, rng: np.outer(0.1 + abs(J[:, 0]), rng.standard_normal(J.shape[1])),
    "stationary in the interior": lambda J, rng: _stationary(J, rng, len(J)),
    "stationary on a face": lambda J, rng: _stationary(J, rng, min(3, len(J))),
    "strongly stationary": lambda J, _: J - J.mean(0),
    "acute": lambda J, _: abs(J),
    "a zero row": lambda J, _: np.where(np.arange(len(J))[:, None] == len(J) // 2, 0.0, J),
}


def _pairs(J, factor):
    half = len(J) // 2
    return np.concatenate([J[:half], factor * J[:half], J[2 * half :]])


def _stationary(J, rng, size):
    shares = rng.dirichlet(np.ones(size))
    J = J.copy()
    J[0] = -shares[1:] @ J[1:size] / shares[0]
    return J


@st.composite
def small_jacobians(draw, max_rows=5):
    """Small integers, so that ties, zero rows and stationarity are common; rows and whole scaled by powers of ten."""
    m = draw(st.integers(1, max_rows))
    n = draw(st.integers(1, 5))
    J = draw(arrays(np.float64, (m, n), elements=st.integers(-3, 3)))
    rows = draw(st.sampled_from([0, 1, 6])) * draw(arrays(np.float64, m, elements=st.integers(-1, 1)))
    return J * 10.0 ** rows[:, None] * 10.0 ** draw(st.integers(-10, 15))


@st.composite
def large_jacobians(draw, spreads=(0, 3, 6, 15)):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    m = draw(st.sampled_from([1, 2, 3, 8, 33, 64, 128]))
    n = draw(st.sampled_from([1, 2, 7, 40, 200]))
    J = SHAPES[draw(st.sampled_from(sorted(SHAPES)))](rng.standard_normal((m, n)), rng)
    spread = draw(st.sampled_from(spreads))
    return J * 10.0 ** rng.uniform(-spread, spread, (m, 1)) * 10.0 ** draw(st.integers(-10, 15))


def shares(J, weights):
    """How much of the combined length is each row's: the weights in units that a row's scale does not change."""
    lengths = weights * np.sqrt(np.square(J).sum(1))
    return lengths / lengths.sum() if lengths.any() else weights


def exact(J, number=Fraction):
    """J in another arithmetic: fractions, or long doubles."""
    return np.vectorize(number, otypes=[object])(J) if number is Fraction else np.asarray(J, dtype=number)


def lengths(J):
    """The norms of the rows; they only set units, so that float64 is enough."""
    return np.sqrt(np.square(J).sum(1))


def solve(A, b):
    """Gauss and Jordan on fractions; None for a singular matrix: then a smaller support has the same point."""
    A = np.column_stack([A, b])
    for i in range(len(A)):
        pivot = next((k for k in range(i, len(A)) if A[k, i]), None)
        if pivot is None:
            return None
        A[[i, pivot]] = A[[pivot, i]]
        A[i] = A[i] / Fraction(A[i, i])
        for k in range(len(A)):
            if k != i:
                A[k] = A[k] - A[k, i] * A[i]
    return A[:, -1]
