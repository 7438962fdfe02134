"""What solvers read of a Gramian: the lengths of the rows and the cosines between them."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from mtlweight._errors import MTLWeightError, SolverError

Array: TypeAlias = npt.NDArray[np.float64]

TOLERANCE = 1e-8  # the residual that every solver promises
RIDGE = 1e-10  # large enough to dominate float64 noise (2e-16), small enough that one step already keeps the promise
DEPENDENT = 1e-6
"""Rows depend on each other where a combination of them is shorter than `√m` times this share of its coefficients.

What is left is then rounding of the rows: 3e-8 of their length in float32, and up to 1e-6 where a network's backward
has added them up in float32.
"""
NULL = DEPENDENT**2  # times m, the same for eigenvalues of cosines, which are squared lengths
INDEPENDENT = 1e-6  # least squared pivot of cosines that are solved as they are: they have no eigenvalue near NULL
NONE = 1e-5  # a coefficient or a sum this small is rounding of the rows: `DEPENDENT`, times what it grows by
TINY = float(np.finfo(np.float64).tiny)
EPS = float(np.finfo(np.float64).eps)

_NOISE = 1e-2  # asymmetry or negative curvature that low-precision arithmetic may leave in a Gramian of unit rows


class Solution(NamedTuple):
    """Weights, with the shape of what was asked, and their residual: for a stack, the largest."""

    weights: Array
    residual: float


class Rows(NamedTuple):
    """The rows of J, up to a rotation: their lengths, their cosines, and how far they are from dependent.

    `pivot` is the least squared pivot of the cosines' Cholesky factor, or zero where rows depend on each other. A zero
    row has length 0 and counts as orthogonal to all others.
    """

    norms: Array
    cosines: Array
    pivot: float

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
    """Checks a Gramian, `[m, m]`, and takes it apart.

    Where rows depend on each other, or rounding has left the Gramian slightly indefinite, it is replaced by the nearest
    one without what counts as rounding (`DEPENDENT`), scaled to cosines again.

    Raises:
        MTLWeightError: If the Gramian is not square, finite, symmetric and positive semidefinite.
    """
    G = np.asarray(gramian, dtype=np.float64)
    if G.ndim != 2 or G.shape[0] != G.shape[1] or not G.size:
        raise MTLWeightError(
            f"{solver} expected a square Gramian [m, m] with m >= 1, but found shape {list(G.shape)}. Pass J @ J.T."
        )
    if not np.isfinite(G).all():
        raise MTLWeightError(
            f"{solver} expected a finite Gramian, but found {np.count_nonzero(~np.isfinite(G))} entries that are inf "
            "or nan. Skip the step, or look for the loss that overflowed."
        )
    squares = G.diagonal()
    zero = squares < TINY
    absent = zero | zero[:, None]
    largest = np.abs(G[absent]).max(initial=0.0)
    # |G_ij| <= sqrt(G_ii G_jj), of which G_ii is tiny: that is below either the one or the other.
    if largest > max(_NOISE * squares.max(), TINY / _NOISE):
        raise MTLWeightError(
            f"{solver} expected a symmetric positive semidefinite Gramian, but found entries up to {largest:.3g} "
            f"beside a squared length of {squares.min():.3g}. Pass J @ J.T."
        )
    norms = np.sqrt(np.where(zero, 0.0, squares))
    unit = np.where(zero, 1.0, norms)
    C = np.where(absent, np.eye(len(G)), G / (unit * unit[:, None]))
    asymmetry = (C - C.T).max()
    C = (C + C.T) / 2
    try:
        pivot = float(np.linalg.cholesky(ridged(C)).diagonal().min()) ** 2
    except np.linalg.LinAlgError:
        pivot = 0.0
    lowest = 0.0
    if pivot < INDEPENDENT:
        C, lowest, dependent = _mended(C)
        pivot = 0.0 if dependent else pivot
    if asymmetry > _NOISE or lowest < -_NOISE:
        raise MTLWeightError(
            f"{solver} expected a symmetric positive semidefinite Gramian, but found, after scaling its rows to length "
            f"one, an asymmetry of {asymmetry:.3g} and a lowest eigenvalue of {lowest:.3g}. Pass J @ J.T."
        )
    return Rows(norms, C, pivot)


def _mended(C: Array) -> tuple[Array, float, bool]:
    """Cosines without what is only rounding, their lowest eigenvalue before that, and whether rows are dependent."""
    m = len(C)
    values, vectors = eigen(C)
    lowest = float(values[0])
    kept = values > max(m * NULL, -2.0 * lowest)  # a negative one tells how much of the others is rounding
    # What float64 itself leaves is not worth mending: that would lose the last digits.
    if (np.abs(values[~kept]) > 1e-14 * m).any():
        C = (vectors * np.where(kept, values, 0.0)) @ vectors.T
        lengths = np.sqrt(C.diagonal())
        C = C / (lengths * lengths[:, None])
    return C, lowest, not kept.all()


def solve_each(gramian: Array, solver: str, solve: Callable[[Rows], Solution]) -> Solution:
    """The solution for one Gramian, `[m, m]`, or for each of a stack of them, `[..., m, m]`."""
    G = np.asarray(gramian, dtype=np.float64)
    if G.ndim <= 2:
        return solve(rows_of(G, solver))
    if not G.size or G.shape[-2] != G.shape[-1]:
        raise MTLWeightError(
            f"{solver} expected a square Gramian [m, m] with m >= 1, or a stack of them [..., m, m], but found shape "
            f"{list(G.shape)}. Pass J @ J.T."
        )
    found = [solve(rows_of(G[place], f"{solver}, at {list(place)},")) for place in np.ndindex(G.shape[:-2])]
    weights = np.reshape([solution.weights for solution in found], G.shape[:-1])
    return Solution(weights, max(solution.residual for solution in found))


def ridged(C: Array) -> Array:
    """`C` with `RIDGE` added to its diagonal."""
    return C + RIDGE * np.eye(len(C))


def solved(rows: Rows, ones: Array, dependent: Callable[[Array, Array], Array]) -> Array:
    """`y` with `C y = ones`, where `ones` are 0 for zero rows.

    Where rows depend on each other there may be no solution, or many: `dependent` takes cosines and right side, and
    decides.
    """
    if rows.pivot < INDEPENDENT:
        return dependent(rows.cosines, ones)
    return np.asarray(np.linalg.solve(rows.cosines, ones), dtype=np.float64)


def eigen(C: Array) -> tuple[Array, Array]:
    """Eigenvalues in rising order, and the eigenvectors in columns."""
    values, vectors = np.linalg.eigh(C)
    return values.astype(np.float64, copy=False), vectors.astype(np.float64, copy=False)


def promised(solver: str, residual: float, m: int) -> float:
    """The residual, if it keeps the promise. Raises `SolverError` if not."""
    if not residual <= TOLERANCE:
        raise SolverError(
            f"{solver} expected to reach a residual of {TOLERANCE:g}, but stopped at {residual:.3g} (m={m}). Check "
            "that the Gramian is J @ J.T in float64, and please report it with this error."
        )
    return residual
