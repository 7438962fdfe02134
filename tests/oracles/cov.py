"""CoV-Weighting, arXiv 2009.01717, section 3, with means and standard deviations taken over the whole history."""

import torch


def weights(steps, generators, variance_floor=0.0):
    history = []
    losses, ratios = [], []
    for step in steps:
        now = step["losses"]
        now = (now.mean(dim=1) if now.ndim == 2 else now).tolist()
        m = len(now)
        k = len(losses)
        if k < 2:
            row = [1 / m] * m
        else:
            c = []
            for t in range(m):
                r = [ratio[t] for ratio in ratios]
                mean = sum(r) / k
                variance = sum((x - mean) ** 2 for x in r) / k
                c.append((variance + variance_floor) ** 0.5 / mean)  # c_l = σ_l / μ_l
            row = [c_t / sum(c) if sum(c) > 0 else 1 / m for c_t in c]  # α = c / z
        history.append(torch.tensor(row, dtype=torch.float64))
        means = [sum(row[t] for row in losses) / k for t in range(m)] if k else now  # μ_L up to the last step
        ratios.append([now[t] / means[t] if means[t] > 0 else 1.0 for t in range(m)])  # l = L / μ_L
        losses.append(now)
    return history
