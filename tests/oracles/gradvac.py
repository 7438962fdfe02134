"""GradVac, arXiv 2010.05874, Algorithm 1 for the whole model, on vectors.

The weights are the coefficients of the result in the gradients, written down while the vectors change.
"""

import torch

from tests.oracles.pcgrad import factor


def weights(steps, generators, rate=0.01):
    history = []
    target = None
    for step, generator in zip(steps, generators, strict=True):
        g = step["jacobian"] if "jacobian" in step else factor(step["gramian"])
        m = len(g)
        if target is None:
            target = [[0.0] * m for _ in range(m)]
        keys = torch.rand(m, m, dtype=torch.float64, generator=generator)
        total = torch.zeros(m, dtype=torch.float64)
        for i in range(m):
            g_vac = g[i].clone()
            coefficients = [float(k == i) for k in range(m)]
            for j in sorted((j for j in range(m) if j != i), key=lambda j: keys[i, j].item()):
                length, other = float(g_vac.norm()), float(g[j].norm())
                size = sum(abs(c) * float(g[k].norm()) for k, c in enumerate(coefficients))
                if other == 0 or length <= 1e-7 * size:
                    continue  # no cosine
                phi = max(-1.0, min(1.0, float(g_vac @ g[j]) / (length * other)))
                hat = target[i][j]
                if phi < hat:
                    share = length * (hat * (1 - phi**2) ** 0.5 - phi * (1 - hat**2) ** 0.5)
                    share /= other * (1 - hat**2) ** 0.5
                    g_vac = g_vac + share * g[j]
                    coefficients[j] += share
                hat = (1 - rate) * hat + rate * phi
                target[i][j] = max(-1 + 1e-12, min(1 - 1e-12, hat))
            total += torch.tensor(coefficients, dtype=torch.float64)
        history.append(total)
    return history
