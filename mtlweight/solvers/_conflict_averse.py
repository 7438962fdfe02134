"""The best worst-case improvement near the average gradient, from the Gramian alone."""

import math

import numpy as np
import numpy.typing as npt

from mtlweight._errors import MTLWeightError
from mtlweight.solvers._cancelling import cancelling
from mtlweight.solvers._nonnegative import complementary
from mtlweight.solvers._rows import EPS, Array, Solution, promised, rows_of

_CANCELLED = 1e-15  # the squared relative length of an average that is nothing but rounding


def conflict_averse(gramian: Array, radius: float) -> Solution:
    r"""Weights of the step that improves the worst-off objective most, within a ball around the average gradient.

    .. math::
        d = \arg\max_{d} \min_i \langle g_i, d \rangle \quad \text{subject to } \|d - g_0\| \le c \|g_0\|,
        \qquad g_0 = \frac1m \sum_i g_i

    Of the gradients :math:`g_i` only the inner products `G`, `[m, m]`, are read; `c` is the radius. By duality :math:`d
    = g_0 + \sum_i v_i g_i` with :math:`v \ge 0`: the weights are :math:`\frac1m + v`. Where `t` is the greatest number
    for which :math:`P_t = \{d: \langle g_i, d \rangle \ge t\}` meets the ball, `d` is the point of :math:`P_t` nearest
    to :math:`g_0`.

    **Residual.** At the solution, of each pair :math:`v_i \ge 0` and :math:`\langle g_i, d \rangle - t \ge 0` one is
    zero, and `d` lies on the sphere (or in the ball, where no greater `t` is possible at all). In units that cancel the
    scale of every row:

    .. math::
        \frac{\max\left(\max_i |\min(v_i \|g_i\|,\ (\langle g_i, d \rangle - t) / \|g_i\|)|,\
        \left| \|d - g_0\| - c \|g_0\| \right|\right)}{\sum_j (\frac1m + v_j) \|g_j\|}

    **Method.** `t` is bracketed: :math:`g_0` is projected on :math:`P_t`. For the set of rows with :math:`v_i > 0` that
    this finds, `v` is linear in `t`, and the sphere gives the next `t` in closed form.

    **Degenerate input.** Where a convex combination of gradients vanishes, :math:`t \le 0`. If `t = 0`, every `d` of
    the ball with :math:`J d \ge 0` is a solution; the one nearest to the average is taken, its projection on the dual
    cone. A zero row is left out of the minimum, which it would hold at 0, and has weight :math:`\frac1m`. If the
    average is zero, so is the step, and the weights are :math:`\frac1m`. Where the average is shorter than about
    :math:`10^{-6}` of the mean length, `G` gives its length, and so the ball's, less exactly than the residual says.

    Args:
        gramian: Symmetric, positive semidefinite, `[m, m]`, `m >= 1`. It is not changed.
        radius: `c`, nonnegative. From 1 on the ball contains the origin.

    Returns:
        The weights, `[m]`, and their residual, at most `1e-8`.

    Raises:
        MTLWeightError: If the Gramian is not square, finite, symmetric and positive semidefinite, or the radius is
            negative or not finite.
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

    References:
        - B. Liu, X. Liu, X. Jin, P. Stone and Q. Liu, "Conflict-averse gradient descent for multi-task learning",
          2110.14048, 2021, algorithm 1 and its derivation.
    """
    if not (radius >= 0.0 and math.isfinite(radius)):
        raise MTLWeightError(f"conflict_averse expected a radius >= 0, but found {radius}. The paper takes 0.4.")
    rows = rows_of(gramian, "conflict_averse")
    m = len(rows.norms)
    alive, v = ~rows.zero, np.zeros(m)
    if alive.any():
        norms = rows.norms[alive] / rows.norms.max()
        problem = _Problem(rows.cosines[np.ix_(alive, alive)], norms, norms / m, radius)
        y, residual = problem.solve()
        v[alive] = y / norms
    else:
        residual = 0.0
    return Solution(v + 1.0 / m, promised("conflict_averse", residual, m))


class _Problem:
    """In lengths: the greatest t with Cy + b >= tδ, y >= 0, one of each pair zero, and yᵀCy = s², where b = Cx."""

    def __init__(self, C: Array, norms: Array, x: Array, radius: float) -> None:
        self.C = C
        self.b = C @ x
        self.delta = norms.min() / norms
        self.total = float(x.sum())
        squared = float(x @ self.b)
        self.s = radius * math.sqrt(squared) if squared > _CANCELLED * self.total**2 else 0.0

    def solve(self) -> tuple[Array, float]:
        """The multipliers, in lengths, and the residual: P_t is projected on for bounds of t that close in on it."""
        if self.s == 0.0:
            return np.zeros_like(self.b), 0.0
        y = self._nearest(0.0)
        if self._length(y) <= self.s:
            if cancelling(self.C).any():
                return y, self._residual(y, 0.0, inside=True)
            low, high = 0.0, float(((self.b + self.s) / self.delta).min())
        else:
            low, high = float((self.b / self.delta).min()), 0.0
        best = y, self._residual(y, 0.0)
        gains = self.b / self.delta
        for _ in range(100):
            z, t = self._piece(y > 0.0 if y.any() else gains == gains.min())
            best = min(best, (z, self._residual(z, t)), key=lambda found: found[1])
            if best[1] <= 4 * EPS:
                break
            if not low < t < high:
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

    def _residual(self, y: Array, t: float, inside: bool = False) -> float:
        slack = self.C @ y + self.b - t * self.delta
        off = self._length(y) - self.s
        worst = max(float(np.abs(np.minimum(y, slack)).max()), off if inside else abs(off))
        return worst / (self.total + float(y.sum()))

    def _length(self, y: Array) -> float:
        return math.sqrt(max(float(y @ self.C @ y), 0.0))

    def _nearest(self, t: float) -> Array:
        """The multipliers of the point of P_t nearest to the average."""
        Q = t * self.delta - self.b
        y: Array = complementary(self.C, Q[None], np.array([self.total]))[0][0]
        return y

    def _piece(self, free: npt.NDArray[np.bool_]) -> tuple[Array, float]:
        """The solution if these rows, and no others, have multipliers: y is linear in t, and the sphere gives t."""
        delta, b, block = self.delta[free], self.b[free], self.C[np.ix_(free, free)]
        sides = np.stack([delta, b], axis=1)
        rising, falling = np.linalg.lstsq(block, sides, rcond=1e-13)[0].T
        y, curvature, middle = np.zeros(len(free)), delta @ rising, b @ rising
        if curvature < 1e-12 * delta @ delta:  # these rows cancel, and have no t in common but 0
            return y, 0.0
        root = math.sqrt(max(middle**2 - curvature * (b @ falling - self.s**2), 0.0))
        t = float(middle + root) / curvature
        y[free] = np.maximum(t * rising - falling, 0.0)
        return y, t
