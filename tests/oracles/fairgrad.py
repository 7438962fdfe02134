"""FairGrad, arXiv 2402.15638, eq. 4: G w = w^(-1/α), on vectors.

Damped Newton steps on the convex ½ |Jᵀ w|² - Σ ψ(w_i), ψ'(w) = w^(-1/α). Where a convex combination of gradients
vanishes there is no solution. The limit is meant: the step is orthogonal to all gradients that occur in such a
combination, and the others solve the equation with what is left of their gradients on that complement.
"""

import numpy as np
import torch

from tests.oracles._convex import coalition, rows_of


def weights(steps, generators, alpha=2.0):
    return [torch.from_numpy(fair(rows_of(step), alpha)) for step in steps]


def fair(J, alpha):
    m = len(J)
    w = np.zeros(m)
    cancel = coalition(J)
    alive = np.array([J[i].any() for i in range(m)])
    S = [i for i in range(m) if cancel[i] and alive[i]]
    rest = [i for i in range(m) if not cancel[i]]
    norms = np.linalg.norm(J, axis=1)
    basis = np.zeros((0, J.shape[1]))
    if S:
        _, sizes, directions = np.linalg.svd(J[S] / norms[S, None])
        basis = directions[: np.count_nonzero(sizes > 1e-9)]
    if rest:
        w[rest] = solve(J[rest] - J[rest] @ basis.T @ basis, alpha)
    if S:
        # Any weights that take the rest's part along the span away; and something that cancels, to make them positive.
        E = J[S] / norms[S, None]
        y = np.linalg.pinv(E.T, rcond=1e-9) @ -(w[rest] @ J[rest])
        _, sizes, null = np.linalg.svd(E.T)
        null = null[np.count_nonzero(sizes > 1e-9) :]
        least = norms[S] ** ((1 - alpha) / (1 + alpha))  # y_i = w_i |g_i| without any interaction
        z = null.T @ (null @ np.ones(len(S)))
        for _ in range(10_000):  # from the null space into the positive numbers, by turns
            z = null.T @ (null @ np.maximum(z, 1.0))
            if z.min() > 0.5:
                break
        w[S] = (y + ((least - y) / z).max() * z) / norms[S]
    return w


def solve(J, alpha):
    p = 1 / alpha
    unit = np.linalg.norm(J, axis=1).mean()
    G = (J / unit) @ (J / unit).T

    def value(w):
        return w @ G @ w / 2 - (np.log(w).sum() if p == 1 else (w ** (1 - p)).sum() / (1 - p))

    w = np.diag(G) ** (-1 / (1 + p))
    for _ in range(2000):
        slope = G @ w - w**-p
        step = np.linalg.solve(G + np.diag(p * w ** (-p - 1)), -slope)
        size = min(1.0, 0.9 / max((-step / w).max(), 0.9))
        decrease = -slope @ step
        if decrease < 1e-28:
            break
        while decrease > 1e-12 and value(w + size * step) > value(w) - 1e-4 * size * decrease:
            size /= 2
        w = w + size * step
    return w * unit ** (-2 / (1 + p))
