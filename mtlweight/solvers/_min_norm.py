"""The shortest vector in the convex hull of the rows of J, from the Gramian alone."""

import numpy as np

from mtlweight.solvers._cancelling import cancelling
from mtlweight.solvers._nonnegative import kkt, shortest
from mtlweight.solvers._rows import INDEPENDENT, TOLERANCE, Array, Solution, promised, rows_of


def min_norm(gramian: Array) -> Solution:
    r"""Weights of the min-norm point in the convex hull of `m` gradients, known only by their inner products.

    .. math::
        w = \arg\min_{w \ge 0,\ \sum_i w_i = 1} w^\top G w, \qquad x = J^\top w, \quad G = J J^\top

    Of the gradients :math:`g_i`, the rows of `J`, only `G`, `[m, m]`, is read. The min-norm point `x` has
    :math:`\langle x, g_i \rangle \ge \|x\|^2` for all `i`: going against it decreases every objective, or `x` is zero
    and no direction does.

    **Residual.** The largest violation of that inequality, in units that cancel the scale of every row:

    .. math::
        \max_i \frac{(w^\top G w - (G w)_i)_+}{\|g_i\| \sum_j w_j \|g_j\|}

    The sum replaces :math:`\|x\|`, which is only rounding where the gradients cancel. Complementarity needs no second
    term: since :math:`\sum_i w_i ((Gw)_i - w^\top G w) = 0`, a slack row with weight is paid for by a violation.

    **Method.** In the lengths :math:`z_i \propto w_i \|g_i\|` and the cosines `C` of the rows, with :math:`d_i \propto
    1 / \|g_i\|`, the problem is :math:`\min_{z \ge 0} \frac12 z^\top C z - d^\top z` up to the length of `z`. In each
    step of a proximal point iteration a ridge :math:`\frac\rho2 \|z - z_\text{last}\|^2` with :math:`\rho = 10^{-10}`
    makes it strictly convex, and it is solved by block principal pivoting. The first step already has a residual below
    :math:`\rho`; the next ones remove the ridge's bias.

    **Degenerate input.** `x` is always unique, the weights need not be. Among all minimisers this is the one of least
    :math:`\sum_i w_i^2 \|g_i\|^2` (within about :math:`10^{-5}`): duplicate rows share equally, and permuting the rows
    permutes the weights. Zero rows, of a squared norm below the smallest normal float64, share all weight equally.
    Where the rows cancel to less than about :math:`10^{-5} \sum_j w_j \|g_j\|`, the direction of `x` drowns in the
    rounding of `G`. A slightly indefinite `G`, as float32 rounding leaves it, is replaced by the nearest positive
    semidefinite matrix of cosines, and the residual is that of the replacement.

    Args:
        gramian: Symmetric, positive semidefinite, `[m, m]`, `m >= 1`. It is not changed.

    Returns:
        The weights, `[m]`, and their residual, at most `1e-8`.

    Raises:
        MTLWeightError: If the Gramian is not square, finite, symmetric and positive semidefinite.
        SolverError: If the residual stays above `1e-8`.

    Example:
        >>> import numpy as np
        >>> from mtlweight.solvers import min_norm
        >>> J = np.array([[2.0, 0.0], [0.0, 1.0], [3.0, 3.0]])
        >>> weights, residual = min_norm(J @ J.T)
        >>> weights.round(6)
        array([0.2, 0.8, 0. ])
        >>> residual < 1e-8
        True

    References:
        - P. Wolfe, "Finding the nearest point in a polytope", Mathematical Programming 11, 1976.
        - J.-A. Désidéri, "Multiple-gradient descent algorithm (MGDA) for multiobjective optimization", 2012.
        - O. Sener and V. Koltun, "Multi-task learning as multi-objective optimization", 1810.04650, 2018.
        - C. Lawson and R. Hanson, "Solving Least Squares Problems", 1974, chapter 23: the active set.
    """
    norms, C, _ = rows = rows_of(gramian, "min_norm")
    least = norms.min()
    if least == 0.0:
        return Solution(rows.zero / rows.zero.sum(), 0.0)
    d = least / norms
    z = shortest(C, d)
    if rows.pivot < INDEPENDENT:
        z = _vanishing(C, d, z)
    return Solution(z * d / (z @ d), promised("min_norm", kkt(C, d, z), len(d)))


def _vanishing(C: Array, d: Array, z: Array) -> Array:
    """A combination that vanishes, if there is one and the ridge has kept `z` from it, as next to much smaller rows."""
    if z @ C @ z <= 1e-19 * z.sum() ** 2:
        return z
    S = cancelling(C) > 0.0
    if not S.any():
        return z
    better = np.zeros_like(z)
    better[S] = shortest(C[np.ix_(S, S)], d[S] / d[S].max())  # without the smaller rows
    return better if kkt(C, d, better) <= TOLERANCE / 100 else z
