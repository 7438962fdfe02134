"""What TorchJD's own tests ask of its aggregators, in our words, of our Gramian methods on float32 rows."""

import pytest
import torch

from mtlweight import IMTLG, MGDA, PCD, ConFIG, Equal, PCGrad, UPGrad, View
from mtlweight._statistics import Given
from mtlweight._weighting import evaluate
from tests.weightings.test_dependent_rows import METHODS

SIZES = ((1, 3), (2, 2), (2, 50), (3, 8), (5, 3), (6, 200))
SCALES = (1e-10, 1e-3, 1.0, 1e5, 1e15)


def normal(m, n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, dtype=torch.float64, generator=generator), generator


def _random(m, n, seed):
    """Entries are independent and normal."""
    return normal(m, n, seed)[0]


def _zero(m, n, _):
    """No task depends on the parameters."""
    return torch.zeros(m, n, dtype=torch.float64)


def _deficient(m, n, seed):
    """The rank is half of what it could be, rounded up."""
    R, generator = normal(m, n, seed)
    rank = (min(m, n) + 1) // 2
    return torch.randn(m, rank, dtype=torch.float64, generator=generator) @ R[:rank]


def _strongly_stationary(m, n, seed):
    """A combination with positive coefficients alone vanishes."""
    R, generator = normal(m, n, seed)
    shares = 0.2 + torch.rand(m, dtype=torch.float64, generator=generator)
    return R - torch.outer(shares, shares @ R) / (shares @ shares) if m > 1 else 0 * R


def _weakly_stationary(m, n, seed):
    """A convex combination of all rows but one vanishes; the last one is free to improve."""
    R, _ = normal(m, n, seed)
    return torch.cat([_strongly_stationary(m - 1, n, seed), R[-1:]]) if m > 2 else torch.cat([0 * R[:-1], R[-1:]])


SAMPLERS = {f.__name__: f for f in (_random, _zero, _deficient, _strongly_stationary, _weakly_stationary)}


def samples(*names, scales=SCALES):
    for name in names or SAMPLERS:
        for k, (m, n) in enumerate(SIZES):
            for scale in scales:
                yield (name, m, n, scale), (scale * SAMPLERS[name](m, n, k)).float()


def weigh(weighting, rows):
    """The weights; heads and losses say nothing."""
    return evaluate(weighting, View(Given(jacobian=rows, losses=torch.ones(len(rows)))), None)[0]


def length(weights, rows):
    """Of all that is added up: in its units rounding is measured."""
    return (weights.abs() @ rows.double().norm(dim=1)).item()


def claims(**wanted):
    return [
        case.weighting
        for case in METHODS
        if set(case.tasks) >= {1, 2, 3}
        if all(getattr(case.weighting.traits, name) == value for name, value in wanted.items())
    ]


@pytest.mark.parametrize("weighting", claims(), ids=repr)
def test_structure(weighting):
    for which, rows in samples():
        weights = weigh(weighting, rows)
        assert weights.shape == (len(rows),), which
        assert weights.isfinite().all(), which


@pytest.mark.parametrize("weighting", claims(nonconflicting=True), ids=repr)
def test_no_conflict(weighting):
    for which, rows in samples():
        weights, J = weigh(weighting, rows), rows.double()
        harm = -(J @ (weights @ J)) / J.norm(dim=1).clamp(min=1e-300)
        assert harm.max() <= 1e-6 * length(weights, rows), which


@pytest.mark.parametrize("weighting", [w for w in claims(random=False) if not isinstance(w, PCD)], ids=repr)
def test_no_order_of_the_rows_matters(weighting):
    """Of PCD, the first task is the main one."""
    for which, rows in samples():
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(len(rows)))
        J, weights = rows.double(), weigh(weighting, rows)
        moved = weigh(weighting, rows[order]) @ J[order] - weights @ J
        assert moved.norm() <= 1e-5 * length(weights, rows), which


@pytest.mark.parametrize("weighting", [Equal(), UPGrad(), ConFIG(), PCGrad()], ids=repr)
def test_the_step_is_linear_in_the_scales_of_the_rows(weighting):
    for which, rows in samples(scales=(1e-3, 1.0, 1e5)):
        J = rows.double()
        generator = torch.Generator().manual_seed(len(rows))
        one, two = (0.1 + torch.rand(len(rows), 1, dtype=J.dtype, generator=generator) for _ in range(2))

        def step(scales, J=J):
            scaled = (scales * J).float()
            weights = weigh(weighting, scaled)
            return weights @ scaled.double(), length(weights, scaled)

        both, summed = step(2 * one + 3 * two)
        assert (both - 2 * step(one)[0] - 3 * step(two)[0]).norm() <= 1e-5 * summed, which


@pytest.mark.parametrize("weighting", claims(stationary="strong"), ids=repr)
def test_the_step_is_zero_only_where_positive_coefficients_make_it_so(weighting):
    for which, rows in samples("_strongly_stationary"):
        weights = weigh(weighting, rows)
        assert (weights @ rows.double()).norm() <= 1e-5 * length(weights, rows), which
    if isinstance(weighting, IMTLG):
        return  # projections are equal where some rows cancel only if they are zero
    for which, rows in samples("_weakly_stationary"):
        if which[2] > which[1] > 1:  # else the others may span all there is, so that the last one vanishes with them
            weights = weigh(weighting, rows)
            assert (weights @ rows.double()).norm() > 1e-5 * length(weights, rows), which


def test_mgda_meets_the_conditions_of_a_minimum():
    for which, rows in samples():
        J, weights = rows.double(), weigh(MGDA(), rows)
        assert (weights >= 0).all(), which
        assert weights.sum() == pytest.approx(1.0), which
        x = weights @ J
        multipliers = J @ x - x @ x  # of the constraints: not negative, and zero where there is weight
        unit = J.norm(dim=1) * length(weights, rows)
        assert (multipliers >= -1e-6 * unit).all(), which
        assert (weights * multipliers <= 1e-6 * weights * unit + 1e-300).all(), which
