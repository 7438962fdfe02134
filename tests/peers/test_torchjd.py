"""TorchJD's aggregators, version 0.18.0: the same steps as ours, or a row says who is right and shows the evidence."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtlweight import (
    IMTLG,
    MGDA,
    CAGrad,
    ConFIG,
    Constant,
    DualProj,
    Equal,
    FairGrad,
    GradDrop,
    NashMTL,
    PCGrad,
    UPGrad,
    View,
)
from mtlweight._statistics import Given

peer = pytest.importorskip("torchjd.aggregation")
for solver in ("cvxpy", "ecos", "clarabel", "qpsolvers", "quadprog", "scipy"):
    pytest.importorskip(solver)  # torchjd[full]

EXACT = pytest.importorskip("torchjd.linalg").QuadprogProjector(
    norm_eps=0.0, reg_eps=0.0
)  # without the table's constants


def f64(rows):
    return torch.tensor(rows, dtype=torch.float64)


def steps(ours, theirs, J):
    """Both steps, [n]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cvxpy's about its own speed
        found = theirs(J)
    weights = ours(jacobian=J)
    return (weights * J).sum(0) if weights.ndim == 2 else weights @ J, found


@st.composite
def jacobians(draw, rows=(2, 3, 5)):
    """Independent rows of moderate scale."""
    m = draw(st.sampled_from(rows))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = m + draw(st.integers(2, 20))
    return torch.from_numpy(rng.standard_normal((m, n)) * 10 ** rng.uniform(-1, 1, (m, 1)))


AGREE = {
    "Equal": (Equal(), peer.Sum()),
    "UPGrad": (UPGrad(), peer.UPGrad(projector=EXACT)),
    "DualProj": (DualProj(), peer.DualProj(projector=EXACT)),
    "UPGrad with a preference": (Constant([2.0, 0.5]) >> UPGrad(), peer.UPGrad(f64([1.0, 0.25]), projector=EXACT)),
    "DualProj with a preference": (
        Constant([2.0, 0.5]) >> DualProj(),
        peer.DualProj(f64([1.0, 0.25]), projector=EXACT),
    ),
    "IMTLG": (IMTLG(), peer.IMTLG()),
    "FairGrad": (FairGrad(), peer.FairGrad(alpha=2.0)),
    "FairGrad with alpha 1": (FairGrad(alpha=1.0), peer.FairGrad(alpha=1.0)),
    "FairGrad with alpha 1 is NashMTL": (NashMTL(), peer.FairGrad(alpha=1.0)),
    "ConFIG": (ConFIG(), peer.ConFIG()),
    "MGDA of two rows": (MGDA(), peer.MGDA()),
    "Constant": (Constant([2.0, -0.5]), peer.Constant(f64([2.0, -0.5]))),
    "Mean": (Constant(0.5), peer.Mean()),
}
OF_TWO = {name for name in AGREE if "preference" in name or "two" in name or name in {"Constant", "Mean"}}


@pytest.mark.parametrize("name", AGREE)
@settings(max_examples=40)
@given(data=st.data())
def test_the_steps_agree(name, data):
    J = data.draw(jacobians((2,) if name in OF_TWO else (2, 3, 5)))
    ours, theirs = steps(*AGREE[name], J)
    assert torch.linalg.vector_norm(ours - theirs) <= 1e-5 * torch.linalg.vector_norm(theirs)


@settings(max_examples=25)
@given(jacobians())
def test_pcgrad_agrees_when_it_draws_the_same_orders(J):
    m = len(J)
    keys = torch.rand(m, m, dtype=torch.float64, generator=View(Given(jacobian=J)).generator)
    orders = iter(keys.fill_diagonal_(2.0).argsort(dim=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randperm", lambda _: next(orders))
        ours, theirs = steps(PCGrad(), peer.PCGrad(), J)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-9)


@settings(max_examples=25)
@given(jacobians(), st.sampled_from([0.0, 0.3]))
def test_graddrop_agrees_when_it_draws_the_same_numbers(J, leak):
    drawn = torch.rand(J.shape[1], dtype=torch.float64, generator=View(Given(jacobian=J)).generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *_, **__: drawn)
        theirs = peer.GradDrop(leak=torch.full((len(J),), leak, dtype=torch.float64))(J)
    ours = (GradDrop(leak=leak)(jacobian=J) * J).sum(0)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-9)


@settings(max_examples=40)
@given(jacobians(), st.sampled_from([0.1, 0.4, 0.9]))
def test_cagrad_agrees_as_far_as_the_interior_point_goes(J, radius):
    # Stopped at 1e-8 in the objective, which leaves the root of that in the step; ours is never worse.
    ours, theirs = steps(CAGrad(radius=radius), peer.CAGrad(c=radius), J)
    mean = J.mean(0)
    assert torch.linalg.vector_norm(ours - theirs) <= 2e-3 * torch.linalg.vector_norm(mean)
    inside = radius * torch.linalg.vector_norm(mean)
    for step in (ours, theirs):
        assert torch.linalg.vector_norm(step - mean) <= inside * (1 + 1e-9)
    assert (J @ ours).min() >= (J @ theirs).min() - 1e-9 * J.norm(dim=1).min() * inside


# Who is right where the steps differ.


def conflict(J, d, _):
    """How far the worst-off task's loss rises, relative to its gradient and the step."""
    return float((-(J @ d) / J.norm(dim=1) / (d.norm() + 1e-300)).max())


def distance_to_projection(J, d, _):
    """From the mean of both rows' projections on the dual cone, in closed form."""
    g, h = J
    exact = (g - (g @ h).clamp(max=0) / (h @ h) * h + h - (g @ h).clamp(max=0) / (g @ g) * g) / 2
    return float((d - exact).norm() / exact.norm())


def distance_from_sphere(J, d, parameter):
    """CAGrad's step of gradients that do not cancel lies on the sphere around the mean."""
    mean = J.mean(0)
    return float(abs((d - mean).norm() / mean.norm() - parameter))


def excess_norm(_, d, parameter):
    """How much longer than the min-norm point, whose length is known."""
    return float(d.norm() / parameter - 1)


def unfairness(J, d, parameter):
    """The error of <g_i, d> = w_i^(-1/α), where w are the coefficients of d in independent rows."""
    w = torch.linalg.lstsq(J.T, d).solution
    return float(((J @ d) * w.abs() ** (1 / parameter) - 1).abs().max())


def unequal_projections(J, d, _):
    """The spread of the projections on the unit gradients, relative to the largest gradient."""
    projections = (J @ d) / J.norm(dim=1)
    return float((projections.max() - projections.min()) / J.norm(dim=1).max())


@dataclass(frozen=True)
class Disagreement:
    """Input, both methods, and a measure of what is wrong: ours is below 1e-7, theirs above `theirs_is_above`."""

    name: str
    rows: list
    ours: Any
    theirs: Any
    wrong: Any
    theirs_is_above: float
    reason: str
    parameter: float = 0.0


CONFLICT = [[1.0, 0.0, 0.0], [-0.9, 0.3, 0.0], [-0.9, -0.2, 0.1]]
SMALL = [[1e-3 * x for x in row] for row in CONFLICT]
ABSOLUTE = "norm_eps=1e-4 is absolute: a Jacobian whose squared norm is below it counts as zero"
RIDGE = "reg_eps=1e-4 is added to the diagonal of the normalised Gramian"
STUCK = "its solver fails, and the initial weights, all ones, are returned without a word"

TABLE = [
    Disagreement("UPGrad", [[1.0, 0.0], [-1.0, 0.1]], UPGrad(), peer.UPGrad(), distance_to_projection, 1e-4, RIDGE),
    Disagreement("UPGrad, small", SMALL, UPGrad(), peer.UPGrad(), conflict, 0.1, f"{ABSOLUTE}; the mean is returned"),
    Disagreement("DualProj", [[1.0, 0.0], [-2.0, 0.0]], DualProj(), peer.DualProj(), conflict, 0.1, RIDGE),
    Disagreement("DualProj, small", SMALL, DualProj(), peer.DualProj(), conflict, 0.1, f"{ABSOLUTE}; the mean"),
    Disagreement(
        "CAGrad, small",
        SMALL,
        CAGrad(radius=0.5),
        peer.CAGrad(c=0.5),
        distance_from_sphere,
        0.1,
        f"{ABSOLUTE}; zero is returned, which the ball does not contain",
        0.5,
    ),
    Disagreement(
        "CAGrad, a zero row",
        [[0.0, 0.0], [1.0, 2.0]],
        CAGrad(),
        peer.CAGrad(c=0.4),
        distance_from_sphere,
        0.1,
        "the zero gradient is a vanishing combination, for which zero is returned; the ball does not contain it",
        0.4,
    ),
    Disagreement(
        "MGDA",
        [[4.0, 1.0, 0.0], [-3.0, 1.0, 0.0], [0.0, 1.0, 3.0]],
        MGDA(),
        peer.MGDA(),
        excess_norm,
        1e-3,
        "at most 100 steps of Frank and Wolfe; the point of least norm is (0, 1, 0)",
        1.0,
    ),
    Disagreement(
        "NashMTL",
        [[0.0, 0.0, 3.0], [1.0, 2.0, -3.0]],
        NashMTL(),
        peer.NashMTL(n_tasks=2, max_norm=0.0),
        unfairness,
        1.0,
        STUCK,
        1.0,
    ),
    Disagreement(
        "NashMTL of three",
        [[-1.0, 2.0, 3.0, 2.0], [1.0, -1.0, 1.0, 2.0], [2.0, -2.0, -1.0, -1.0]],
        NashMTL(),
        peer.NashMTL(n_tasks=3, max_norm=0.0),
        unfairness,
        1.0,
        STUCK,
        1.0,
    ),
    Disagreement(
        "FairGrad, small",
        [[2e-4, 1e-4, 0.0], [-1e-4, 1e-4, 1e-4]],
        FairGrad(),
        peer.FairGrad(alpha=2.0),
        unfairness,
        0.1,
        "scipy's least squares, started from 1/m whatever the scale, stops where it began",
        2.0,
    ),
    Disagreement(
        "IMTLG, opposed",
        [[3.0], [-1.0]],
        IMTLG(),
        peer.IMTLG(),
        unequal_projections,
        1.0,
        "the pseudo-inverse of the Gramian gives least squares; only the zero step has equal projections",
    ),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_who_is_right_where_the_steps_differ(row):
    J = f64(row.rows)
    ours, theirs = steps(row.ours, row.theirs, J)
    assert row.reason
    assert row.wrong(J, ours, row.parameter) < 1e-7
    assert row.wrong(J, theirs, row.parameter) > row.theirs_is_above


@settings(max_examples=15)
@given(jacobians((2, 3)))
def test_nash_agrees_where_its_solver_arrives(J):
    ours, theirs = steps(NashMTL(), peer.NashMTL(n_tasks=len(J), max_norm=0.0), J)
    assert unfairness(J, ours, 1.0) < 1e-8
    error = unfairness(J, theirs, 1.0)
    assert torch.linalg.vector_norm(ours - theirs) <= max(1e-5, 10 * error) * torch.linalg.vector_norm(ours)
