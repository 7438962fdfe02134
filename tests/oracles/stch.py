"""Smooth Tchebycheff scalarization, arXiv 2402.19078: gradients by autograd, of the paper's scalar and the code's."""

import torch


def numbers(values, m):
    if isinstance(values, dict):
        return torch.tensor([values[str(t)] for t in range(m)], dtype=torch.float64)
    if isinstance(values, (list, tuple)):
        return torch.tensor(values, dtype=torch.float64)
    return torch.full((m,), float(values), dtype=torch.float64)


def weights(steps, generators, smoothing=1.0, preference=None, ideal=0.0, form="paper", period=1):
    history = []
    first = []
    for step in steps:
        losses = step["losses"]
        losses = losses.mean(dim=1) if losses.ndim == 2 else losses
        m = len(losses)
        f = losses.clone().requires_grad_()
        if form == "paper":
            lam = numbers(1 / m if preference is None else preference, m)
            y = lam * (f - numbers(ideal, m))
            # g = μ log Σ exp(λ (f - z*) / μ), with the largest term taken out of the sum
            g = smoothing * torch.log(sum(torch.exp((y_t - y.max().detach()) / smoothing) for y_t in y))
        elif len(first) < period:
            g = sum(torch.log(f_t) for f_t in f)  # warm-up
            first.append(losses)
        else:
            nadir = sum(first) / len(first)
            logs = [torch.log(f_t / n_t) for f_t, n_t in zip(f, nadir, strict=True)]
            top = max(logs).detach()
            g = smoothing * torch.log(sum(torch.exp((x - top) / smoothing) for x in logs)) * m
        (slope,) = torch.autograd.grad(g, f)
        history.append(slope)
    return history
