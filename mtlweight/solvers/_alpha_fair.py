"""Nash bargaining and alpha-fair weights of the rows of J, from the Gramian alone."""

import math

import numpy as np

from mtlweight._errors import MTLWeightError, SolverError
from mtlweight.solvers._cancelling import cancelling, outside
from mtlweight.solvers._rows import NULL, TOLERANCE, Array, Solution, all_finite, eigen, promised, rows_of

_SUSPECT = 1e-10  # an improvement this small, relative to what it sums, calls for a look at what cancels
_OPPOSED = 1e-6 - 1.0  # the cosine of two rows, down to which they are far from cancelling
_SMALL = 16  # up to here an inverse costs little more than a solution, and serves twice
_LEAST = math.ulp(0.0)  # the smallest positive number
_ROUNDS = 500  # three to ten are common; rows whose scales differ by 1e12 take thirty if alpha is 0.1 or 10


def alpha_fair(gramian: Array, alpha: float = 1.0) -> Solution:
    r"""Weights at which `m` gradients share their improvement alpha-fairly; for `alpha = 1`, by Nash bargaining.

    .. math::
        w > 0, \qquad (G w)_i = w_i^{-1/\alpha} \quad \text{for all } i

    - `G`: the inner products of the gradients :math:`g_i`, `[m, m]`, so that :math:`(G w)_i = \langle g_i, d \rangle`
      is what the step :math:`d = J^\top w` improves objective `i` by.

    This is where the gradient of the strictly convex :math:`\frac12 w^\top G w - \sum_i \int w_i^{-1/\alpha} dw_i`
    vanishes: there is one solution exactly if no convex combination of gradients is zero, whatever their rank.

    **Residual.** The componentwise relative backward error: the weights are exact for a Gramian whose entries are
    changed by that much of themselves.

    .. math::
        \max_i \frac{|(G w)_i - w_i^{-1/\alpha}|}{\sum_j |G_{ij}| w_j}

    **Method.** In the lengths :math:`y_i = w_i \|g_i\|` and the cosines `C` of the rows, with
    :math:`k_i = \|g_i\|^{1/\alpha - 1}`, the equation :math:`C y = k y^{-1/\alpha}` is solved by Newton's method in
    :math:`\log y`, which keeps both sides positive. For two rows it comes down to one equation in a scalar, increasing
    and concave: the logarithm of the ratio of their lengths, or of their gains if they conflict. For `alpha = 1` the
    lengths of the gradients drop out altogether. An `alpha` of 10 or more or of 0.1 or less can fail, where rows are of
    very different scale or nearly depend on each other.

    **Degenerate input.** Where a convex combination of gradients vanishes, no step improves all of its objectives, and
    the equation has no solution: the weights would grow without bound. Take all objectives that occur in such a
    combination, `S`. The answer is the limit of solutions that exist: `d` is orthogonal to the gradients of `S`, so
    that their losses stay as they are to first order, and the others solve the equation with what the projection on
    that complement leaves of their gradients. If all are in `S`, the step is zero. Adding what cancels to the weights
    in `S` changes nothing; as much of it is added as makes all of them at least as large as without any interaction,
    :math:`w_i \ge \|g_i\|^{-2\alpha/(1 + \alpha)}`. For rows in `S` the residual's numerator is :math:`|(G w)_i|`.
    Gradients count as cancelling where less than :math:`10^{-6}` of their summed lengths is left. A zero row
    has nothing to gain: its weight is 0.

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
        >>> residual < 1e-8
        True

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
    norms, C = rows.norms, rows.cosines
    alive = None
    if norms.min() == 0.0:
        alive, every = ~rows.zero, np.zeros(len(norms))
        if not alive.any():
            return Solution(every, 0.0)
        norms, C = norms[alive], C[np.ix_(alive, alive)]
    p = 1.0 / alpha
    logs = np.log(norms)
    middle = float(logs.sum()) / len(logs)  # the gradients' scale, which scales the weights
    log_k = (p - 1.0) * (logs - middle)
    with np.errstate(all="ignore"):  # what leaves the range is refused below
        x, residual = _fair(C, log_k, p)
        weights = np.exp(x - logs + middle * ((p - 1.0) / (p + 1.0)))
    if not all_finite(weights):
        raise SolverError(
            "alpha_fair expected weights within the range of float64, but found gradients of lengths "
            f"{norms.min():.3g} to {norms.max():.3g} and alpha={alpha}. Scale the losses, or take an alpha near 1."
        )
    if alive is not None:
        every[alive] = weights
        weights = every
    return Solution(weights, promised("alpha_fair", residual, len(weights)))


def _fair(C: Array, log_k: Array, p: float) -> tuple[Array, float]:
    """The logarithms of y, and the residual."""
    if len(C) == 2 and _OPPOSED < C[0, 1] <= 1.0:
        return _pair(float(C[0, 1]), log_k, p)
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
    return np.log(y), _residual(C, y, target)


def _residual(C: Array, y: Array, target: Array) -> float:
    return float(abs((C @ y - target) / (np.abs(C) @ y)).max())


def _newton(C: Array, log_k: Array, p: float, suspect: float) -> tuple[Array, float]:
    """Solve u = Cy for x = log y and log u = log k - p x; stop where some u is below `suspect` of what it sums."""
    size = np.abs(C)
    far = 8.0 / (1.0 + p)  # an entry's change in one round: neither x nor log u = log k - p x may leap out of sight
    twice = suspect > 0.0 and len(C) <= _SMALL
    x = log_k / (1.0 + p)  # without interaction
    y = np.exp(x)
    x -= np.log(np.maximum(C.dot(y) / y, 0.1)) / (2.0 + p)
    H, inverse, squared, residual = np.empty(C.shape), None, math.inf, math.inf
    diagonal, best = H.reshape(-1)[:: len(H) + 1], (x, math.inf)
    for k in range(_ROUNDS):  # few operations, since each takes about as long for two rows as for sixty
        y, u = np.exp(x), np.exp(log_k - p * x)
        gap = u - C.dot(y)
        near = not squared > 1e-14  # or nan
        if near or not suspect or k % 8 == 7:  # it may have come to a halt; seldom sooner
            summed = size.dot(y)
            if suspect and (u / summed).min() < suspect:
                return x, math.inf
            last, residual = residual, float(abs(gap / summed).max())
            if residual <= 1e-14 or (near and not residual < last / 2):
                return (x, residual) if residual <= best[1] else best
            if residual < best[1]:  # where rows nearly cancel, rounding may keep it from ever coming to a halt
                best = x.copy(), residual
        if inverse is not None:
            change, inverse = inverse.dot(gap), None
        else:
            np.multiply(C, y, out=H)
            diagonal += p * u
            try:
                inverse = np.linalg.inv(H) if twice else None
                change = np.linalg.solve(H, gap) if inverse is None else inverse.dot(gap)
            except np.linalg.LinAlgError:
                break
        squared = change.dot(change)
        if not suspect:  # y changes in proportion, so that what cancels in Cy still does
            x += np.log1p(np.minimum(np.maximum(change, -0.95), 10.0))
        elif squared < 1.0:
            x += change
        else:  # each for itself: this takes far fewer rounds than one common step length
            x += np.minimum(np.maximum(change, -far), far)
            inverse = None
    return (x, math.inf) if suspect else best


def _pair(c: float, log_k: Array, p: float) -> tuple[Array, float]:
    """The same for two rows of cosine `c`, in scalars.

    Let exp(t) be the ratio of their lengths and exp(s) that of their gains, the row of the larger k over the other.
    Either s = g(t), or t = g(s) if c < 0, with g(z) = log((1 + |c| exp(-z)) / (|c| + exp(-z))), and s + p t is the
    difference of their log k. Since g is increasing and concave, Newton's method rises from 0 to the root.
    """
    (low, high), size = sorted(log_k.tolist()), abs(c)
    a, b = (p, 1.0) if c >= 0.0 else (1.0, p)
    z, g = 0.0, 0.0
    for _ in range(_ROUNDS):
        r = math.exp(-z) or _LEAST
        g = math.log1p(size * r) - math.log(size + r)
        slope = (1.0 - size * size) * r / ((1.0 + size * r) * (size + r))
        change = (high - low - a * z - b * g) / (a + b * slope)
        z += change
        g += slope * change
        if not change > 1e-8 * z:  # the next would be the square of this one; or is nan
            break
    t = z if c >= 0.0 else g
    r = math.exp(-t) or _LEAST
    x = (high - math.log1p(c * r)) / (1.0 + p)
    targets = math.exp(min(high - p * x - x, 1.0)), math.exp(min(low - p * (x - t) - x, 1.0))  # at most 2, if right
    residual = max(abs(1.0 + c * r - targets[0]) / (1.0 + size * r), abs(c + r - targets[1]) / (size + r))
    return np.array((x, x - t) if log_k[0] >= log_k[1] else (x - t, x)), residual
