"""Geometric loss strategy, arXiv 1904.08492: the gradient, by autograd, of the geometric mean of the losses."""

import torch


def weights(steps, generators):
    history = []
    for step in steps:
        losses = step["losses"]
        losses = losses.mean(dim=1) if losses.ndim == 2 else losses
        positive = [t for t in range(len(losses)) if losses[t] > 0]  # ours: a loss of zero is left out
        variables = [losses[t].clone().requires_grad_() for t in positive]
        row = torch.zeros(len(losses), dtype=torch.float64)
        if positive:
            total = variables[0] ** (1 / len(positive))
            for variable in variables[1:]:
                total = total * variable ** (1 / len(positive))  # L_total = Π L_t^(1/n)
            for t, slope in zip(positive, torch.autograd.grad(total, variables), strict=True):
                row[t] = slope
        history.append(row)
    return history
