"""Projections on the dual cone of the rows of J, from the Gramian alone."""

import numpy as np

from mtlweight._errors import MTLWeightError
from mtlweight.solvers._nonnegative import complementary
from mtlweight.solvers._rows import Array, Solution, promised, rows_of


def dual_cone(gramian: Array, preferences: Array) -> Solution:
    r"""Weights of the vectors nearest to given combinations of `m` gradients that conflict with none of them.

    .. math::
        J^\top v = \arg\min_{d:\ J d \ge 0} \|d - J^\top u\|^2,
        \qquad v = u + \lambda, \quad \lambda = \arg\min_{\lambda \ge 0} (u + \lambda)^\top G (u + \lambda)

    Of the gradients :math:`g_i`, the rows of `J`, only the inner products `G`, `[m, m]`, are read. `u` has the
    coefficients of what is projected, a row of `preferences`; `v` has those of the projection.

    **Residual.** At the solution, of each pair :math:`\lambda_i \ge 0` and :math:`(Gv)_i \ge 0` one is zero. In units
    that cancel the scale of every row:

    .. math::
        \max_i \frac{|\min(\lambda_i \|g_i\|,\ (G v)_i / \|g_i\|)|}{\sum_j (|u_j| + \lambda_j) \|g_j\|}

    **Method.** In the lengths :math:`y_i = \lambda_i \|g_i\|` and the cosines of the rows this is a nonnegative
    quadratic program for each `u`, solved for all of them at once by block principal pivoting. Where the rows depend on
    each other a proximal point iteration makes it strictly convex, as in `min_norm`.

    **Degenerate input.** The projection always exists and is unique; its weights need not be, and those of least
    :math:`\sum_i \lambda_i^2 \|g_i\|^2` are taken. A zero row conflicts with nothing and keeps :math:`v_i = u_i`.

    Args:
        gramian: Symmetric, positive semidefinite, `[m, m]`, `m >= 1`. It is not changed.
        preferences: One `u`, `[m]`, or one a row, `[r, m]`.

    Returns:
        The weights, with the shape of `preferences`, and the largest residual, at most `1e-8`.

    Raises:
        MTLWeightError: If the Gramian is not square, finite, symmetric and positive semidefinite, or the preferences do
            not fit.
        SolverError: If a residual stays above `1e-8`.

    Example:
        >>> import numpy as np
        >>> from mtlweight.solvers import dual_cone
        >>> J = np.array([[1.0, 0.0], [-1.0, 1.0]])
        >>> weights, residual = dual_cone(J @ J.T, np.eye(2))
        >>> weights
        array([[1. , 0.5],
               [1. , 1. ]])
        >>> weights @ J
        array([[0.5, 0.5],
               [0. , 1. ]])

    References:
        - P. Quinton and V. Rey, "Jacobian descent for multi-objective optimization", 2406.16232, 2024, proposition 1.
        - L. Portugal, J. Júdice and L. Vicente, "A comparison of block pivoting and interior-point algorithms for
          linear least squares problems with nonnegative variables", Mathematics of Computation 63, 1994.
    """
    rows = rows_of(gramian, "dual_cone")
    m = len(rows.norms)
    U = np.asarray(preferences, dtype=np.float64)
    if U.ndim not in {1, 2} or U.shape[-1] != m or not np.isfinite(U).all():
        raise MTLWeightError(
            f"dual_cone expected finite preferences [{m}] or [r, {m}], but found shape {list(U.shape)} with "
            f"{np.count_nonzero(~np.isfinite(U))} entries that are inf or nan. Pass one number a gradient."
        )
    C = rows.cosines
    X = np.atleast_2d(U) * rows.norms
    Q = -(X @ C)
    Y, residuals = complementary(C, Q, np.abs(X).sum(axis=1))
    V = U + (Y * rows.inverse).reshape(U.shape)
    return Solution(V, promised("dual_cone", float(residuals.max()), m))
