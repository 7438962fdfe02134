"""ConFIG's direction, from the pseudo-inverse of the unit rows of J, from the Gramian alone."""

import numpy as np

from mtlweight.solvers._rows import NONE, NULL, TINY, Array, Rows, Solution, eigen, promised, solve_each, solved

_ROUNDING = 1e-14  # a sum this far below its terms is nothing but rounding


def conflict_free(gramian: Array) -> Solution:
    r"""Weights of the step at the same acute angle to all `m` gradients, as long as the sum of their projections on it.

    .. math::
        d = \Big(\sum_i \langle g_i, e \rangle\Big) e, \qquad e = \frac{x}{\|x\|}, \qquad x = U^+ \mathbf{1}

    The rows of `U`, `[m, n]`, are the gradients :math:`g_i` scaled to length one. Only the inner products `G`, `[m,
    m]`, are read: the pseudo-inverse is :math:`U^+ = U^\top C^+` with the cosines :math:`C = U U^\top`.

    **Residual.** The componentwise backward error of the normal equations for :math:`y = C^+ \mathbf{1}`, zero for a
    step of zero:

    .. math::
        \max_i \frac{|(C (\mathbf{1} - C y))_i|}{(|C| (\mathbf{1} + |C| |y|))_i}

    **Method.** The linear system :math:`C y = 1`, or an eigenvalue decomposition where rows depend on each other.

    **Degenerate input.** Where gradients depend on each other, the cosines are equal in the sense of least squares, and
    `d` can conflict. Where not even that is possible, as between opposed gradients, or where the projections cancel,
    `d` and all weights are zero. A zero row has weight 0. Rows count as dependent where a combination of them is
    shorter than about :math:`10^{-6} \sqrt m` times its coefficients.

    Args:
        gramian: Symmetric, positive semidefinite, `[m, m]`, `m >= 1`; or a stack of them, `[..., m, m]`, each solved by
            itself. It is not changed.

    Returns:
        The weights, `[m]` or `[..., m]`, and the largest residual, at most `1e-8`.

    Raises:
        MTLWeightError: If a Gramian is not square, finite, symmetric and positive semidefinite.
        SolverError: If the residual stays above `1e-8`.

    Example:
        >>> import numpy as np
        >>> from mtlweight.solvers import conflict_free
        >>> J = np.array([[2.0, 0.0], [0.0, 0.5]])
        >>> weights, residual = conflict_free(J @ J.T)
        >>> weights.round(6)
        array([0.625, 2.5  ])
        >>> weights @ J
        array([1.25, 1.25])

    References:
        - Q. Liu, M. Chu and N. Thuerey, "ConFIG: towards conflict-free training of physics informed neural networks",
          2408.11104, 2024, equations 2 and 3.
    """
    return solve_each(gramian, "conflict_free", _direction)


def _direction(rows: Rows) -> Solution:
    ones = (rows.norms > 0.0).astype(np.float64)
    C, y = rows.cosines, solved(rows, ones, _least_squares)
    if not y.any():
        return Solution(y, 0.0)
    projections, size = C @ y, np.abs(C)
    terms = size @ (ones + size @ np.abs(y))
    error = np.abs(C @ (ones - projections)) / np.maximum(terms, TINY)
    residual = promised("conflict_free", float((error * ones).max()), len(C))
    scaled = rows.norms / rows.norms.max()
    length = scaled @ projections
    if abs(length) <= _ROUNDING * (scaled @ np.abs(projections)):
        return Solution(np.zeros_like(y), residual)
    scale = length / (y @ projections)
    return Solution(scale * np.divide(y, scaled, out=np.zeros_like(y), where=scaled > 0.0), residual)


def _least_squares(C: Array, ones: Array) -> Array:
    values, vectors = eigen(C)
    kept = values > NULL * len(values)
    shares = np.where(kept, vectors.T @ ones, 0.0)
    if np.linalg.norm(shares) <= NONE:
        return np.zeros_like(ones)
    return vectors @ (shares / np.where(kept, values, 1.0)) * ones
