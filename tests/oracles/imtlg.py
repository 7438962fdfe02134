"""IMTL-G, ICLR 2021, section 3.1, on vectors: α_{2:T} = g_1 Uᵀ (D Uᵀ)⁻¹ with D = g_1 - g_t and U = u_1 - u_t.

The closed form needs independent gradients. For dependent ones the limit is meant: if no nonzero vector has equal
projections on all unit rows, the combination that vanishes with the coefficients (in lengths) nearest to one; otherwise
the pseudo-inverse.
"""

import numpy as np
import torch

from tests.oracles._convex import rows_of


def weights(steps, generators, normalization="sum"):
    return [torch.from_numpy(impartial(rows_of(step), normalization)) for step in steps]


def impartial(J, normalization):
    m = len(J)
    norms = np.linalg.norm(J, axis=1)
    alive = [i for i in range(m) if norms[i] > 0]
    alpha = np.zeros(m)
    if not alive:
        return alpha + 1 / m
    g = J[alive]
    u = g / norms[alive, None]
    directions, sizes, _ = np.linalg.svd(u)
    rank = np.count_nonzero(sizes > 1e-7)
    if rank == len(alive):
        D, U = g[0] - g[1:], u[0] - u[1:]
        try:
            rest = g[0] @ U.T @ np.linalg.inv(D @ U.T)
        except np.linalg.LinAlgError:
            rest = np.full(len(alive) - 1, np.inf)
        v = np.array([1 - rest.sum(), *rest])
        if np.isfinite(v).all() and np.abs(v).sum() < 1e6:
            if normalization == "absolute":
                v = v * np.sign((v @ g) @ u[0]) / np.abs(v).sum()
            alpha[alive] = v
            return alpha
    one = np.ones(len(alive))
    null = directions[:, rank:]
    cancels = null @ (null.T @ one)
    y = cancels if np.linalg.norm(cancels) > 1e-6 else np.linalg.pinv(u @ u.T, rcond=1e-10) @ one
    v = y / norms[alive]
    if normalization == "absolute":
        alpha[alive] = v / np.abs(v).sum()
    elif abs(v.sum()) > 1e-8 * np.abs(v).sum():
        alpha[alive] = v / v.sum()
    return alpha
