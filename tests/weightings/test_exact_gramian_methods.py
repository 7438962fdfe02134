"""UPGrad, DualProj, CAGrad, NashMTL, FairGrad, IMTLG, ConFIG: their options, their relations, what they note."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtlweight import (
    CRMOGM,
    IMTLG,
    MGDA,
    PCD,
    AlignedMTL,
    CAGrad,
    ConFIG,
    Constant,
    DualProj,
    FairGrad,
    GradNorm,
    GradVac,
    Krum,
    MTLWeightError,
    NashMTL,
    PCGrad,
    UPGrad,
    View,
    every,
    normalize,
)
from mtlweight._statistics import Given
from mtlweight._weighting import evaluate
from mtlweight.testing import arbitrary

METHODS = [UPGrad(), DualProj(), CAGrad(), NashMTL(), FairGrad(), IMTLG(), ConFIG()]
matrices = st.sampled_from([2, 3, 5]).flatmap(arbitrary.jacobians)


def length(w, J):
    return float(w.abs() @ J.norm(dim=1))


def same_step(a, b, J, tolerance=1e-7):
    assert ((a - b) @ J).norm() <= tolerance * max(length(a, J), length(b, J))


@pytest.mark.parametrize(
    "method",
    [*METHODS, AlignedMTL(), CRMOGM(), GradNorm(), GradVac(), Krum(), MGDA(), PCD("0"), PCGrad()],
    ids=repr,
)
def test_the_host_asks_for_numbers_once_at_most(method, monkeypatch):
    """Each time it would wait for a GPU."""
    asked = []
    for name in ("cpu", "tolist", "item", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__"):
        call = getattr(torch.Tensor, name)

        def noted(self, *args, _name=name, _call=call, **options):
            asked.append(_name)
            return _call(self, *args, **options)

        monkeypatch.setattr(torch.Tensor, name, noted)
    jacobian = torch.tensor(
        [[1.0, 0.0, 2.0], [-1.0, 2.0, 0.5], [0.5, -1.0, 1.0], [0.0, 1.0, -3.0]], dtype=torch.float64
    )
    view = View(Given(losses=torch.arange(1.0, 5.0), gramian=jacobian @ jacobian.T))
    state = method.init(view)
    asked.clear()
    method.weigh(view, state)
    assert len([name for name in asked if name != "numpy"]) <= 1
    assert asked.count("numpy") <= asked.count("cpu")  # what is on the host may be seen as an array


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_the_residual_is_noted(method):
    view = View(Given(jacobian=torch.tensor([[1.0, 0.0], [-1.0, 2.0]])))
    evaluate(method, view, None)
    assert view.notes[f"{type(method).__name__.lower()}_residual"] <= 1e-8


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_one_task_is_left_alone_up_to_the_length_of_its_step(method):
    (weight,) = method(gramian=torch.tensor([[4.0]]))
    assert weight > 0


@given(matrices)
def test_both_projections_are_the_mean_where_nothing_conflicts(J):
    J = J.abs()
    mean = torch.full((len(J),), 1 / len(J), dtype=J.dtype)
    torch.testing.assert_close(UPGrad()(jacobian=J), mean)
    torch.testing.assert_close(DualProj()(jacobian=J), mean)


@given(matrices, st.lists(st.integers(-3, 3), min_size=5, max_size=5))
def test_a_preference_is_a_chain(J, exponents):
    """Σ_i π(u_i g_i) and π(Σ_i u_i g_i): the cone does not depend on lengths."""
    u = 2.0 ** torch.tensor(exponents[: len(J)], dtype=torch.float64)
    scaled = u[:, None] * J
    for method in (UPGrad(), DualProj()):
        found = (Constant(u.tolist()) >> method)(jacobian=J)
        same_step(found, u * method(jacobian=scaled), J)


@given(matrices, st.sampled_from([0.1, 0.4, 0.9]))
def test_rescaling_cagrad_divides(J, radius):
    paper, square, linear = (CAGrad(radius, rescale=k)(jacobian=J) for k in (0, 1, 2))
    torch.testing.assert_close(paper, square * (1 + radius**2))
    torch.testing.assert_close(paper, linear * (1 + radius))


@given(matrices)
def test_cagrad_serves_the_worst_off_at_least_as_well_as_the_mean_does(J):
    mean = J.mean(dim=0)
    step = CAGrad()(jacobian=J) @ J
    alive = J.any(dim=1)
    if alive.any():
        assert (J[alive] @ step).min() >= (J[alive] @ mean).min() - 1e-9 * J.norm() ** 2


@given(matrices)
def test_the_step_of_nash_bargaining_has_the_norm_of_the_root_of_those_who_gain(J):
    w = NashMTL()(jacobian=J)
    gains = J @ (w @ J) * w
    assert ((gains - gains.round()).abs() < 1e-6).all()  # 1 for those who bargain, 0 for those who cancel
    assert (w @ J).norm() ** 2 == pytest.approx(float(gains.round().sum()), abs=1e-6)


@given(matrices, st.sampled_from([0.1, 1.0, 100.0]))
def test_a_bound_on_the_norm_shortens_the_step_and_keeps_its_direction(J, bound):
    free, bounded = NashMTL()(jacobian=J), NashMTL(max_norm=bound)(jacobian=J)
    norm = float((free @ J).norm())
    torch.testing.assert_close(bounded, free * (min(1.0, bound / norm) if norm > 1e-6 else 1.0))


@given(matrices)
def test_fairgrad_with_alpha_one_is_nash_bargaining(J):
    torch.testing.assert_close(FairGrad(alpha=1.0)(jacobian=J), NashMTL()(jacobian=J))


def test_fairgrad_goes_from_the_sum_to_the_worst_case():
    J = torch.tensor([[1.0, 0.0], [-0.5, 1.0]], dtype=torch.float64)
    nearly_sum = normalize(FairGrad(alpha=0.01), total=2.0)(jacobian=J)
    torch.testing.assert_close(nearly_sum, torch.ones(2, dtype=torch.float64), atol=0.02, rtol=0.0)
    nearly_worst_case = normalize(FairGrad(alpha=1000.0))(jacobian=J)
    torch.testing.assert_close(nearly_worst_case, MGDA()(jacobian=J), atol=0.01, rtol=0.0)


@given(matrices)
def test_imtlg_scaled_absolutely_is_the_same_up_to_its_scale(J):
    by_sum, absolute = IMTLG()(jacobian=J), IMTLG(normalization="absolute")(jacobian=J)
    if by_sum.any():
        torch.testing.assert_close(absolute * by_sum.abs().sum() * torch.sign(absolute @ by_sum), by_sum)
    else:
        assert abs(float(absolute.sum())) < 1e-7


def test_imtlg_climbs_where_the_paper_does_and_not_with_absolute_scaling():
    J = torch.tensor([[0.0, 0.0, 1.0], [1.0, 1.0, 3.0], [-2.0, 0.0, 0.0]])
    assert (J @ (IMTLG()(jacobian=J) @ J) < 0).all()
    assert (J @ (IMTLG(normalization="absolute")(jacobian=J) @ J) > 0).all()


@given(matrices)
def test_what_does_not_conflict_does_not(J):
    for method in (UPGrad(), DualProj(), NashMTL(), FairGrad(), CAGrad(radius=1.0)):
        w = method(jacobian=J)
        assert (J @ (w @ J) >= -1e-8 * length(w, J) * J.norm()).all()


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_weights_are_kept_between_renewals(method):
    first = View(Given(jacobian=torch.tensor([[1.0, 0.0], [-1.0, 2.0]])), step=0)
    later = View(Given(jacobian=torch.tensor([[0.0, 9.0], [5.0, 2.0]])), step=1)
    weights, state = evaluate(every(25, method), first, None)
    torch.testing.assert_close(evaluate(every(25, method), later, state)[0], weights)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CAGrad(radius=-0.1), "CAGrad: expected radius >= 0, found -0.1"),
        (lambda: CAGrad(radius=float("inf")), "CAGrad: expected radius >= 0, found inf"),
        (lambda: CAGrad(rescale=3), "CAGrad: expected rescale 0, 1 or 2, found 3"),
        (lambda: NashMTL(max_norm=0.0), "NashMTL: expected max_norm > 0 or None, found 0.0"),
        (lambda: FairGrad(alpha=0.0), r"FairGrad: expected a positive, finite alpha, found 0.0. For 0 use Equal\(\)"),
        (lambda: FairGrad(alpha=float("nan")), "found nan"),
        (lambda: IMTLG(normalization="mean"), "IMTLG: expected normalization 'sum' .* found 'mean'"),
    ],
)
def test_hyperparameters_that_mean_nothing_are_refused(build, message):
    with pytest.raises(MTLWeightError, match=message):
        build()
