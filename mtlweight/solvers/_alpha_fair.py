"""Nash bargaining and alpha-fair weights of the rows of J, from the Gramian alone."""

import math

import numpy as np

from mtlweight._errors import MTLWeightError, SolverError
from mtlweight.solvers._cancelling import cancelling, outside
from mtlweight.solvers._rows import NULL, TOLERANCE, Array, Solution, eigen, promised, rows_of

_SUSPECT = 1e-10  # where an improvement is this small, relative to what it sums, rows may cancel
_ROUNDS = 500  # three to ten are common; rows whose scales differ by 1e12 take thirty if alpha is 0.1 or 10


def alpha_fair(gramian: Array, alpha: float = 1.0) -> Solution:
    r"""Weights at which `m` gradients share their improvement alpha-fairly; for `alpha = 1`, by Nash bargaining.

    .. math::
        w > 0, \qquad (G w)_i = w_i^{-1/\alpha} \quad \text{for all } i

    `G`, `[m, m]`, has the inner products of the gradients :math:`g_i`, so that the step :math:`d = J^\top w` improves
    objective `i` by :math:`(G w)_i = \langle g_i, d \rangle`. There is exactly one solution if no convex combination of
    gradients is zero, whatever their rank.

    **Residual.** The componentwise relative backward error: the weights are exact for a Gramian whose entries are
    changed by that much of themselves.

    .. math::
        \max_i \frac{|(G w)_i - w_i^{-1/\alpha}|}{\sum_j |G_{ij}| w_j}

    **Method.** Newton's method for :math:`C y = k y^{-1/\alpha}` in :math:`\log y`, which keeps both sides positive:
    `C` has the cosines of the rows, :math:`y_i = w_i \|g_i\|` and :math:`k_i = \|g_i\|^{1/\alpha - 1}`. With an `alpha`
    of 10 or more or of 0.1 or less it can fail, where rows are of very different scale or nearly depend on each other.

    **Degenerate input.** Where a convex combination of gradients vanishes, no step improves all of its objectives, and
    there is no solution. Let `S` be all objectives in such combinations. The answer is the limit of solutions that
    exist: `d` is orthogonal to the gradients of `S`, whose losses stay as they are to first order, and the others solve
    the equation with their gradients projected on that complement. If all are in `S`, the step is zero. Weights in `S`
    are known up to what cancels; the least is added that makes each at least as large as without any interaction,
    :math:`w_i \ge \|g_i\|^{-2\alpha/(1 + \alpha)}`. For rows in `S` the residual's numerator is :math:`|(G w)_i|`.
    Gradients count as cancelling where less than :math:`10^{-6}` of their summed lengths is left. A zero row has weight
    0.

    Args:
        gramian: Symmetric, positive semidefinite, `[m, m]`, `m >= 1`. It is not changed.
        alpha: Positive. Small values serve those who gain the most, large ones those who gain the least.

    Returns:
        The weights, `[m]`, and their residual, at most `1e-8`.

    Raises:
        MTLWeightError: If the Gramian is not square, finite, symmetric and positive semidefinite, or `alpha` is not
            positive and finite.
        SolverError: If the residual stays above `1e-8`, or the weights leave the range of float64.

    Example:
        >>> import numpy as np
        >>> from mtlweight.solvers import alpha_fair
        >>> G = np.array([[4.0, -1.0], [-1.0, 1.0]])
        >>> weights, residual = alpha_fair(G)
        >>> weights.round(6)
        array([0.707107, 1.414214])
        >>> (G @ weights * weights).round(6)
        array([1., 1.])

    References:
        - J. Nash, "The bargaining problem", Econometrica 18, 1950.
        - A. Navon et al., "Multi-task learning as a bargaining game", 2202.01017, 2022, claim 3.1.
        - J. Mo and J. Walrand, "Fair end-to-end window-based congestion control", IEEE/ACM Transactions on Networking
          8, 2000: alpha-fairness.
        - H. Ban and K. Ji, "Fair resource allocation in multi-task learning", 2402.15638, 2024, equation 4.
    """
    if not (alpha > 0.0 and math.isfinite(alpha)):
        raise MTLWeightError(f"alpha_fair expected a positive, finite alpha, but found {alpha}. 1 is Nash bargaining.")
    rows = rows_of(gramian, "alpha_fair")
    alive, weights = ~rows.zero, np.zeros(len(rows.norms))
    if not alive.any():
        return Solution(weights, 0.0)
    C = rows.cosines[np.ix_(alive, alive)]
    p = 1.0 / alpha
    logs = np.log(rows.norms[alive])
    scale = logs.mean()
    with np.errstate(all="ignore"):  # what leaves the range is refused below
        x, residual = _fair(C, (p - 1.0) * (logs - scale), p)
        weights[alive] = np.exp(x - logs + scale * ((p - 1.0) / (p + 1.0)))
    if not np.isfinite(weights).all():
        raise SolverError(
            "alpha_fair expected weights within the range of float64, but found gradients of lengths "
            f"{math.exp(logs.min()):.3g} to {math.exp(logs.max()):.3g} and alpha={alpha}. Scale the losses, or take an "
            "alpha near 1."
        )
    return Solution(weights, promised("alpha_fair", residual, len(weights)))


def _fair(C: Array, log_k: Array, p: float) -> tuple[Array, float]:
    """The logarithms of y, and the residual."""
    x, residual = _newton(C, log_k, p, _SUSPECT)
    if residual <= TOLERANCE:
        return x, residual
    z = cancelling(C)
    if z.any():
        x, residual = _without(C, log_k, p, z)
        if residual <= TOLERANCE:
            return x, residual
    return _newton(C, log_k, p, 0.0)  # what cancels nearly, but not quite


def _without(C: Array, log_k: Array, p: float, z: Array) -> tuple[Array, float]:
    """The solution where the rows in the support of `z` cancel in these proportions."""
    S, rest = z > 0.0, z == 0.0
    # They cancel up to their rounding, which the multiple of them that is added below must not blow up.
    values, vectors = eigen(C[np.ix_(S, S)])
    null = np.zeros((len(C), len(values)))
    null[S] = vectors * (values < len(C) * NULL)
    within = null @ null.T
    z, kept = within @ z, np.eye(len(C)) - within
    C = kept @ C @ kept
    least = np.exp(log_k / (1.0 + p))  # without interaction
    y, target = least.copy(), np.zeros(len(z))
    share = np.zeros(np.count_nonzero(S))
    if rest.any():
        P, shares = outside(C, S)
        x, _ = _newton(P[np.ix_(rest, rest)], log_k[rest], p, 0.0)
        y[rest], target[rest] = np.exp(x), np.exp(log_k[rest] - p * x)
        share = -shares[:, rest] @ y[rest]  # takes the part of the step that lies in the span of S away
    y[S] = share + ((least[S] - share) / z[S]).max() * z[S]
    return np.log(y), float(np.abs((C @ y - target) / (np.abs(C) @ y)).max())


def _newton(C: Array, log_k: Array, p: float, suspect: float) -> tuple[Array, float]:
    """Solve u = Cy for x = log y and log u = log k - p x; give up where some u is below `suspect` of what it sums."""
    size = np.abs(C)
    x = log_k / (1.0 + p)  # without interaction
    y = np.exp(x)
    x -= np.log(np.maximum(C @ y / y, 0.1)) / (2.0 + p)
    best, change = (x, math.inf), np.full_like(x, math.inf)
    for _ in range(_ROUNDS):
        y, u = np.exp(x), np.exp(log_k - p * x)
        gap, summed = u - C @ y, size @ y
        if (u / summed).min() < suspect:
            return x, math.inf
        residual = float(np.abs(gap / summed).max())
        halted = change @ change <= 1e-14 and not residual < best[1] / 2
        if residual < best[1]:  # where rows nearly cancel, rounding may keep it from ever coming to a halt
            best = x.copy(), residual
        if halted or residual <= 1e-14:
            break
        try:
            change = np.asarray(np.linalg.solve(C * y + np.diag(p * u), gap), dtype=np.float64)
        except np.linalg.LinAlgError:
            break
        x += np.log1p(np.clip(change, -0.95, 10.0))  # y changes in proportion, so that what cancels in Cy still does
    return best
