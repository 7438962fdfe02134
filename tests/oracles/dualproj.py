"""DualProj, arXiv 2406.16232, section 4: the projection of the mean of the rows on the dual cone, by brute force."""

import numpy as np
import torch

from tests.oracles._convex import cone_weights, rows_of


def weights(steps, generators):
    history = []
    for step in steps:
        J = rows_of(step)
        history.append(torch.from_numpy(cone_weights(J, np.full((1, len(J)), 1 / len(J)))[0]))
    return history
