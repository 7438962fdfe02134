"""Krum and Multi-Krum, Blanchard et al., NeurIPS 2017, section 4; equal scores share."""

import torch

from tests.oracles._convex import rows_of


def weights(steps, generators, faulty=None, selected=1):
    history = []
    for step in steps:
        V = rows_of(step)
        n = len(V)
        f = faulty
        if f is None:
            f = max([f for f in range(n) if 2 * f + 2 < n], default=0)
        closest = n - f - 2 if n > 2 else n - 1
        scores = []
        for i in range(n):
            squares = sorted(float(((V[i] - V[j]) ** 2).sum()) for j in range(n) if j != i)
            scores.append(sum(squares[:closest]))
        tolerance = 1e-11 * max(float((v**2).sum()) for v in V) * n
        ranked = sorted(range(n), key=lambda i: scores[i])
        worst = scores[ranked[selected - 1]]
        sure = [i for i in range(n) if scores[i] < worst - tolerance]
        tied = [i for i in range(n) if abs(scores[i] - worst) <= tolerance]
        w = [0.0] * n
        for i in sure:
            w[i] = 1 / selected
        for i in tied:
            w[i] = (selected - len(sure)) / len(tied) / selected
        history.append(torch.tensor(w, dtype=torch.float64))
    return history
