"""DB-MTL, arXiv 2308.12029, Algorithm 1, and the entry weights of least norm that give its direction."""

import torch


def weights(steps, generators, tracking=0.9, fading=0.0, logarithm=True):
    history = []
    g_hat = None
    for k, step in enumerate(steps, start=1):
        J = step["jacobian"]
        m, n = J.shape
        if g_hat is None:
            g_hat = torch.zeros(m, n, dtype=torch.float64)
        g = J.clone()
        if logarithm:
            for t in range(m):  # the gradient of log l_t
                g[t] = J[t] / step["losses"][t] if step["losses"][t] > 0 else 0.0
        beta = tracking / k**fading
        g_hat = beta * g_hat + (1 - beta) * g
        alpha = max(float(g_hat[t].norm()) for t in range(m))
        d, size = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
        for t in range(m):
            if g_hat[t].any():
                d = d + alpha * g_hat[t] / g_hat[t].norm()
                size = size + alpha * g_hat[t].abs() / g_hat[t].norm()
        d = torch.where(d.abs() > 1e-14 * m * size, d, 0.0)  # what cancels leaves rounding
        W = torch.zeros(m, n, dtype=torch.float64)
        for j in range(n):
            square = sum(J[t, j] ** 2 for t in range(m))
            for t in range(m):
                W[t, j] = d[j] * J[t, j] / square if square > 0 else 0.0
        history.append(W)
    return history
