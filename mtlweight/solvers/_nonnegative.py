"""Quadratic programs over nonnegative vectors, solved exactly."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from mtlweight.solvers._rows import EPS, RIDGE, Array, ridged

_ROUNDS = 12  # of exchanges; a row that takes longer probably cycles


def nonnegative_quadratic(H: Array, q: Array, z: Array) -> Array:
    """Minimise ½zᵀHz - qᵀz over z >= 0 for a positive definite H, from a feasible z: Lawson and Hanson's active set."""
    m = len(q)
    free = z > 0.0
    for _ in range(20 * m):  # ends far sooner: the objective falls with every new support
        target = np.zeros(m)
        target[free] = np.linalg.solve(H[np.ix_(free, free)], q[free])
        blocking = np.flatnonzero(target < 0.0)
        if blocking.size:
            steps = z[blocking] / (z[blocking] - target[blocking])
            z = np.maximum(z + steps.min() * (target - z), 0.0)
            leaving = blocking[steps.argmin()]
            z[leaving], free[leaving] = 0.0, False
        else:
            z = target
            slack = np.where(free, 0.0, H @ z - q)
            entering = slack.argmin()
            if slack[entering] >= -m * EPS * z.sum():
                break
            free[entering] = True
    return z


def nonnegative_quadratics(H: Array, Q: Array, free: npt.NDArray[np.bool_] | None = None) -> Array:
    """The same for each row of `Q`, `[r, m]`, at once: block principal pivoting from a guess of the free entries.

    Each round solves all rows on the entries that are thought to be free, and exchanges all entries of the wrong sign.
    Most end in a few rounds. A row that takes many is left to the active set.
    """
    m = Q.shape[1]
    Z = np.zeros_like(Q)
    free = Q > 0.0 if free is None else free.copy()
    rows = np.arange(len(Q))
    for _ in range(_ROUNDS):
        q, inside = Q[rows], free[rows]
        z = _restricted(H, q, inside)
        noise = m * EPS * np.abs(z).sum(axis=1, keepdims=True)
        wrong = np.where(inside, z < 0.0, z @ H - q < -noise)
        again = wrong.any(axis=1)
        Z[rows] = np.maximum(z, 0.0)
        rows = rows[again]
        if not rows.size:
            return Z
        free[rows] ^= wrong[again]
    for row in rows:
        Z[row] = nonnegative_quadratic(H, Q[row], Z[row])
    return Z


def complementary(C: Array, Q: Array, lengths: Array) -> tuple[Array, Array]:
    """The same for cosines `C`, which may be singular, with the residual of each row.

    The residual is the largest `|min(z, Cz - q)|`, divided by the sum of z and of the `lengths`, `[r]`, that z is added
    to. Each row of `Q`, `[r, m]`, is in the range of `C` or such that the minimum exists.
    """

    def residuals(Z: Array) -> Array:
        unit = lengths + Z.sum(axis=1)
        worst = np.abs(np.minimum(Z, Z @ C - Q)).max(axis=1)
        found: Array = np.divide(worst, unit, out=np.zeros_like(unit), where=unit > 0.0)
        return found

    return _proximal(C, Q, residuals)


def shortest(C: Array, d: Array) -> Array:
    """Minimise ½zᵀCz - dᵀz over z >= 0, up to the length of z, which is infinite where the rows cancel."""
    Z, _ = _proximal(C, d[None], lambda Z: np.array([kkt(C, d, Z[0])]))
    z: Array = Z[0]
    return z


def kkt(C: Array, d: Array, z: Array) -> float:
    """The residual of z, whatever its length."""
    v = z / (z @ d)
    x = C @ v
    return float(np.maximum((v @ x) * d - x, 0.0).max() / v.sum())


def _proximal(C: Array, Q: Array, residuals: Callable[[Array], Array]) -> tuple[Array, Array]:
    """A proximal point iteration, once and then as long as it halves one of the residuals.

    Once, since at a vertex the residual is of second order in the ridge's bias: it may be zero beside a biased z.
    """
    H = ridged(C)
    Z = nonnegative_quadratics(H, Q)
    found = residuals(Z)
    for _ in range(10):
        closer = nonnegative_quadratics(H, Q + RIDGE * Z, Z > 0.0)
        last, found = found, residuals(closer)
        better = found <= np.maximum(last, EPS)
        Z[better] = closer[better]
        found = np.where(better, found, last)
        if found.max() <= EPS or (found > last / 2).all():
            break
    return Z, found


def _restricted(H: Array, Q: Array, free: npt.NDArray[np.bool_]) -> Array:
    """Each row's unconstrained minimiser over its free entries, `[r, m]`; the others are zero."""
    blocks = np.where(free[:, :, None] & free[:, None, :], H, 0.0)
    m = len(H)
    blocks[:, range(m), range(m)] += ~free
    z: Array = np.linalg.solve(blocks, np.where(free, Q, 0.0)[..., None])[..., 0]
    return z
