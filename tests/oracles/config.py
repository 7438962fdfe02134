"""ConFIG, arXiv 2408.11104, eq. 2 and 3, on vectors, as its official code has them."""

import numpy as np
import torch

from tests.oracles._convex import rows_of


def weights(steps, generators):
    history = []
    for step in steps:
        J = rows_of(step)
        norms = np.linalg.norm(J, axis=1, keepdims=True)
        units = np.divide(J, norms, out=np.zeros_like(J), where=norms > 0)
        inverse = np.linalg.pinv(units, rcond=1e-7)
        best = inverse @ np.ones(len(J))
        if np.linalg.norm(best) < 1e-7:
            history.append(torch.zeros(len(J), dtype=torch.float64))
            continue
        unit = best / np.linalg.norm(best)
        step_taken = (J @ unit).sum() * unit
        # Its coefficients in the gradients: those of least length in the unit ones.
        coefficients = np.linalg.pinv(units.T, rcond=1e-7) @ step_taken
        history.append(
            torch.from_numpy(np.divide(coefficients, norms[:, 0], out=0 * coefficients, where=norms[:, 0] > 0))
        )
    return history
