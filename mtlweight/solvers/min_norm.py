"""The shortest vector in the convex hull of the rows of J, from the Gramian alone."""

from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from mtlweight._errors import MTLWeightError
from mtlweight.solvers._errors import SolverError

Array: TypeAlias = npt.NDArray[np.float64]

_TOLERANCE = 1e-8  # the residual that is promised
_NOISE = 1e-2  # asymmetry or negative curvature that low-precision arithmetic may leave in a Gramian of unit rows
_RIDGE = 1e-10  # large enough to dominate float64 noise (2e-16), small enough that one step already keeps the promise
_EPS = float(np.finfo(np.float64).eps)


class Solution(NamedTuple):
    """Weights on the simplex, `[m]`, and the KKT residual that they reach."""

    weights: Array
    residual: float


def min_norm(gramian: Array) -> Solution:
    r"""Weights of the min-norm point in the convex hull of `m` gradients, known only by their inner products.

    .. math::
        w = \arg\min_{w \ge 0,\ \sum_i w_i = 1} w^\top G w, \qquad x = J^\top w, \quad G = J J^\top

    - `J`: the gradients, `[m, n]`, with rows :math:`g_i`; only `G`, `[m, m]`, is read.
    - `x`: the min-norm point, `[n]`. It has :math:`\langle x, g_i \rangle \ge \|x\|^2` for all `i`: going against it
      decreases every objective, or `x` is zero and no direction does.

    **Residual.** The largest violation of that inequality, in units that cancel the scale of every row:

    .. math::
        \max_i \frac{(w^\top G w - (G w)_i)_+}{\|g_i\| \sum_j w_j \|g_j\|}

    The sum replaces :math:`\|x\|`, which is nothing but rounding where the gradients cancel. Complementarity needs no
    second term: since :math:`\sum_i w_i ((Gw)_i - w^\top G w) = 0`, a slack row with weight is paid for by a violation.

    **Method.** In the lengths :math:`z_i \propto w_i \|g_i\|` and the cosines :math:`C_{ij}` of the rows, with
    :math:`d_i \propto 1 / \|g_i\|`, the problem is :math:`\min_{z \ge 0} \frac12 z^\top C z - d^\top z` up to the
    length of `z`. It is solved by a proximal point iteration: each step adds a ridge
    :math:`\frac\rho2 \|z - z_\text{last}\|^2`, which makes it strictly convex, and is solved exactly by an active set.
    The first step already has a residual below :math:`\rho = 10^{-10}`; the next ones remove the ridge's bias. Two
    gradients are solved in closed form.

    **Degenerate input.** `x` is always unique, the weights need not be. Among all minimisers this is the one of least
    :math:`\sum_i w_i^2 \|g_i\|^2` (within about :math:`10^{-5}`): duplicate rows share their weight equally and
    permuting the rows permutes the weights. If there are zero rows, the weights are uniform over these; so they are
    uniform for `G = 0`. A row counts as zero if its squared norm is below the smallest normal float64. Where the rows
    cancel to less than about :math:`10^{-5} \sum_j w_j \|g_j\|`, the direction of `x` drowns in the rounding of `G`.
    A slightly indefinite `G`, as float32 rounding leaves it, is replaced by the nearest positive semidefinite matrix
    of cosines, and the residual is that of the replacement.

    Args:
        gramian: Symmetric, positive semidefinite, `[m, m]`, `m >= 1`. It is not changed.

    Returns:
        The weights, `[m]`, and their residual, at most `1e-8`.

    Raises:
        MTLWeightError: If the Gramian is not square, finite, symmetric and positive semidefinite.
        SolverError: If the residual stays above `1e-8`.

    Example:
        >>> import numpy as np
        >>> J = np.array([[2.0, 0.0], [0.0, 1.0], [3.0, 3.0]])
        >>> weights, residual = min_norm(J @ J.T)
        >>> weights.round(6)
        array([0.2, 0.8, 0. ])
        >>> residual < 1e-8
        True
        >>> float(np.square(weights @ J).sum().round(6))
        0.8

    References:
        - P. Wolfe, "Finding the nearest point in a polytope", Mathematical Programming 11, 1976.
        - J.-A. Désidéri, "Multiple-gradient descent algorithm (MGDA) for multiobjective optimization", 2012.
        - O. Sener and V. Koltun, "Multi-task learning as multi-objective optimization", 1810.04650, 2018.
        - C. Lawson and R. Hanson, "Solving Least Squares Problems", 1974, chapter 23: the active set.
    """
    G = _checked(gramian)
    squares = np.diag(G)
    zero = squares < np.finfo(np.float64).tiny
    if zero.any():
        return Solution(zero / zero.sum(), 0.0)
    norms = np.sqrt(squares)
    C = _cosines(G, norms)
    d = norms.min() / norms
    z = _pair(C, d) if len(d) == 2 else _proximal(C, d)
    residual = _residual(C, d, z)
    if not residual <= _TOLERANCE:
        raise SolverError(
            f"min_norm expected to reach a KKT residual of {_TOLERANCE:g}, but stopped at {residual:.3g} "
            f"(m={len(d)}). Check that the Gramian is J @ J.T in float64, and please report it with this error."
        )
    return Solution(z * d / (z @ d), residual)


def _checked(gramian: Array) -> Array:
    G = np.asarray(gramian, dtype=np.float64)
    if G.ndim != 2 or G.shape[0] != G.shape[1] or not G.size:
        raise MTLWeightError(
            f"min_norm expected a square Gramian [m, m] with m >= 1, but found shape {list(G.shape)}. Pass J @ J.T."
        )
    if not np.isfinite(G).all():
        raise MTLWeightError(
            f"min_norm expected a finite Gramian, but found {np.count_nonzero(~np.isfinite(G))} entries that are inf "
            "or nan. Skip the step, or look for the loss that overflowed."
        )
    return G


def _cosines(G: Array, norms: Array) -> Array:
    """The Gramian of the rows scaled to length one, made symmetric and positive semidefinite."""
    C = G / norms / norms[:, None]
    asymmetry = np.abs(C - C.T).max()
    C = (C + C.T) / 2
    try:
        np.linalg.cholesky(_ridged(C))
        lowest = 0.0
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(C)
        lowest = values[0]
        C = (vectors * np.maximum(values, 0.0)) @ vectors.T
    if asymmetry > _NOISE or lowest < -_NOISE:
        raise MTLWeightError(
            "min_norm expected a symmetric positive semidefinite Gramian, but found, after scaling its rows to length "
            f"one, an asymmetry of {asymmetry:.3g} and a lowest eigenvalue of {lowest:.3g}. Pass J @ J.T."
        )
    return C


def _residual(C: Array, d: Array, z: Array) -> float:
    v = z / (z @ d)
    x = C @ v
    return float(np.maximum((v @ x) * d - x, 0.0).max() / v.sum())


def _pair(C: Array, d: Array) -> Array:
    """Both rows by Cramer's rule; a row whose share is negative is left out; coincident rows share equally."""
    z = np.maximum(np.diag(C)[::-1] * d - C[0, 1] * d[::-1], 0.0)
    return z if z.sum() > 4 * _EPS else np.ones(2)


def _proximal(C: Array, d: Array) -> Array:
    """Minimise ½zᵀCz - dᵀz over z >= 0, up to the length of z, which is infinite where the rows cancel."""
    H = _ridged(C)
    z = _nonnegative_quadratic(H, d, np.maximum(np.linalg.solve(H, d), 0.0))
    residual = _residual(C, d, z)
    while residual > _EPS:
        closer = _nonnegative_quadratic(H, d + _RIDGE * z, z)
        last, residual = residual, _residual(C, d, closer)
        if residual < last:
            z = closer
        if residual > last / 2:
            break
    return z


def _ridged(C: Array) -> Array:
    return C + _RIDGE * np.eye(len(C))


def _nonnegative_quadratic(H: Array, q: Array, z: Array) -> Array:
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
            if slack[entering] >= -m * _EPS * z.sum():
                break
            free[entering] = True
    return z
