"""The best worst-case improvement near the average gradient, from the Gramian alone."""

import math

import numpy as np
import numpy.typing as npt

from mtlweight._errors import MTLWeightError
from mtlweight.solvers._cancelling import cancelling
from mtlweight.solvers._nonnegative import complementary
from mtlweight.solvers._rows import EPS, INDEPENDENT, TOLERANCE, Array, Solution, promised, rows_of

_CANCELLED = 1e-15  # the squared relative length of an average that is nothing but rounding
_BOUND = 1e7  # the most by which summed lengths may exceed the average's, so that rounding stays below the residual


def conflict_averse(gramian: Array, radius: float) -> Solution:
    r"""Weights of the step that improves the worst-off objective most, within a ball around the average gradient.

    .. math::
        d = \arg\max_{d} \min_i \langle g_i, d \rangle \quad \text{subject to } \|d - g_0\| \le c \|g_0\|,
        \qquad g_0 = \frac1m \sum_i g_i

    - :math:`g_i`: the gradients, of which only the inner products `G`, `[m, m]`, are read; `c`: the radius.

    By duality :math:`d = g_0 + \sum_i v_i g_i` with :math:`v \ge 0`: the weights are :math:`\frac1m + v`. Where `t` is
    the greatest number for which :math:`P_t = \{d: \langle g_i, d \rangle \ge t\}` meets the ball, `d` is the point of
    :math:`P_t` nearest to :math:`g_0`.

    **Residual.** At the solution, of each pair :math:`v_i \ge 0` and :math:`\langle g_i, d \rangle - t \ge 0` one is
    zero, and `d` lies on the sphere (or in the ball, where no greater `t` is possible at all). In units that cancel the
    scale of every row:

    .. math::
        \frac{\max\left(\max_i |\min(v_i \|g_i\|,\ (\langle g_i, d \rangle - t) / \|g_i\|)|,\
        \left| \|d - g_0\| - c \|g_0\| \right|\right)}{\sum_j (\frac1m + v_j) \|g_j\|}

    **Method.** For a given set of rows with :math:`v_i > 0`, `v` is linear in `t`, and the sphere gives `t` in closed
    form. Rows of the wrong sign are exchanged until there are none: a few rounds. If that does not end, or rows
    depend on each other, `t` is bracketed instead, and :math:`P_t` is projected on exactly.

    **Degenerate input.** Where a convex combination of gradients vanishes, no step improves all its objectives, so
    that often :math:`t = 0`; then every `d` of the ball with :math:`J d \ge 0` is a solution. The one nearest to the
    average is taken: its projection on the dual cone. A zero row is left out of the minimum, which it would hold at 0,
    and has weight :math:`\frac1m`. If the average is zero, so is the step, and the weights are :math:`\frac1m`. Where
    the average is shorter than about :math:`10^{-6}` of the mean length, its own length, and with it the ball, is known
    from `G` less well than the residual says.

    Args:
        gramian: Symmetric, positive semidefinite, `[m, m]`, `m >= 1`. It is not changed.
        radius: `c`, nonnegative. From 1 on the ball contains the origin.

    Returns:
        The weights, `[m]`, and their residual, at most `1e-8`.

    Raises:
        MTLWeightError: If the Gramian is not square, finite, symmetric and positive semidefinite, or the radius is
            not nonnegative and finite.
        SolverError: If the residual stays above `1e-8`.

    Example:
        >>> import numpy as np
        >>> from mtlweight.solvers import conflict_averse
        >>> J = np.array([[1.0, 0.0], [-0.5, 0.5]])
        >>> weights, residual = conflict_averse(J @ J.T, radius=0.5)
        >>> weights.round(6)
        array([0.5 , 0.75])
        >>> (J @ (weights @ J)).round(6)
        array([0.125, 0.125])
        >>> residual < 1e-8
        True

    References:
        - B. Liu, X. Liu, X. Jin, P. Stone and Q. Liu, "Conflict-averse gradient descent for multi-task learning",
          2110.14048, 2021, algorithm 1 and its derivation.
    """
    if not (radius >= 0.0 and math.isfinite(radius)):
        raise MTLWeightError(f"conflict_averse expected a radius >= 0, but found {radius}. The paper takes 0.4.")
    rows = rows_of(gramian, "conflict_averse")
    m = len(rows.norms)
    norms, C = rows.norms, rows.cosines
    alive, v = ~rows.zero, np.zeros(m)
    count = np.count_nonzero(alive)
    if not count:
        return Solution(v + 1.0 / m, 0.0)
    if count < m:
        norms, C = norms[alive], C[np.ix_(alive, alive)]
    norms = norms / norms.max()
    problem = _Problem(C, norms, norms / m, radius, rows.pivot)
    y, residual = problem.solve()
    v[alive] = y / norms
    return Solution(v + 1.0 / m, promised("conflict_averse", residual, m))


class _Problem:
    """In lengths: the greatest t with Cy + b >= tδ, y >= 0, one of each pair zero, and yᵀCy = s², where b = Cx."""

    def __init__(self, C: Array, norms: Array, x: Array, radius: float, pivot: float) -> None:
        self.C, self.x, self.pivot = C, x, pivot
        self.b = C @ x
        self.delta = norms.min() / norms
        self.sides = np.array((self.delta, self.b))
        self.total = float(x.sum())
        squared = float(x @ self.b)
        self.s = radius * math.sqrt(squared) if squared > _CANCELLED * self.total**2 else 0.0

    def solve(self) -> tuple[Array, float]:
        """The multipliers, in lengths, and the residual."""
        if self.s == 0.0:
            return np.zeros_like(self.x), 0.0
        y, t = self._exchange()
        residual = self._residual(y, t)
        bounded = y.sum() <= _BOUND * self.total
        if residual <= 1e-3 * TOLERANCE and bounded:
            return y, residual
        other = self._bracket()
        # Next to rows that nearly cancel, long multipliers hide what is wrong: the exact rows are to be preferred.
        return (y, residual) if bounded and residual <= min(TOLERANCE, 100 * other[1]) else other

    def _residual(self, y: Array, t: float, inside: bool = False) -> float:
        unit = self.total + float(y.sum())
        slack = self._slack(y, t)
        off = self._length(y) - self.s
        return max(float(np.abs(np.minimum(y, slack)).max()), max(off, 0.0) if inside else abs(off)) / unit

    def _slack(self, y: Array, t: float) -> Array:
        slack: Array = self.C.dot(y) + self.b - t * self.delta
        return slack

    def _length(self, y: Array) -> float:
        return math.sqrt(max(float(y @ self.C @ y), 0.0))

    def _piece(self, free: npt.NDArray[np.bool_]) -> tuple[Array, float]:
        """The solution if these rows, and no others, have multipliers: y is linear in t, and the sphere gives t."""
        sides, block = self.sides[:, free], self.C[free][:, free]
        if self.pivot > INDEPENDENT:
            solved = np.linalg.solve(block, sides.T)
        else:
            solved = np.linalg.lstsq(block, sides.T, rcond=1e-13)[0]
        (curvature, middle), (_, square) = sides.dot(solved).tolist()
        delta, y = sides[0], np.zeros(len(free))
        if curvature < 1e-12 * delta.dot(delta):  # these rows cancel, and have no t in common but 0
            return y, 0.0
        root = math.sqrt(max(middle**2 - curvature * (square - self.s**2), 0.0))
        t = (middle + root) / curvature
        y[free] = t * solved[:, 0] - solved[:, 1]
        return y, t

    def _exchange(self) -> tuple[Array, float]:
        """Guess which rows have multipliers, and exchange those of the wrong sign."""
        m = len(self.x)
        ratio = self.b / self.delta
        free = ratio == ratio.min()  # active for a vanishing radius
        for _ in range(30):
            y, t = self._piece(free)
            noise = m * EPS * (self.total + float(y.sum()))
            wrong = np.where(free, y, self._slack(y, t) + noise) < 0.0
            if not np.count_nonzero(wrong):
                break
            free ^= wrong
            if not np.count_nonzero(free):
                free = wrong
        return np.maximum(y, 0.0), t

    def _bracket(self) -> tuple[Array, float]:
        """Project on P_t, exactly, for t between bounds that close in on the sphere."""
        y = self._nearest(0.0)
        if self._length(y) <= self.s:
            if cancelling(self.C).any():
                return y, self._residual(y, 0.0, inside=True)
            low, high = 0.0, float(((self.b + self.s) / self.delta).min())
        else:
            low, high = float((self.b / self.delta).min()), 0.0
        best = y, self._residual(y, 0.0)
        for _ in range(100):
            if (y > 0.0).any():
                z, t = self._piece(y > 0.0)
                z = np.maximum(z, 0.0)
                best = min(best, (z, self._residual(z, t)), key=lambda found: found[1])
            if best[1] <= 4 * EPS or not low < high:
                break
            if not (y.any() and low < t < high):
                t = (low + high) / 2
                if not low < t < high:
                    break
            y = self._nearest(t)
            best = min(best, (y, self._residual(y, t)), key=lambda found: found[1])
            if self._length(y) > self.s:
                high = t
            else:
                low = t
        return best

    def _nearest(self, t: float) -> Array:
        Q = t * self.delta - self.b
        y: Array = complementary(self.C, Q[None], np.array([self.x.sum()]), self.pivot)[0][0]
        return y
