"""PCD, arXiv 2606.29521, Algorithm 1: every working set of constraints, the smallest first (its appendix B.2)."""

import numpy as np
import torch

from tests.oracles._convex import rows_of, subsets


def weights(steps, generators, main=0, progress=0.02, decay=0.999, epsilon=0.0):
    history = []
    v = None
    for t, step in enumerate(steps, start=1):
        J = rows_of(step)
        K = len(J)
        squares = (J**2).sum(axis=1)
        v = (np.zeros(K) if v is None else decay * v) + (1 - decay) * squares  # Definition 4.5
        usual = np.sqrt(v / (1 - decay**t) + epsilon)
        s = np.divide(1.0, usual, out=np.zeros(K), where=usual > 0)
        w = np.zeros(K)
        if squares[main] > 0:
            h = s[:, None] * J
            mu = multipliers(h, main, progress)
            direction = mu @ h
            length = np.linalg.norm(direction)
            if length > 1e-7 * (mu * np.linalg.norm(h, axis=1)).sum():
                w = mu * s * np.sqrt(squares[main]) / length
        history.append(torch.from_numpy(w))
    return history


def multipliers(h, main, progress):
    """Of Definition 4.1, with 1 for the main task: Theorem 4.2."""
    K = len(h)
    squares = (h**2).sum(axis=1)
    others = [j for j in range(K) if j != main and squares[j] > 0]
    e_main = np.eye(K)[main]
    for chosen in subsets(len(others)):
        A = [others[k] for k in chosen]
        mu = e_main.copy()
        if A:
            unit = h[A] / np.sqrt(squares[A])[:, None]
            if np.linalg.eigvalsh(unit @ unit.T)[0] < 1e-9:
                continue
            mu[A] = np.linalg.solve(h[A] @ h[A].T, progress * squares[A] - h[A] @ h[main])
        d = mu @ h
        short = [progress * squares[j] - h[j] @ d for j in others]
        if mu.min() >= -1e-9 and all(gap <= 1e-9 * max(squares) for gap in short):
            return np.maximum(mu, 0.0)
    return e_main  # the constraints exclude each other
