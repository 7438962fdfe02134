"""Aligned-MTL, arXiv 2305.19000, Algorithm 1, with uniform task importance."""

import numpy as np
import torch


def weights(steps, generators, scale="min"):
    return [torch.from_numpy(aligned(step["gramian"].numpy(), scale)) for step in steps]


def aligned(G, scale):
    m = len(G)
    w = np.full(m, 1 / m)
    eigenvalues, V = np.linalg.eigh(G)  # 1: of GᵀG, where the paper's G has the gradients in columns
    pairs = [(eigenvalues[k], V[:, k]) for k in reversed(range(m))]
    tolerance = m * 2.0**-23 * pairs[0][0]  # the official code's, with float32's rounding
    pairs = [(value, v) for value, v in pairs if value > tolerance]
    if not pairs:
        return w
    lambdas = [value for value, _ in pairs]
    sigma = {"min": lambdas[-1], "rmse": sum(lambdas) / len(lambdas)}.get(
        scale, sorted(lambdas)[(len(lambdas) - 1) // 2]
    )
    B = sum(np.sqrt(sigma / value) * np.outer(v, v) for value, v in pairs)  # 2: B = sqrt(λ_R) V Σ⁻¹ Vᵀ
    alpha = B @ w  # 3: α = B w
    return np.where(np.abs(alpha) > 1e-13 * np.abs(B) @ w, alpha, 0.0)  # what cancels leaves rounding
