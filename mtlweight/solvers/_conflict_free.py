"""ConFIG's direction, from the pseudo-inverse of the unit rows of J, from the Gramian alone."""

import numpy as np

from mtlweight.solvers._rows import NULL, Array, Solution, eigen, promised, rows_of

_ROUNDING = 1e-14  # a sum this far below its terms is nothing but rounding
_DEFINITE = 1e-6  # least squared pivot of cosines that are solved as they are


def conflict_free(gramian: Array) -> Solution:
    r"""Weights of the step that has the same positive cosine with each of `m` gradients, as long as they projected sum.

    .. math::
        d = \Big(\sum_i \langle g_i, e \rangle\Big) e, \qquad e = \frac{x}{\|x\|}, \qquad x = U^+ \mathbf{1}

    - :math:`U`: the gradients :math:`g_i` scaled to length one, `[m, n]`, and :math:`U^+` its pseudo-inverse. Only the
      inner products `G`, `[m, m]`, are read: :math:`U^+ = U^\top C^+` with the cosines :math:`C = U U^\top`.

    **Residual.** Of the normal equations that define :math:`y = C^+ \mathbf{1}`, the componentwise backward error:

    .. math::
        \max_i \frac{|(C (\mathbf{1} - C y))_i|}{(|C| (\mathbf{1} + |C| |y|))_i}

    **Method.** The linear system :math:`C y = 1`, or an eigenvalue decomposition where rows depend on each other.

    **Degenerate input.** Where gradients depend on each other, the pseudo-inverse gives the cosines that are equal in
    the sense of least squares, and `d` can conflict. Where they are orthogonal to being equal, as between opposed
    gradients, or where the projections cancel, `d` and all weights are zero. A zero row gets weight 0. Rows count as
    dependent where a combination of them is shorter than about :math:`3 \cdot 10^{-7} \sqrt m` times its coefficients.

    Args:
        gramian: Symmetric, positive semidefinite, `[m, m]`, `m >= 1`. It is not changed.

    Returns:
        The weights, `[m]`, and their residual, at most `1e-8`.

    Raises:
        MTLWeightError: If the Gramian is not square, finite, symmetric and positive semidefinite.
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
        >>> residual < 1e-8
        True

    References:
        - Q. Liu, M. Chu and N. Thuerey, "ConFIG: towards conflict-free training of physics informed neural networks",
          2408.11104, 2024, equations 2 and 3.
    """
    rows = rows_of(gramian, "conflict_free")
    weights = np.zeros(len(rows.norms))
    alive = ~rows.zero
    if not alive.any():
        return Solution(weights, 0.0)
    norms, C = rows.norms, rows.cosines
    if not alive.all():
        norms, C = norms[alive], C[np.ix_(alive, alive)]
    ones = np.ones(len(C))
    if rows.pivot > _DEFINITE:
        y = np.linalg.solve(C, ones)
    else:
        values, vectors = eigen(C)
        kept = values > NULL * len(C)
        shares = ones @ vectors[:, kept]
        if np.linalg.norm(shares) <= 1e-6:
            return Solution(weights, 0.0)
        y = vectors[:, kept] @ (shares / values[kept])
    projections = C @ y
    size = np.abs(C)
    residual = float((np.abs(C @ (ones - projections)) / (size @ (ones + size @ np.abs(y)))).max())
    scaled = norms / norms.max()
    length = scaled @ projections
    if abs(length) <= _ROUNDING * (scaled @ np.abs(projections)):
        return Solution(weights, residual)
    weights[alive] = length / (y @ projections) * y / scaled
    return Solution(weights, promised("conflict_free", residual, len(weights)))
