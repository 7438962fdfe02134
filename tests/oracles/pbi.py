"""PBI, MOEA/D (2007), for minimisation: the gradient, by autograd, of d1 + θ d2."""

import torch


def weights(steps, generators, penalty=5.0, preference=1.0, ideal=0.0):
    history = []
    for step in steps:
        losses = step["losses"]
        losses = losses.mean(dim=1) if losses.ndim == 2 else losses
        m = len(losses)
        direction = [preference[str(t)] for t in range(m)] if isinstance(preference, dict) else [preference] * m
        direction = torch.tensor(direction, dtype=torch.float64)
        direction = direction / sum(x**2 for x in direction).sqrt()
        z = torch.tensor([ideal[str(t)] for t in range(m)] if isinstance(ideal, dict) else [ideal] * m)
        f = losses.clone().requires_grad_()
        d1 = sum((f[t] - z[t]) * direction[t] for t in range(m))
        aside = [f[t] - z[t] - d1 * direction[t] for t in range(m)]
        total = d1
        if sum(x.detach() ** 2 for x in aside).sqrt() > 1e-14 * losses.abs().max():  # at the kink: the subgradient 0
            total = d1 + penalty * sum(x**2 for x in aside).sqrt()
        (slope,) = torch.autograd.grad(total, f)
        history.append(slope)
    return history
