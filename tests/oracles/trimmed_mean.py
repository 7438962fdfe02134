"""Coordinate-wise trimmed mean, arXiv 1803.01498, definition 2: which values are averaged, entry by entry."""

import math

import torch


def weights(steps, generators, fraction=0.1):
    history = []
    for step in steps:
        J = step["jacobian"]
        m, n = J.shape
        k = min(math.ceil(round(fraction * m, 9)), (m - 1) // 2)
        W = torch.zeros(m, n, dtype=torch.float64)
        for j in range(n):
            column = J[:, j].tolist()
            places = sorted(range(m), key=lambda t: column[t])[k : m - k]  # without the k smallest and the k largest
            for t in range(m):
                alike = [u for u in range(m) if column[u] == column[t]]
                W[t, j] = sum(u in places for u in alike) / len(alike) / (m - 2 * k)  # equal values share
        history.append(W)
    return history
