"""Gradient sign dropout, arXiv 2010.06808, eq. 1 and Algorithm 1, on each entry of the parameters' gradients."""

import torch


def weights(steps, generators, leak=0.0):
    history = []
    for step, generator in zip(steps, generators, strict=True):
        J = step["jacobian"]
        m, n = J.shape
        U = torch.rand(n, dtype=torch.float64, generator=generator).tolist()  # Algorithm 1: U ~ U(0, 1)
        W = torch.zeros(m, n, dtype=torch.float64)
        for k in range(n):
            column = J[:, k].tolist()
            size = sum(abs(g) for g in column)
            P = 0.5 * (1 + sum(column) / size) if size > 0 else 0.5  # eq. 1
            for t in range(m):
                # Algorithm 1: M = I[f(P) > U] I[g > 0] + I[f(P) < U] I[g < 0]; U = P, of probability 0, goes with g < 0
                M = float((U[k] < P and column[t] > 0) or (U[k] >= P and column[t] < 0))
                W[t, k] = leak + (1 - leak) * M if column[t] != 0 else 1.0  # (ℓ + (1 - ℓ) M) g; of g = 0, any
        history.append(W)
    return history
