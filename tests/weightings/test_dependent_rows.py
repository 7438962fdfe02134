"""Rows that depend on each other up to their own rounding: what is left where they cancel must be nothing but that."""

import functools

import pytest
import torch
from torch import nn

from mtlweight import (
    IMTLG,
    MGDA,
    PCD,
    AlignedMTL,
    CAGrad,
    ConFIG,
    DualProj,
    FairGrad,
    Krum,
    MultiTaskOptimizer,
    NashMTL,
    Needs,
    PCGrad,
    SDMGrad,
    UPGrad,
    View,
    _statistics,
)
from mtlweight._statistics import Given, gramian_of, settled
from mtlweight._weighting import evaluate
from tests.registry import CASES
from tests.weightings._dependent import FAMILIES, dependent

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OTHERS = Needs.JACOBIAN | Needs.ALIGNMENT
METHODS = [
    case
    for case in CASES
    if Needs.GRAMIAN in case.weighting.needs and not case.weighting.needs & OTHERS and case.weighting.writes == "task"
]
"""None of them has an exception: an order that is drawn is the same for both, and no row here is in a tie of Krum's."""

by_method = pytest.mark.parametrize("case", METHODS, ids=lambda case: repr(case.weighting))


def sizes(case):
    return [m for m in (2, 3, 4, 6, 8) if len(case.tasks) > 1 or m in case.tasks][:4]


def weigh(weighting, **given):
    """The weights in float64: in the dtype of what is given they would be rounded once more."""
    m = len(next(iter(given.values())))
    return evaluate(weighting, View(Given(losses=torch.ones(m), **given)), None)[0]


def same(found, expected, rows):
    """Whether two steps are the same to a thousandth, or to a millionth of what cancels in them."""
    J = rows.double()
    steps, summed = found @ J - expected @ J, (expected.abs() @ J.norm(dim=1))
    return steps.norm() <= 1e-3 * max((expected @ J).norm(), 1e-3 * summed)


@pytest.mark.parametrize("dtype", DTYPES)
@by_method
def test_the_step_is_that_of_the_exact_gramian(case, dtype):
    for family in FAMILIES:
        for m in sizes(case):
            for seed in range(2):
                rows = dependent(family, m, seed, dtype=dtype)
                exact = weigh(case.weighting, gramian=rows.double() @ rows.double().T)
                assert same(weigh(case.weighting, jacobian=rows), exact, rows), (family, m, seed)


class Held(torch.nn.Module):
    """A parameter that is the representation as well, so that its gradients are those of a linear loss exactly."""

    def __init__(self, n, dtype):
        super().__init__()
        self.values = torch.nn.Parameter(torch.zeros(n, dtype=dtype))

    def forward(self):
        return self.values * 1


def step(weighting, rows, engine):
    """Report of a step on linear losses, and the gradient that it wrote."""
    model = Held(rows.shape[1], rows.dtype)
    inner = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = MultiTaskOptimizer(inner, weighting, engine=engine, shared=model, seed=0)
    z = model()
    optimizer.combine({str(t): (z * row).sum() + 1 for t, row in enumerate(rows)}).backward()
    optimizer.step()
    return optimizer.report, model.values.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("engine", ["rows", "batched", "samples", "features"])
def test_the_step_through_every_engine_is_that_of_the_exact_gramian(engine, dtype):
    for i, case in enumerate(METHODS):
        for k in range(i, i + 3):
            family, m = list(FAMILIES)[k % len(FAMILIES)], sizes(case)[k % len(sizes(case))]
            rows = dependent(family, m, k, n=200, dtype=dtype)
            found, gradient = step(case.weighting, rows, engine)
            J = rows.double()
            exact = J @ J.T
            if dtype == torch.float32:
                weights = step(case.weighting, J, "rows")[0].weights
                summed = weights.abs() @ J.norm(dim=1)
                off = (gradient - weights @ J).norm()
                assert off <= 1e-3 * max((weights @ J).norm(), 1e-3 * summed), (case, family)
            else:  # what 16 bits leave of rows that cancel is taken away, and the gradient rounded to a thousandth
                exact = settled(exact, torch.finfo(dtype).eps)
                weights = weigh(case.weighting, gramian=exact)
            assert same(found.weights, weights, rows), (case.weighting, family)
            assert (found.gramian - exact).abs().max() <= 1e-12 * exact.diagonal().max()


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("m", [1, 2, 7, 40])
def test_gramians_of_float32_rows_are_exact_to_the_last_digits_of_float64(m, scale, monkeypatch):
    rows = scale * torch.randn(m, 5000, generator=torch.Generator().manual_seed(m))
    expected = rows.double() @ rows.double().T
    lengths = expected.diagonal().sqrt()
    blocks = rows[:, :999], list(rows[:, 999:1000]), list(rows[:, 1000:]), rows[:, :0]
    for held in (_statistics.HELD, 64 * m):
        monkeypatch.setattr(_statistics, "HELD", held)
        for found in (gramian_of(rows), gramian_of(*blocks)):
            assert found.dtype == torch.float64
            assert ((found - expected).abs() <= 1e-14 * lengths * lengths[:, None]).all()


def test_conflict_free_steps_of_two_rows_and_their_sum_are_as_long_as_they_are():
    for seed in range(40):
        a, b = torch.randn(2, 1000, generator=torch.Generator().manual_seed(seed))
        J = torch.stack([a, b, a + b])
        assert 80 < (ConFIG()(jacobian=J) @ J).norm() < 100, seed


@pytest.mark.parametrize("method", [NashMTL(), FairGrad()])
def test_an_opposed_row_never_makes_a_step_that_harms(method):
    for seed in range(40):
        a, b = torch.randn(2, 1000, generator=torch.Generator().manual_seed(seed))
        J = torch.stack([a, -1.37 * a, b])
        d = (method(jacobian=J) @ J).double()
        assert ((J.double() @ d) >= -1e-5 * J.norm(dim=1) * d.norm()).all(), seed
        assert d.norm() < 100


ANY_LENGTH = (IMTLG(), IMTLG(normalization="absolute"), ConFIG(), NashMTL())
EQUAL = (*ANY_LENGTH, AlignedMTL(), Krum(), CAGrad(), DualProj(), FairGrad())
"""What says that duplicates share. MGDA says so of equal rows: of rounded ones, the shorter is nearer to zero."""


@pytest.mark.parametrize(
    ("method", "factor"),
    [*((method, 1.0) for method in EQUAL), *((method, f) for method in ANY_LENGTH for f in (1.37, 1e-3, 700.3))],
    ids=repr,
)
def test_duplicates_share_once_they_are_rounded_and_in_any_order(method, factor):
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        a, b, c = torch.randn(3, 1000, generator=generator)
        last = torch.nextafter(a, b) if factor == 1.0 else factor * a
        J = torch.stack([a, last, b, c])
        order = torch.randperm(4, generator=generator)
        lengths = weigh(method, jacobian=J) * J.double().norm(dim=1)
        assert abs(lengths[0] - lengths[1]) <= 1e-5 * lengths.abs().max(), seed
        permuted = weigh(method, jacobian=J[order]) * J[order].double().norm(dim=1)
        assert torch.allclose(permuted, lengths[order], rtol=0, atol=1e-5 * float(lengths.abs().max())), seed


def test_imtlg_shares_among_duplicates_of_another_length():
    torch.manual_seed(2)
    a, b = torch.randn(2, 1000)
    J = torch.stack([a, 1.37 * a, b])
    expected = torch.tensor([0.274, 0.200, 0.526])
    assert torch.allclose(IMTLG()(jacobian=J), expected, atol=5e-4)


def test_weights_that_cancel_up_to_the_rounding_of_rows_are_zero():
    for seed in range(40):
        a, b = torch.randn(2, 1000, generator=torch.Generator().manual_seed(seed))
        a, b = a / a.norm(), b / b.norm()
        b = (b - (a @ b) * a).div(3)
        J = torch.stack([a, a + b, a + 2 * b])  # the one in the middle, twice, is the sum of the others
        assert not IMTLG()(jacobian=J).any(), seed


STEADY = (
    MGDA(),
    PCGrad(),
    CAGrad(),
    CAGrad(radius=1.5),
    ConFIG(),
    DualProj(),
    FairGrad(),
    FairGrad(alpha=0.5),
    IMTLG(),
    NashMTL(),
    UPGrad(),
    AlignedMTL(),
    PCD(),
    PCD("0", progress=0.0),
    SDMGrad(independent=False),
)
NETS = {
    "wide": lambda: (nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()),
    "deep": lambda: [layer for k in range(8) for layer in (nn.Linear(32 if k == 0 else 48, 48), nn.Tanh())],
    "normalized": lambda: (nn.Linear(32, 64), nn.BatchNorm1d(64), nn.GELU(), nn.Linear(64, 64), nn.LayerNorm(64)),
}
LOSSES = {
    "their sum": lambda a, b, _: (a, b, a + b),
    "their mean": lambda a, b, c: (a, b, c, (a + b + c) / 3),
    "an opposed multiple": lambda a, b, _: (a, b, -1.37 * a),
    "a multiple": lambda a, b, _: (1.37 * a, b, a),
    "a combination": lambda a, b, c: (a, b, c, 0.9 * a + 0.1 * b - 0.3 * c),
    "a vanishing combination": lambda a, b, c: (a, b, c, -0.4 * a - 0.7 * b - c),
}


def of_net(method, name, losses, seed, dtype, engine):
    torch.manual_seed(seed)
    encoder, head = nn.Sequential(*NETS[name]()), nn.LazyLinear(3)
    x, y = torch.randn(1024, 32), torch.randn(1024, 3)
    head(encoder(x))
    encoder, head, x, y = encoder.to(dtype), head.to(dtype), x.to(dtype), y.to(dtype)
    inner = torch.optim.SGD([*encoder.parameters(), *head.parameters()], lr=0.0)
    optimizer = MultiTaskOptimizer(inner, method, shared=encoder, engine=engine, seed=0)
    a, b, c = (head(encoder(x)) - y).square().mean(dim=0)
    optimizer.combine({str(t): loss for t, loss in enumerate(LOSSES[losses](a, b, c))}).backward()
    optimizer.step()
    report = optimizer.report
    summed = (report.weights.abs() @ report.gramian.diagonal().sqrt()).item()
    return torch.cat([p.grad.double().flatten() for p in encoder.parameters()]), summed


@pytest.mark.parametrize("losses", LOSSES)
@pytest.mark.parametrize(("name", "engine"), [*((name, "rows") for name in NETS), ("deep", "features")])
def test_the_step_of_a_float32_network_is_that_of_the_same_network_in_float64(name, losses, engine):
    for k, method in enumerate(STEADY):
        found, _ = of_net(method, name, losses, k, torch.float32, engine)
        exact, summed = of_net(method, name, losses, k, torch.float64, engine)
        assert (found - exact).norm() <= 1e-3 * max(exact.norm(), 1e-2 * summed), method


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gramian_given_in_float32_makes_the_step_of_the_exact_one_and_never_an_absurd_one(family):
    for method in STEADY:
        for m in (2, 3, 6):
            for seed in range(4):
                rows = dependent(family, m, seed).double()
                rows /= rows.norm(dim=1, keepdim=True)
                exact = weigh(method, gramian=rows @ rows.T) @ rows
                found = weigh(method, gramian=(rows @ rows.T).float()) @ rows
                assert (found - exact).norm() <= 1e-3 * max(exact.norm(), 1), (method, m, seed)


LOW = {"bf16": (torch.bfloat16, False), "fp16": (torch.float16, False), "autocast": (torch.bfloat16, True)}


@functools.cache
def of_low(method, losses, seed, low, dtype, autocast=False):
    """The step of a small network whose numbers are those of a low precision, whatever it computes in."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 3)).to(low).to(dtype)
    x, y = (torch.randn(64, k).to(low).to(dtype) for k in (20, 3))
    optimizer = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), method, shared=model, seed=0)
    with torch.autocast("cpu", low, enabled=autocast):
        a, b, c = (model(x) - y).square().mean(dim=0)
    optimizer.combine({str(t): loss for t, loss in enumerate(LOSSES[losses](a, b, c))}).backward()
    return torch.cat([p.grad.double().flatten() for p in model.parameters()])


@pytest.mark.parametrize("losses", LOSSES)
@pytest.mark.parametrize("precision", LOW)
def test_what_low_precision_leaves_where_gradients_cancel_is_no_direction_of_its_own(precision, losses):
    low, autocast = LOW[precision]
    # IMTLG divides by a sum of weights, which cancels to within the rounding of 16 bits where rows depend.
    for method in [method for method in STEADY if not isinstance(method, IMTLG)]:
        for seed in range(3):
            found = of_low(method, losses, seed, low, torch.float32 if autocast else low, autocast)
            exact = of_low(method, losses, seed, low, torch.float64)
            share = 0.2 if isinstance(method, PCD) else 0.1  # it is as far off without rounding that cancels
            assert (found - exact).norm() <= share * exact.norm() + 0.02, (method, seed)  # gradients are about 1 long


@pytest.mark.parametrize("m", [3, 200, 300, 600])
def test_of_many_tasks_no_low_precision_makes_another_gramian_of_rows_that_depend(m):
    generator = torch.Generator().manual_seed(m)
    rows = torch.randn(m, 2 * m, generator=generator, dtype=torch.float64)
    rows[-1] = rows[:-1].sum(dim=0)  # of 300 unit rows, a coefficient is .04: below 8 eps of bf16
    rows /= rows.norm(dim=1, keepdim=True)
    expected = rows @ rows.T
    for dtype in (torch.bfloat16, torch.float16):
        found = settled(expected, torch.finfo(dtype).eps)
        assert (found - expected).abs().max() <= m * (2 * torch.finfo(dtype).eps) ** 2
