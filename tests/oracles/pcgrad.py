"""PCGrad, arXiv 2001.06782, Algorithm 1, on vectors.

The weights are the coefficients of the result in the gradients, written down while the vectors change.
"""

import torch


def weights(steps, generators):
    history = []
    for step, generator in zip(steps, generators, strict=True):
        g = step["jacobian"] if "jacobian" in step else factor(step["gramian"])
        m = len(g)
        keys = torch.rand(m, m, dtype=torch.float64, generator=generator)
        total = torch.zeros(m, dtype=torch.float64)
        for i in range(m):
            g_pc = g[i].clone()  # line 2: g_k^PC <- g_k
            coefficients = [float(k == i) for k in range(m)]
            for j in sorted((j for j in range(m) if j != i), key=lambda j: keys[i, j].item()):  # line 4: random order
                inner = float(g_pc @ g[j])
                if inner < 0:  # line 5
                    share = inner / float(g[j] @ g[j])
                    g_pc = g_pc - share * g[j]  # line 7
                    coefficients[j] -= share
            total += torch.tensor(coefficients, dtype=torch.float64)  # line 8: Δθ = Σ_i g_i^PC
        history.append(total)
    return history


def factor(gramian):
    """Vectors with these inner products: of the cosines by eigenvalues, then scaled to their norms."""
    norms = gramian.diagonal().sqrt()
    unit = torch.where(norms > 0, norms, 1.0)
    values, vectors = torch.linalg.eigh(gramian / unit / unit[:, None])
    return norms[:, None] * (vectors * values.clamp(min=0).sqrt())
