"""MoCo, arXiv 2210.12624, Algorithm 1, and the entry weights of least norm that give its direction."""

import itertools

import torch


def project(point):
    """On the simplex, by trying every support: the nearest candidate is the projection."""
    m = len(point)
    best, distance = None, None
    for size in range(1, m + 1):
        for support in itertools.combinations(range(m), size):
            shift = (sum(point[t] for t in support) - 1) / size
            candidate = torch.tensor([point[t] - shift if t in support else 0.0 for t in range(m)])
            if candidate.min() < -1e-15:
                continue
            gap = ((candidate - point) ** 2).sum()
            if best is None or gap < distance:
                best, distance = candidate, gap
    return best


def weights(steps, generators, tracking=0.5, step_size=0.1, ridge=0.0, form="paper"):
    history = []
    y = lam = None
    for k, step in enumerate(steps, start=1):
        J = step["jacobian"]
        m, n = J.shape
        if y is None:
            y, lam = torch.zeros(m, n, dtype=torch.float64), torch.full((m,), 1 / m, dtype=torch.float64)
        h = J
        if form == "official":
            h = torch.stack([step["losses"][t] * J[t] / J[t].norm() if J[t].any() else J[t] for t in range(m)])
        beta, gamma = tracking / k**0.5, step_size / k**0.5
        y = y - beta * (y - h)  # the tracking of each task's gradient
        descended = lam - gamma * ((y @ y.T + ridge * torch.eye(m)) @ lam)
        lam = project(descended) if form == "paper" else torch.softmax(descended, dim=0)
        d = y.T @ lam
        d = torch.where(d.abs() > 1e-14 * m * (y.T.abs() @ lam), d, 0.0)  # what cancels leaves rounding
        W = torch.zeros(m, n, dtype=torch.float64)
        for j in range(n):
            square = sum(J[t, j] ** 2 for t in range(m))
            for t in range(m):
                W[t, j] = d[j] * J[t, j] / square if square > 0 else 0.0
        history.append(W)
    return history
