"""MGDA, arXiv 1810.04650, eq. 3: min |Σ_t w_t g_t|² subject to Σ_t w_t = 1, w_t >= 0. By brute force over supports.

Where several weights give the same point, the one of least Σ_t w_t² |g_t|² is meant, which is ours: restricted to its
support it is the least-squares solution of least norm, so that the enumeration meets it.
"""

from itertools import combinations

import numpy as np
import torch


def weights(steps, generators):
    return [torch.from_numpy(shortest(step["gramian"].numpy())) for step in steps]


def shortest(G):
    m = len(G)
    norms = [G[t, t] ** 0.5 for t in range(m)]
    if min(norms) == 0:  # the zero vector is in the hull: zero gradients are the point, and share equally
        zero = np.array([float(norm == 0) for norm in norms])
        return zero / zero.sum()
    C = np.array([[G[t, u] / norms[t] / norms[u] for u in range(m)] for t in range(m)])
    d = np.array([min(norms) / norm for norm in norms])

    candidates = []
    for size in range(1, m + 1):
        for support in map(list, combinations(range(m), size)):
            # Stationarity and the constraint in the lengths z_t = w_t |g_t|: C z = λ d, <d, z> = 1.
            border = d[support, None]
            system = np.block([[C[np.ix_(support, support)], -border], [border.T, np.zeros((1, 1))]])
            solution = np.linalg.lstsq(system, np.array([0.0] * size + [1.0]), rcond=1e-12)[0][:-1]
            if (solution < 0).any() or not solution @ d[support] > 0:
                continue
            z = np.zeros(m)
            z[support] = solution / (solution @ d[support])
            # Optimal over the whole simplex iff <x, g_t> >= |x|² for all t.
            violation = max((z @ C @ z) * d[t] - (C @ z)[t] for t in range(m)) / z.sum()
            candidates.append((violation, z @ z, z * d))
    least = min(violation for violation, _, _ in candidates)
    optimal = [c for c in candidates if c[0] <= max(least, 1e-11)]
    return min(optimal, key=lambda c: c[1])[2]
