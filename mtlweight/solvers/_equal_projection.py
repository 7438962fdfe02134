"""The affine combination of the rows of J with equal projections on all of them, from the Gramian alone."""

from typing import Literal

import numpy as np

from mtlweight.solvers._rows import NONE, NULL, Array, Rows, Solution, eigen, promised, solve_each, solved

_RIDGE = 1e-11


def equal_projection(gramian: Array, total: Literal["sum", "absolute"] = "sum") -> Solution:
    r"""Weights of the combination of `m` gradients that has the same projection on each of them.

    .. math::
        \left\langle \sum_j w_j g_j,\ \frac{g_i}{\|g_i\|} \right\rangle = \kappa \quad \text{for all } i, \qquad
        \sum_i w_i = 1

    Of the gradients :math:`g_i` only the inner products `G`, `[m, m]`, are read. Weights can be negative, and so can
    the common projection :math:`\kappa`: then the step is an ascent for all objectives.

    **Residual.** The largest difference, relative to the lengths that are summed, with the cosines `C` and :math:`y_i =
    w_i \|g_i\|`:

    .. math::
        \max_i \frac{|(C y)_i - \kappa|}{\sum_j |y_j|}

    **Method.** The linear system :math:`C y = 1`, scaled afterwards; where rows depend on each other, a proximal point
    iteration, by which what cancels grows beyond the rest, as in the limit below.

    **Degenerate input.** Where gradients depend on each other, the answer is the limit of :math:`(C + \epsilon I) y =
    1`, scaled, for :math:`\epsilon \to 0`. If the equations can still be met, it is the solution of least :math:`\sum_i
    w_i^2 \|g_i\|^2` before scaling: duplicates share. If not, as between opposed gradients or wherever a convex
    combination vanishes, the only step with equal projections is zero: :math:`\kappa = 0`, and `y` is the projection of
    the vector of ones on the null space of `C`. A zero row has weight 0; if all rows are zero, the weights are uniform.
    If the weights cancel, no scale makes their sum one, and all are zero.

    Args:
        gramian: Symmetric, positive semidefinite, `[m, m]`, `m >= 1`; or a stack of them, `[..., m, m]`, each solved by
            itself. It is not changed.
        total: What is scaled to one: the sum of the weights, or the sum of their absolute values. The latter always can
            be, and keeps :math:`\kappa \ge 0`.

    Returns:
        The weights, `[m]` or `[..., m]`, and the largest residual, at most `1e-8`.

    Raises:
        MTLWeightError: If a Gramian is not square, finite, symmetric and positive semidefinite.
        SolverError: If the residual stays above `1e-8`.

    Example:
        >>> import numpy as np
        >>> from mtlweight.solvers import equal_projection
        >>> J = np.array([[2.0, 0.0], [0.0, 0.5]])
        >>> weights, residual = equal_projection(J @ J.T)
        >>> weights.round(6)
        array([0.2, 0.8])
        >>> weights @ J
        array([0.4, 0.4])

    References:
        - L. Liu et al., "Towards impartial multi-task learning", ICLR 2021, section 3.1.
    """
    return solve_each(gramian, "equal_projection", lambda rows: _combination(rows, total))


def _combination(rows: Rows, total: str) -> Solution:
    C, m = rows.cosines, len(rows.norms)
    ones = (rows.norms > 0.0).astype(np.float64)
    if not ones.any():
        return Solution(ones + 1.0 / m, 0.0)
    y = solved(rows, ones, _limit)
    gap = C @ y - ones
    if rows.pivot == 0.0:
        gap = C @ gap  # what the rounding of rows leaves outside of their span cannot be met
    residual = promised("equal_projection", float(np.abs(gap).max() / np.abs(y).sum()), m)
    w = y * rows.inverse
    size = np.abs(w).sum()
    scale = w.sum() if total == "sum" else size
    return Solution(w / scale if abs(scale) > NONE * size else np.zeros_like(w), residual)


def _limit(C: Array, ones: Array) -> Array:
    """Three steps of a proximal point iteration, `(C + ridge) y' = 1 + ridge y`, from zero."""
    values, vectors = eigen(C)
    shares = vectors.T @ ones
    null = values < len(values) * NULL
    shares[null & (np.abs(shares) < NONE)] = 0.0
    values[null] = 0.0
    ratio = _RIDGE / (values + _RIDGE)
    return vectors @ (shares * (1.0 + ratio + ratio**2) / (values + _RIDGE)) * ones
