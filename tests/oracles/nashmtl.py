"""Nash-MTL, arXiv 2202.01017, Claim 3.1: G α = 1 / α. With the official code's clipping.

See the oracle of FairGrad, whose equation this is for α = 1, also for what is meant where there is no solution.
"""

import numpy as np
import torch

from tests.oracles._convex import rows_of
from tests.oracles.fairgrad import fair


def weights(steps, generators, max_norm=None):
    history = []
    for step in steps:
        J = rows_of(step)
        alpha = fair(J, 1.0)
        norm = np.linalg.norm(alpha @ J)
        if max_norm is not None and norm > max_norm:
            alpha = alpha * max_norm / norm
        history.append(torch.from_numpy(alpha))
    return history
