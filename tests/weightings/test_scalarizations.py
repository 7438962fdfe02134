"""GLS, SI, STCH, COSMOS, PBI: weights that are the gradient of a scalar function of the losses."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from mtlweight import COSMOS, GLS, PBI, SI, STCH, Constant, MTLWeightError
from tests.oracles import cosmos, gls, pbi, si, stch
from tests.weightings._run import run

positive = st.floats(-12, 12).map(lambda e: 10.0**e)
some = st.lists(positive, min_size=1, max_size=5)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def agree(weighting, oracle, batches, rtol=1e-9, atol=0.0, **hyperparameters):
    expected = oracle.weights([{"losses": f64(batch)} for batch in batches], None, **hyperparameters)
    for a, b in zip(run(weighting, batches)[0], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@given(some)
def test_gls_is_the_slope_of_the_geometric_mean(losses):
    agree(GLS(), gls, [losses])


@given(some)
def test_the_weighted_losses_of_gls_are_equal_and_sum_to_the_geometric_mean(losses):
    weighted = GLS()(losses=f64(losses)) * f64(losses)
    torch.testing.assert_close(weighted, weighted[:1].expand(len(losses)))
    assert weighted.sum().item() == pytest.approx(math.exp(sum(map(math.log, losses)) / len(losses)))


@given(some, st.integers(0, 5))
def test_gls_and_si_leave_losses_of_zero_out(losses, place):
    with_zero = [*losses[:place], 0.0, *losses[place:]]
    for weighting in (GLS(), SI()):
        weights = weighting(losses=f64(with_zero)).tolist()
        assert weights.pop(min(place, len(losses))) == 0
        assert weights == pytest.approx(weighting(losses=f64(losses)).tolist())


@pytest.mark.parametrize("weighting", [GLS(), SI(), STCH(form="official")])
def test_losses_that_are_all_zero_or_hardly_a_number_have_finite_weights(weighting):
    for losses in ([0.0, 0.0], [5e-324, 0.0], [5e-324, 1.0]):
        assert weighting(losses=f64(losses)).isfinite().all()


@given(some)
def test_si_is_the_slope_of_the_sum_of_logarithms(losses):
    agree(SI(), si, [losses])


@given(some, st.lists(positive, min_size=5, max_size=5))
def test_constants_before_si_change_no_weighted_loss(losses, factors):
    factors = factors[: len(losses)]
    torch.testing.assert_close((Constant(factors) >> SI())(losses=f64(losses)), SI()(losses=f64(losses)))


@pytest.mark.parametrize(
    "weighting", [GLS(), SI(), STCH(form="official")], ids=lambda weighting: type(weighting).__name__
)
def test_a_negative_loss_is_named(weighting):
    with pytest.raises(MTLWeightError, match=r"expected losses >= 0.*found b = -2\. Shift the loss"):
        run(weighting, [{"a": 1.0, "b": -2.0}])


real = st.floats(-1e6, 1e6)


@given(st.lists(real, min_size=3, max_size=3), positive, st.sampled_from([None, 2.0, (1.0, 0.0, 3.0)]), real)
def test_stch_is_the_slope_of_the_smooth_maximum(losses, smoothing, preference, ideal):
    options = {"smoothing": smoothing, "preference": preference, "ideal": ideal}
    agree(STCH(**options), stch, [losses], atol=1e-12, **options)


@given(st.lists(some.filter(lambda x: len(x) == 5), min_size=1, max_size=5), st.floats(0.1, 10), st.integers(1, 3))
def test_the_official_stch_is_the_slope_of_the_official_codes_scalar(batches, smoothing, period):
    agree(
        STCH(smoothing, form="official", period=period),
        stch,
        batches,
        rtol=1e-7,
        smoothing=smoothing,
        form="official",
        period=period,
    )


@given(st.lists(real, min_size=2, max_size=4, unique=True))
def test_stch_without_smoothing_weighs_the_greatest_loss_alone(losses):
    ordered = sorted(losses)
    assume(ordered[-1] - ordered[-2] > 1e-3)
    weights = STCH(smoothing=1e-9)(losses=f64(losses))
    assert weights.argmax() == f64(losses).argmax()
    assert weights.tolist() == pytest.approx([1 / len(losses) if x == max(losses) else 0.0 for x in losses])


def test_the_official_stch_counts_each_tasks_own_steps():
    weighting = STCH(form="official", period=2)
    batches = [{"a": 2.0}, {"a": 4.0, "b": 8.0}, {"a": 6.0, "b": 4.0}, {"a": 1.0, "b": 3.0}]
    weights = run(weighting, batches)[0]
    assert weights[1].tolist() == pytest.approx([1 / 4, 1 / 8])  # warm-up
    assert weights[2].tolist() == pytest.approx([1 / 6, 1 / 4])  # a alone has its mean, 3: one task's share is 1
    shares = f64([1.0 / 3, 3.0 / 6])  # losses over the first means, 3 and 6
    assert weights[3].tolist() == pytest.approx((2 * shares / shares.sum() / f64([1.0, 3.0])).tolist())


@given(
    st.lists(positive, min_size=2, max_size=4), st.lists(st.floats(0.1, 10), min_size=4, max_size=4), st.floats(0, 10)
)
def test_cosmos_is_the_slope_of_the_penalised_sum(losses, preference, penalty):
    preference = {str(t): preference[t] for t in range(len(losses))}
    scale = penalty / f64(losses).norm().item() + 10  # the two terms may cancel
    agree(COSMOS(preference, penalty), cosmos, [losses], atol=1e-12 * scale, preference=preference, penalty=penalty)


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=4), positive)
def test_cosmos_on_the_preferred_line_is_the_preference(preference, scale):
    weights = COSMOS(preference, penalty=scale)(losses=scale * f64(preference))
    torch.testing.assert_close(weights, f64(preference), rtol=1e-6, atol=1e-9)


def test_cosmos_asks_a_callable_for_the_preference_at_each_step():
    drawn = iter([{"0": 1.0, "1": 0.0}, {"0": 0.0, "1": 3.0}])
    weights = run(COSMOS(lambda: next(drawn), penalty=0.0), [[1.0, 1.0], [1.0, 1.0]])[0]
    assert [row.tolist() for row in weights] == [[1.0, 0.0], [0.0, 3.0]]


def test_cosmos_of_losses_of_zero_is_the_preference():
    assert COSMOS([0.25, 0.75])(losses=torch.zeros(2)).tolist() == [0.25, 0.75]


@given(
    st.lists(positive, min_size=1, max_size=4),
    st.lists(st.floats(0.1, 10), min_size=4, max_size=4),
    st.lists(st.floats(-1, 1), min_size=4, max_size=4),
    st.floats(0, 10),
)
def test_pbi_is_the_slope_of_the_penalised_distance(losses, preference, ideal, penalty):
    names = [str(t) for t in range(len(losses))]
    options = {
        "preference": dict(zip(names, preference, strict=False)),
        "ideal": dict(zip(names, ideal, strict=False)),
    }
    gap = f64(losses) - f64(ideal[: len(losses)])
    line = f64(preference[: len(losses)])
    cosine = torch.cosine_similarity(gap, line, dim=0)
    assume(len(losses) == 1 or (gap.norm() > 0 and cosine.abs() < 1 - 1e-9))
    agree(PBI(penalty, **options), pbi, [losses], rtol=1e-5, atol=1e-5, penalty=penalty, **options)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=4), positive, st.floats(0, 10))
def test_pbi_on_the_preferred_line_is_its_direction(preference, scale, penalty):
    weights = PBI(penalty, preference)(losses=scale * f64(preference))
    torch.testing.assert_close(weights, f64(preference) / f64(preference).norm())


@pytest.mark.parametrize("weighting", [PBI(preference={"a": 0.0, "b": 1.0}), COSMOS({"a": 0.0, "b": 1.0})])
def test_a_preference_for_no_task_present_raises(weighting):
    with pytest.raises(MTLWeightError, match="expected a preference > 0 for one of the tasks a at least"):
        run(weighting, [{"a": 1.0}])


@pytest.mark.parametrize("kind", [STCH, PBI, COSMOS])
@pytest.mark.parametrize("preference", [-1.0, {"a": -1.0}, "abc", math.nan, [1.0, math.inf]])
def test_a_preference_is_made_of_finite_numbers_of_zero_or_more(kind, preference):
    with pytest.raises(MTLWeightError, match=rf"{kind.__name__}: expected preference as a finite number >= 0"):
        kind(preference=preference)


@pytest.mark.parametrize("kind", [STCH, PBI, COSMOS])
def test_a_task_without_a_preference_is_named(kind):
    with pytest.raises(MTLWeightError, match=rf"{kind.__name__}: expected preference for each task, found none for b"):
        run(kind(preference={"a": 1.0}), [{"a": 1.0, "b": 1.0}])


@pytest.mark.parametrize("kind", [STCH, PBI, COSMOS])
def test_preferences_in_order_need_all_tasks(kind):
    with pytest.raises(MTLWeightError, match=rf"{kind.__name__}: expected 2 tasks.*found 1 \(0\)"):
        kind(preference=[1.0, 2.0])(losses=torch.ones(1))


def test_a_mapping_given_as_preference_is_copied():
    preference = {"0": 1.0, "1": 1.0}
    weighting = STCH(preference=preference)
    preference["0"] = 5.0
    assert weighting(losses=torch.ones(2)).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: STCH(0.0), "STCH: expected a finite smoothing > 0"),
        (lambda: STCH(math.inf), "STCH: expected a finite smoothing > 0"),
        (lambda: STCH(form="other"), "STCH: expected form"),
        (lambda: STCH(period=0), "STCH: expected period >= 1"),
        (lambda: STCH(ideal=math.nan), "STCH: expected ideal"),
        (lambda: PBI(-1.0), "PBI: expected a finite penalty >= 0"),
        (lambda: PBI(ideal=math.nan), "PBI: expected ideal"),
        (lambda: COSMOS(penalty=-1.0), "COSMOS: expected a finite penalty >= 0"),
    ],
)
def test_hyperparameters_out_of_range_raise(make, match):
    with pytest.raises(MTLWeightError, match=match):
        make()
