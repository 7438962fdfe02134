"""CAGrad, arXiv 2110.14048, Algorithm 1, on vectors: min <g_p, g_0> + c |g_0| |g_p| over the simplex, by brute force.

On each support S the Lagrange conditions say that <g_i, g_0 + λ g_p> is one number t for i in S, and λ |g_p| = c |g_0|:
with v = λ p, J_S J_Sᵀ v = t - J_S g_0 is linear in t, and the norm gives t. The greatest t whose d = g_0 + J_Sᵀ v has
<g_i, d> >= t for all i, and v >= 0, is the solution. Where a convex combination vanishes and t = 0, this has no slope
to follow; of all d in the ball that harm nobody, the one nearest to g_0 is meant.
"""

import numpy as np
import torch

from tests.oracles._convex import coalition, cone_weights, rows_of, subsets


def weights(steps, generators, radius=0.4, rescale=0):
    history = []
    for step in steps:
        J = rows_of(step)
        w = 1 / len(J) + multipliers(J, radius)
        history.append(torch.from_numpy(w / {0: 1, 1: 1 + radius**2, 2: 1 + radius}[rescale]))
    return history


def multipliers(J, radius):
    m = len(J)
    alive = [i for i in range(m) if J[i].any()]  # a zero gradient would hold the minimum at 0
    g_0 = J.mean(axis=0)
    ball = radius * np.linalg.norm(g_0)
    v = np.zeros(m)
    scale = np.linalg.norm(J, axis=1).max(initial=0.0)
    if not alive or ball <= 1e-9 * scale:
        return v
    K = J[alive]
    nearest = cone_weights(K, np.full((1, len(K)), 1 / m))[0] - 1 / m
    if coalition(K).any() and np.linalg.norm(nearest @ K) <= ball:
        v[alive] = nearest
        return v
    found = []
    for support in subsets(len(K), least=1):
        norms = np.linalg.norm(K[support], axis=1)
        E = K[support] / norms[:, None]
        inverse = np.linalg.pinv(E @ E.T, rcond=1e-10)
        slope, offset = inverse @ (1 / norms), inverse @ (E @ g_0)  # lengths: y = t slope - offset
        a, b, c = (slope @ E) @ (slope @ E), (slope @ E) @ (offset @ E), (offset @ E) @ (offset @ E) - ball**2
        for sign in (1, -1):
            t = (b + sign * np.sqrt(max(b * b - a * c, 0.0))) / max(a, 1e-300)
            y = t * slope - offset
            d = g_0 + y @ E
            slack = (K @ d - t) / np.linalg.norm(K, axis=1)
            unit = scale + np.abs(y).sum()
            violation = max(-y.min(), -slack.min(), abs(slack[support]).max(), abs(np.linalg.norm(y @ E) - ball)) / unit
            if violation <= 1e-9:
                found.append((round(t / scale**2, 12), -y @ y, support, y / norms))
    _, _, support, y = max(found, key=lambda each: each[:2])
    v[[alive[i] for i in support]] = y
    return v
