"""ReLoBRaLo, arXiv 2110.09813: the balance against an earlier step, the history with random lookback, their mixture."""

import torch


def balance(losses, before, temperature):
    m = len(losses)
    ratios = [losses[t] / (temperature * before[t]) if before[t] > 0 else 1 / temperature for t in range(m)]
    ratios = torch.tensor(ratios, dtype=torch.float64)
    e = torch.exp(ratios - ratios.max())
    return m * e / e.sum()  # λ_bal(k, k') = m softmax(L(k) / (T L(k')))


def weights(steps, generators, decay=0.999, temperature=1.0, memory=0.999):
    history = []
    seen = []
    for k, (step, generator) in enumerate(zip(steps, generators, strict=True)):
        losses = step["losses"]
        losses = (losses.mean(dim=1) if losses.ndim == 2 else losses).tolist()
        rho = float(torch.rand((), dtype=torch.float64, generator=generator).item() < memory)  # Bernoulli(E[ρ])
        if k == 0:
            row = torch.ones(len(losses), dtype=torch.float64)  # as the official code: α = 1, then α = 0
        elif k == 1:
            row = balance(losses, seen[-1], temperature)
        else:
            past = rho * history[-1] + (1 - rho) * balance(losses, seen[0], temperature)  # λ_hist
            row = decay * past + (1 - decay) * balance(losses, seen[-1], temperature)
        history.append(row)
        seen.append(losses)
    return history
