"""What solvers read of a Gramian: the lengths of the rows and the cosines between them."""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from mtlweight._errors import MTLWeightError, SolverError

Array: TypeAlias = npt.NDArray[np.float64]

TOLERANCE = 1e-8  # the residual that every solver promises
RIDGE = 1e-10  # large enough to dominate float64 noise (2e-16), small enough that one step already keeps the promise
DEPENDENT = 1e-6
"""Rows depend on each other where a combination of them is shorter than `√m` times so much of its coefficients.

What is left of it is the rounding of the rows then: of 3e-8 of their length where they are in float32, and of up to
1e-6 where a network's backward has added them up in float32.
"""
NULL = DEPENDENT**2  # the same of eigenvalues of cosines, which are squared lengths; times m
NONE = (
    1e-5  # a coefficient, or a sum, that is nothing but the rounding of the rows: `DEPENDENT`, times what it grows by
)
TINY = float(np.finfo(np.float64).tiny)
EPS = float(np.finfo(np.float64).eps)

_INDEPENDENT = 1e-3  # least pivot of cosines that are solved as they are: they have no eigenvalue near NULL
_NOISE = 1e-2  # asymmetry or negative curvature that low-precision arithmetic may leave in a Gramian of unit rows


class Solution(NamedTuple):
    """Weights, with the shape of what was asked, and the residual that they reach: of many, the largest."""

    weights: Array
    residual: float


class Rows(NamedTuple):
    """The rows of J, up to a rotation: their lengths, the cosines between them, and how far from dependent they are.

    `pivots` is the diagonal of the cosines' Cholesky factor, or zeros where rows depend on each other. A zero row has
    length 0 and counts as orthogonal to all others. Of a stack of Gramians, everything has the stack's dimensions
    before its own.
    """

    norms: Array
    cosines: Array
    pivots: npt.NDArray[np.floating]

    @property
    def pivot(self) -> float:
        """The least squared pivot of one Gramian, near zero where rows depend on each other."""
        return float(self.pivots.min()) ** 2

    @property
    def zero(self) -> npt.NDArray[np.bool_]:
        """Which rows are zero: those whose squared length is below the smallest normal float64."""
        zero: npt.NDArray[np.bool_] = self.norms == 0.0
        return zero

    @property
    def dependent(self) -> npt.NDArray[np.bool_]:
        """Whether rows depend on each other, for each Gramian."""
        dependent: npt.NDArray[np.bool_] = self.pivots.min(axis=-1) == 0.0
        return dependent

    @property
    def inverse(self) -> Array:
        """One over the length of each row, and 0 for a zero row."""
        return np.divide(1.0, self.norms, out=np.zeros_like(self.norms), where=self.norms > 0.0)


def rows_of(gramian: Array, solver: str, stacks: bool = False) -> Rows:
    """Checks a Gramian and takes it apart.

    What is left where rows depend on each other, `DEPENDENT`, is taken away: the Gramian is replaced by the nearest one
    of that rank, scaled to cosines again. So is a slightly indefinite Gramian, as float32 rounding leaves it.

    Args:
        gramian: `[m, m]`; with `stacks`, `[..., m, m]` as well. It is not changed.
        solver: The name of the caller, for messages.
        stacks: Whether it takes many Gramians at once.

    Raises:
        MTLWeightError: If the Gramian is not square, finite, symmetric and positive semidefinite.
    """
    G = np.asarray(gramian, dtype=np.float64)
    m = G.shape[-1] if G.ndim == 2 or (G.ndim > 2 and stacks) else 0
    if not G.size or G.shape[-2:] != (m, m):
        many = ", or a stack of them [..., m, m]" if stacks else ""
        raise MTLWeightError(
            f"{solver} expected a square Gramian [m, m] with m >= 1{many}, but found shape {list(G.shape)}. Pass J @ "
            "J.T."
        )
    if not all_finite(G):
        raise MTLWeightError(
            f"{solver} expected a finite Gramian, but found {np.count_nonzero(~np.isfinite(G))} entries that are inf "
            "or nan. Skip the step, or look for the loss that overflowed."
        )
    squares = G.diagonal(0, -2, -1)
    if squares.min() < TINY:
        zero = squares < TINY
        norms = np.sqrt(np.where(zero, 0.0, squares))
        unit = np.where(zero, 1.0, norms)
        absent = zero[..., None, :] | zero[..., None]
        largest = np.abs(G, where=absent, out=np.zeros_like(G)).max(axis=(-2, -1))
        # |G_ij| <= sqrt(G_ii G_jj), of which G_ii is tiny: that is below either the one or the other.
        if (largest > np.maximum(_NOISE * squares.max(axis=-1), TINY / _NOISE)).any():
            if G.ndim > 2:
                return _each(G, solver)
            raise MTLWeightError(
                f"{solver} expected a symmetric positive semidefinite Gramian, but found entries up to {largest:.3g} "
                f"beside a squared length of {squares.min():.3g}. Pass J @ J.T."
            )
        C = np.where(absent, np.eye(m), G / (unit[..., None, :] * unit[..., None]))
    else:
        norms = np.sqrt(squares)
        C = G / (norms[..., None, :] * norms[..., None])
    difference = C - C.swapaxes(-2, -1)
    asymmetry = difference.max() if np.vdot(difference, difference) else 0.0
    if asymmetry > 0.0:
        C = (C + C.swapaxes(-2, -1)) / 2
    lowest = 0.0
    try:
        pivots = np.linalg.cholesky(ridged(C)).diagonal(0, -2, -1)
    except np.linalg.LinAlgError:
        if G.ndim > 2:
            return _each(G, solver)
        pivots = np.zeros(m)
    near = pivots.min(axis=-1) < _INDEPENDENT
    if near.any():
        C, pivots = C.copy(), pivots.copy()
        C[near], lowest, dependent = _mended(C[near])
        pivots[near] = np.where(dependent[:, None], 0.0, pivots[near])
    if asymmetry > _NOISE or lowest < -_NOISE:
        if G.ndim > 2:
            return _each(G, solver)
        raise MTLWeightError(
            f"{solver} expected a symmetric positive semidefinite Gramian, but found, after scaling its rows to length "
            f"one, an asymmetry of {asymmetry:.3g} and a lowest eigenvalue of {lowest:.3g}. Pass J @ J.T."
        )
    return Rows(norms, C, pivots)


def _mended(C: Array) -> tuple[Array, float, npt.NDArray[np.bool_]]:
    """Cosines without what is but rounding, their lowest eigenvalue before that, and in which rows are dependent."""
    values, vectors = eigen(C)
    lowest, m = values[:, :1], C.shape[-1]
    kept = values > np.maximum(m * NULL, -2.0 * lowest)  # a negative one tells how much of the others is rounding
    mended = (vectors * np.where(kept, values, 0.0)[:, None]) @ vectors.swapaxes(-2, -1)
    lengths = np.sqrt(mended.diagonal(0, -2, -1))
    mended /= lengths[:, None] * lengths[..., None]
    # Where float64 itself leaves no more than that, it is as it should be: the last digits are not to be lost.
    rounded = (~kept & (np.abs(values) > 1e-14 * m)).any(axis=-1)
    return np.where(rounded[:, None, None], mended, C), float(lowest.min()), ~kept.all(axis=-1)


def _each(stack: Array, solver: str) -> Rows:
    """One after the other, where all at once cannot tell which of them is to be mended or refused."""
    found = [rows_of(stack[place], f"{solver}, at {list(place)},") for place in np.ndindex(stack.shape[:-2])]
    parts = zip(*found, strict=True)
    return Rows(*(np.stack(part).reshape(*stack.shape[:-2], *part[0].shape) for part in parts))


def all_finite(values: Array) -> bool:
    """Whether no value is inf or nan. One sum of squares tells, unless it overflows."""
    return math.isfinite(np.vdot(values, values)) or bool(np.isfinite(values).all())


def ridged(C: Array, ridge: float = RIDGE) -> Array:
    """`C` with `ridge` added to its diagonal."""
    H = C.copy()
    H.reshape(*C.shape[:-2], -1)[..., :: C.shape[-1] + 1] += ridge
    return H


def times(C: Array, y: Array) -> Array:
    """The product of a matrix and a vector, or of each in a stack."""
    return np.asarray((C @ y[..., None])[..., 0], dtype=np.float64)


def solved(rows: Rows, ones: Array, dependent: Callable[[Array, Array], Array]) -> Array:
    """`y` with `C y = ones`, in a stack of Gramians for each by itself; by `dependent` where rows depend on each other.

    Args:
        rows: What is solved for.
        ones: The right side, 0 for zero rows.
        dependent: Answers cosines, `[k, m, m]`, and right sides, `[k, m]`, to which the answer may not be unique.
    """
    C = rows.cosines
    sure = rows.pivots.min(axis=-1) > _INDEPENDENT
    if sure.all():
        return np.asarray(np.linalg.solve(C, ones[..., None])[..., 0], dtype=np.float64)
    y = np.empty_like(ones)
    y[sure] = np.linalg.solve(C[sure], ones[sure][..., None])[..., 0]
    y[~sure] = dependent(C[~sure], ones[~sure])
    return y


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
