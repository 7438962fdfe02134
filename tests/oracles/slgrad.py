"""SLGrad, arXiv 2306.04519, as its official code has it: clamp the alignments at 0, divide by their total."""

import torch


def weights(steps, generators, main="0", scope="shared", learn_reference=False, total=1.0):
    history = []
    for step in steps:
        alignment = step["alignment"]  # <∇ℓ[t, i], ∇L_ref>
        m, b = alignment.shape
        helpful = [[max(0.0, float(alignment[t, i])) for i in range(b)] for t in range(m)]
        sum_ = sum(helpful[t][i] for t in range(m) for i in range(b))
        rows = [[total * helpful[t][i] / sum_ if sum_ > 0 else 0.0 for i in range(b)] for t in range(m)]
        history.append(torch.tensor(rows, dtype=torch.float64))
    return history
