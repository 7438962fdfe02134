"""What solvers read of a Gramian: the lengths of the rows and the cosines between them."""

import math
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from mtlweight._errors import MTLWeightError, SolverError

Array: TypeAlias = npt.NDArray[np.float64]

TOLERANCE = 1e-8  # the residual that every solver promises
RIDGE = 1e-10  # large enough to dominate float64 noise (2e-16), small enough that one step already keeps the promise
NULL = 1e-13  # eigenvalues of cosines that are nothing but rounding
EPS = float(np.finfo(np.float64).eps)

_NOISE = 1e-2  # asymmetry or negative curvature that low-precision arithmetic may leave in a Gramian of unit rows
_TINY = float(np.finfo(np.float64).tiny)


class Solution(NamedTuple):
    """Weights, `[m]`, and the residual that they reach."""

    weights: Array
    residual: float


class Rows(NamedTuple):
    """The rows of J, up to a rotation: their lengths, the cosines between them, and how far from dependent they are.

    `pivots` is the diagonal of the cosines' Cholesky factor. A zero row has length 0 and counts as orthogonal to all
    others.
    """

    norms: Array
    cosines: Array
    pivots: npt.NDArray[np.floating]

    @property
    def pivot(self) -> float:
        """The least squared pivot, near zero where rows depend on each other."""
        return float(self.pivots.min()) ** 2

    @property
    def zero(self) -> npt.NDArray[np.bool_]:
        """Which rows are zero: those whose squared length is below the smallest normal float64."""
        zero: npt.NDArray[np.bool_] = self.norms == 0.0
        return zero

    @property
    def inverse(self) -> Array:
        """One over the length of each row, and 0 for a zero row."""
        return np.divide(1.0, self.norms, out=np.zeros_like(self.norms), where=self.norms > 0.0)


def rows_of(gramian: Array, solver: str) -> Rows:
    """Checks a Gramian and takes it apart.

    A slightly indefinite Gramian, as float32 rounding leaves it, is replaced by the nearest positive semidefinite
    matrix of cosines.

    Args:
        gramian: `[m, m]`. It is not changed.
        solver: The name of the caller, for messages.

    Raises:
        MTLWeightError: If the Gramian is not square, finite, symmetric and positive semidefinite.
    """
    G = np.asarray(gramian, dtype=np.float64)
    if G.ndim != 2 or G.shape[0] != G.shape[1] or not G.size:
        raise MTLWeightError(
            f"{solver} expected a square Gramian [m, m] with m >= 1, but found shape {list(G.shape)}. Pass J @ J.T."
        )
    if not all_finite(G):
        raise MTLWeightError(
            f"{solver} expected a finite Gramian, but found {np.count_nonzero(~np.isfinite(G))} entries that are inf "
            "or nan. Skip the step, or look for the loss that overflowed."
        )
    squares = G.diagonal()
    if squares.min() < _TINY:
        zero = squares < _TINY
        norms = np.sqrt(np.where(zero, 0.0, squares))
        unit = np.where(zero, 1.0, norms)
        C = np.where(zero | zero[:, None], np.diag(zero.astype(np.float64)), G / unit / unit[:, None])
    else:
        norms = np.sqrt(squares)
        C = G / (norms * norms[:, None])
    difference = C - C.T
    asymmetry = difference.max() if np.vdot(difference, difference) else 0.0
    if asymmetry > 0.0:
        C = (C + C.T) / 2
    lowest = 0.0
    try:
        pivots = np.linalg.cholesky(ridged(C)).diagonal()
    except np.linalg.LinAlgError:
        values, vectors = eigen(C)
        lowest, pivots = float(values[0]), np.zeros(1)
        C = (vectors * np.maximum(values, 0.0)) @ vectors.T
    if asymmetry > _NOISE or lowest < -_NOISE:
        raise MTLWeightError(
            f"{solver} expected a symmetric positive semidefinite Gramian, but found, after scaling its rows to length "
            f"one, an asymmetry of {asymmetry:.3g} and a lowest eigenvalue of {lowest:.3g}. Pass J @ J.T."
        )
    return Rows(norms, C, pivots)


def all_finite(values: Array) -> bool:
    """Whether no value is inf or nan. One sum of squares tells, unless it overflows."""
    return math.isfinite(np.vdot(values, values)) or bool(np.isfinite(values).all())


def ridged(C: Array, ridge: float = RIDGE) -> Array:
    """`C` with `ridge` added to its diagonal."""
    H = C.copy()
    H.reshape(-1)[:: len(H) + 1] += ridge
    return H


def eigen(C: Array) -> tuple[Array, Array]:
    """Eigenvalues in rising order, and the eigenvectors in columns."""
    values, vectors = np.linalg.eigh(C)
    return values.astype(np.float64, copy=False), vectors.astype(np.float64, copy=False)


def promised(solver: str, residual: float, m: int) -> float:
    """The residual, if it keeps the promise.

    Raises:
        SolverError: If it does not.
    """
    if not residual <= TOLERANCE:
        raise SolverError(
            f"{solver} expected to reach a residual of {TOLERANCE:g}, but stopped at {residual:.3g} (m={m}). Check "
            "that the Gramian is J @ J.T in float64, and please report it with this error."
        )
    return residual
