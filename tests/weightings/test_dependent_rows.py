"""Rows that depend on each other up to their own rounding: what is left where they cancel must be nothing but that."""

import pytest
import torch

from mtlweight import ConFIG, FairGrad, MultiTaskOptimizer, NashMTL, Needs, View
from mtlweight._statistics import Given, gramian_of
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
@pytest.mark.parametrize("engine", ["rows", "batched", "samples", "features", "auto"])
def test_the_step_through_every_engine_is_that_of_the_exact_gramian(engine, dtype):
    for i, case in enumerate(METHODS):
        for k in range(i, i + 3):
            family, m = list(FAMILIES)[k % len(FAMILIES)], sizes(case)[k % len(sizes(case))]
            rows = dependent(family, m, k, n=200, dtype=dtype)
            found, gradient = step(case.weighting, rows, engine)
            exact, _ = step(case.weighting, rows.double(), "rows")
            assert same(found.weights, exact.weights, rows), (case.weighting, family)
            if dtype == torch.float32:  # in less, the gradient is rounded to more than a thousandth
                summed = exact.weights.abs() @ rows.double().norm(dim=1)
                off = (gradient - exact.weights @ rows.double()).norm()
                assert off <= 1e-3 * max((exact.weights @ rows.double()).norm(), 1e-3 * summed), (case, family)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("m", [1, 2, 7, 40])
def test_gramians_of_float32_rows_are_exact_to_the_last_digits_of_float64(m, scale):
    rows = scale * torch.randn(m, 5000, generator=torch.Generator().manual_seed(m))
    expected = rows.double() @ rows.double().T
    lengths = expected.diagonal().sqrt()
    blocks = rows[:, :999], list(rows[:, 999:1000]), list(rows[:, 1000:]), rows[:, :0]
    for copied in (None, 64 * m):
        for found in (gramian_of(rows, copied=copied), gramian_of(*blocks, copied=copied)):
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
