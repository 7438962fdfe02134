"""FAMO, arXiv 2306.03792, Algorithm 1. A step may have ``after``, the losses after the step, beside ``losses``."""

import torch


def weights(steps, generators, step_size=0.025, decay=1e-3, ideal=0.0, epsilon=0.0, rule="adam"):
    history = []
    m = len(steps[0]["losses"])
    xi = torch.zeros(m, dtype=torch.float64)  # line 2: ξ_1 <- 0
    # One Adam a logit, since a task at its bound rests
    parts = [torch.zeros(1, dtype=torch.float64) for _ in range(m)]
    optimizers = [torch.optim.Adam([part], lr=step_size, weight_decay=decay) for part in parts]
    for step in steps:
        losses = step["losses"]
        losses = (losses.mean(dim=1) if losses.ndim == 2 else losses) - ideal + epsilon
        z = torch.exp(xi) / torch.exp(xi).sum()  # line 4
        above = [t for t in range(m) if losses[t] > 0]  # ours: at the bound, no logarithm
        row = torch.zeros(m, dtype=torch.float64) if above else z
        for t in above:
            c = 1 / sum(z[u] / losses[u] for u in above)  # line 5
            row[t] = c * z[t] / losses[t]
        history.append(row)

        after = step.get("after")
        if after is None:
            continue
        after = after - ideal + epsilon
        moved = [t for t in above if after[t] > 0]
        if not moved:
            continue
        variable = xi[moved].clone().requires_grad_()
        change = torch.stack([torch.log(losses[t]) - torch.log(after[t]) for t in moved])
        (delta,) = torch.autograd.grad((torch.softmax(variable, dim=0) * change).sum(), variable)
        for t, slope in zip(moved, delta, strict=True):  # line 6: δ = (∇ z)^T (log ℓ_t - log ℓ_{t+1})
            if rule == "gradient":
                xi[t] = xi[t] - step_size * (slope + decay * xi[t])
            else:
                parts[t].grad = slope.reshape(1)
                optimizers[t].step()
                xi[t] = parts[t].item()
    return history
