"""COSMOS, arXiv 2103.13392: the gradient, by autograd, of r·L - λ cos(r, L)."""

import torch


def weights(steps, generators, preference=None, penalty=2.0):
    history = []
    for step in steps:
        losses = step["losses"]
        losses = losses.mean(dim=1) if losses.ndim == 2 else losses
        m = len(losses)
        given = preference() if callable(preference) else preference
        r = [1 / m] * m if given is None else [given[str(t)] for t in range(m)] if isinstance(given, dict) else given
        r = torch.tensor(r, dtype=torch.float64)
        f = losses.clone().requires_grad_()
        linear = sum(r[t] * f[t] for t in range(m))
        if losses.any():
            cosine = linear / (sum(x**2 for x in r).sqrt() * sum(x**2 for x in f).sqrt())
            linear = linear - penalty * cosine
        (slope,) = torch.autograd.grad(linear, f)
        history.append(slope)
    return history
