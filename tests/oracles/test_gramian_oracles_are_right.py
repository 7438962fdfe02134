"""The oracles of the exactly solved methods on cases worked by hand."""

import math

import pytest
import torch

from tests.oracles import cagrad, config, dualproj, fairgrad, imtlg, nashmtl, upgrad

ROOT = math.sqrt(0.5)


def weights(oracle, rows, **hyperparameters):
    J = torch.tensor(rows, dtype=torch.float64)
    (from_rows,) = oracle.weights([{"jacobian": J}], [None], **hyperparameters)
    (from_gramian,) = oracle.weights([{"gramian": J @ J.T}], [None], **hyperparameters)
    torch.testing.assert_close(from_gramian @ J, from_rows @ J, atol=1e-6, rtol=1e-6)
    return from_rows.tolist()


@pytest.mark.parametrize(
    ("oracle", "hyperparameters", "rows", "expected"),
    [
        # g_1 = (1, 0) and g_2 = (-1, 1) conflict: projected, they are (1/2, 1/2) and (0, 1).
        (upgrad, {}, [[1.0, 0.0], [-1.0, 1.0]], [1.0, 0.75]),
        (upgrad, {}, [[3.0, 0.0], [0.0, 1.0]], [0.5, 0.5]),
        (upgrad, {}, [[3.0], [-1.0]], [2 / 3, 2.0]),  # both give up all they have
        # The mean (0, 1/2) harms nobody; that of (1, 0) and (-2, √5) harms the first, by 1/2.
        (dualproj, {}, [[1.0, 0.0], [-1.0, 1.0]], [0.5, 0.5]),
        (dualproj, {}, [[1.0, 0.0], [-2.0, math.sqrt(5)]], [1.0, 0.5]),
        # The mean is (1/2, 1/2), and the worst-off of d is best off on the diagonal: (1 + c) times the mean.
        (cagrad, {"radius": 0.5}, [[1.0, 0.0], [0.0, 1.0]], [0.75, 0.75]),
        (cagrad, {"radius": 0.5, "rescale": 1}, [[1.0, 0.0], [0.0, 1.0]], [0.6, 0.6]),
        (cagrad, {"radius": 0.5, "rescale": 2}, [[1.0, 0.0], [0.0, 1.0]], [0.5, 0.5]),
        (cagrad, {"radius": 0.5}, [[3.0], [-1.0]], [0.5, 1.0]),  # from 1 as far towards 0 as the ball goes
        (cagrad, {"radius": 2.0}, [[3.0], [-1.0]], [0.5, 1.5]),
        # Orthogonal: w_i = |g_i|^(-2α / (1+α)). Equal: 2 w = w^(-1/α).
        (nashmtl, {}, [[2.0, 0.0], [0.0, 0.5]], [0.5, 2.0]),
        (nashmtl, {}, [[1.0], [1.0]], [ROOT, ROOT]),
        (nashmtl, {"max_norm": 1.0}, [[2.0, 0.0], [0.0, 0.5]], [0.5 * ROOT, 2.0 * ROOT]),
        (nashmtl, {}, [[2.0, 0.0], [-1.0, 0.0], [0.0, 4.0]], [0.5, 1.0, 0.25]),  # the first two cancel
        (fairgrad, {}, [[8.0, 0.0], [0.0, 1.0]], [1 / 16, 1.0]),
        (fairgrad, {"alpha": 0.5}, [[8.0, 0.0], [0.0, 1.0]], [1 / 4, 1.0]),
        (fairgrad, {}, [[1.0], [1.0]], [2 ** (-2 / 3)] * 2),
        # Equal projections: 2 w_1 = 0.5 w_2.
        (imtlg, {}, [[2.0, 0.0], [0.0, 0.5]], [0.2, 0.8]),
        (imtlg, {}, [[1.0], [-3.0]], [0.75, 0.25]),
        (imtlg, {"normalization": "absolute"}, [[2.0, 0.0], [0.0, 0.5]], [0.2, 0.8]),
        (imtlg, {}, [[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]], [0.0, 0.0, 0.0]),  # 1 - 2 + 1 = 0: no scale sums to one
        # e is the diagonal; the projections are √2 and √2/4 long.
        (config, {}, [[2.0, 0.0], [0.0, 0.5]], [0.625, 2.5]),
        (config, {}, [[1.0], [-3.0]], [0.0, 0.0]),
    ],
)
def test_cases_by_hand(oracle, hyperparameters, rows, expected):
    assert weights(oracle, rows, **hyperparameters) == pytest.approx(expected, abs=1e-9)
