"""UPGrad, arXiv 2406.16232, eq. 4: the mean of the projections of all rows on the dual cone, by brute force."""

import numpy as np
import torch

from tests.oracles._convex import cone_weights, rows_of


def weights(steps, generators):
    history = []
    for step in steps:
        J = rows_of(step)
        m = len(J)
        history.append(torch.from_numpy(sum(cone_weights(J, np.eye(m)[[i]] / m)[0] for i in range(m))))
    return history
