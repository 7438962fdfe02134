"""What the oracles share: supports by brute force, in float64 on small vectors."""

from itertools import combinations

import numpy as np


def vectors(gramian):
    """Rows with these inner products: of the cosines by eigenvalues, then scaled to their norms."""
    G = np.asarray(gramian, dtype=np.float64)
    norms = np.sqrt(np.diag(G))
    unit = np.where(norms > 0, norms, 1.0)
    values, directions = np.linalg.eigh(G / unit / unit[:, None])
    return norms[:, None] * (directions * np.sqrt(np.maximum(values, 0.0)))


def rows_of(step):
    return step["jacobian"].numpy() if "jacobian" in step else vectors(step["gramian"].numpy())


def subsets(m, least=0):
    for size in range(least, m + 1):
        yield from map(list, combinations(range(m), size))


def cone_weights(J, U):
    """For each u the v >= u of least |Jᵀ v|: of all supports of v - u, the one with the right signs.

    2406.16232, Proposition 1: Jᵀ v is the projection of Jᵀ u on {d: J d >= 0}.
    """
    norms = np.linalg.norm(J, axis=1)
    E = J / np.where(norms > 0, norms, 1.0)[:, None]
    C = E @ E.T
    X = U * norms
    best = [(np.inf, np.inf, None)] * len(X)
    for support in subsets(len(J)):
        Y = np.zeros_like(X)
        if support:
            Y[:, support] = -(X @ C)[:, support] @ np.linalg.pinv(C[np.ix_(support, support)], rcond=1e-10)
        for i, (x, y) in enumerate(zip(X, Y, strict=True)):
            violation = max(0.0, -y.min(), -((x + y) @ C).min())
            if violation <= 1e-9 * max(1e-300, np.abs(x + y).sum() + np.abs(x).sum()) and y @ y < best[i][1]:
                best[i] = (violation, y @ y, y)
    Y = np.array([y for _, _, y in best])
    return U + Y / np.where(norms > 0, norms, 1.0)


def coalition(J):
    """Rows that occur in a vanishing combination with nonnegative coefficients.

    Such a combination is a sum of elementary ones, whose rows are dependent while no proper subset is.
    """
    norms = np.linalg.norm(J, axis=1)
    E = J / np.where(norms > 0, norms, 1.0)[:, None]
    found = norms == 0
    for support in subsets(len(J), least=2):
        if (norms[support] == 0).any():
            continue
        _, sizes, null = np.linalg.svd(E[support].T)
        sizes = np.concatenate([sizes, np.zeros(len(support) - len(sizes))])
        if np.count_nonzero(sizes < 1e-9) == 1:
            z = null[-1] * np.sign(null[-1].sum())
            if z.min() > 1e-9:
                found[support] = True
    return found
