"""SoftAdapt, ReLoBRaLo, CoV, SLAW: weights from how the losses changed over the steps."""

import math

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from mtlweight import SLAW, CoV, MTLWeightError, ReLoBRaLo, SoftAdapt, View
from mtlweight._statistics import Given
from tests.oracles import cov, relobralo, slaw, softadapt
from tests.weightings._run import run

positive = st.floats(-12, 12).map(lambda e: 10.0**e)
nearby = st.floats(0.1, 10)


def batches(elements, m=3, least=1, most=7):
    return st.lists(st.lists(elements, min_size=m, max_size=m), min_size=least, max_size=most)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def agree(weighting, oracle, rows, rtol=1e-7, seed=3, **hyperparameters):
    steps = [{"losses": f64(row)} for row in rows]
    generators = [View(Given(**step), step=k, seed=seed).generator for k, step in enumerate(steps)]
    expected = oracle.weights(steps, generators, **hyperparameters)
    for a, b in zip(run(weighting, rows, seed=seed)[0], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-9)


@given(
    batches(nearby),
    st.sampled_from(["original", "normalized", "loss-weighted"]),
    st.integers(1, 4),
    st.sampled_from(["newest", "oldest"]),
    st.floats(-5, 5),
)
def test_softadapt_agrees_with_the_oracle(rows, variant, order, slope_at, sharpness):
    options = {"sharpness": sharpness, "variant": variant, "order": order, "slope_at": slope_at}
    agree(SoftAdapt(**options), softadapt, rows, **options)


@pytest.mark.parametrize(("order", "expected"), [(1, [-1, 1]), (3, [-11 / 6, 3, -3 / 2, 1 / 3])])
def test_the_oldest_slopes_coefficients_are_the_official_codes(order, expected):
    assert SoftAdapt(order=order, slope_at="oldest")._coefficients() == pytest.approx(expected)


@given(st.floats(-3, 3), st.floats(-3, 3), st.integers(2, 4))
def test_the_slope_of_a_parabola_is_exact(a, b, order):
    rows = [[a * k**2 + b * k, 0.0] for k in range(order + 1)]
    slope = 2 * a * order + b  # at the newest loss
    weights = run(SoftAdapt(1.0, order=order), rows)[0][-1]
    assert weights[0].item() == pytest.approx(1 / (1 + math.exp(-slope)))


@given(batches(positive, least=2))
def test_without_sharpness_softadapt_is_equal(rows):
    assert run(SoftAdapt(0.0), rows)[0][-1].tolist() == pytest.approx([1 / 3] * 3)


@given(batches(st.floats(-1e12, 1e12)), st.sampled_from(["original", "normalized"]))
def test_softadapt_takes_losses_of_any_sign_and_size(rows, variant):
    for weights in run(SoftAdapt(variant=variant), rows)[0]:
        assert weights.sum().item() == pytest.approx(1.0)


def test_softadapt_prefers_the_task_that_rises():
    weights = run(SoftAdapt(), [[1.0, 1.0, 1.0], [2.0, 1.0, 0.5]])[0][-1]
    assert weights[0] > weights[1] > weights[2]


def test_losses_of_zero_are_weighted_equally():
    assert run(SoftAdapt(variant="loss-weighted"), [[0.0, 0.0]] * 2)[0][-1].tolist() == [0.5, 0.5]
    assert run(SoftAdapt(variant="loss-weighted"), [[0.0, 3.0]] * 2)[0][-1].tolist() == [0.0, 1.0]


@given(batches(positive | st.just(0.0)), st.floats(0, 0.99), st.floats(0.1, 10), st.floats(0, 1))
@example([[1.0, 0.0, 2.0], [0.0, 1.0, 2.0], [1.0, 1.0, 2.0]], 0.5, 1.0, 0.5)
def test_relobralo_agrees_with_the_oracle(rows, decay, temperature, memory):
    options = {"decay": decay, "temperature": temperature, "memory": memory}
    agree(ReLoBRaLo(**options), relobralo, rows, **options)


@given(batches(nearby, least=3))
def test_relobralo_prefers_the_task_that_progressed_least(rows):
    weights = run(ReLoBRaLo(decay=0.0), rows)[0][-1]
    ratios = f64(rows[-1]) / f64(rows[-2])
    assert weights[ratios.argmax()] == weights.max()
    assert weights.sum().item() == pytest.approx(3.0)


@given(batches(nearby, least=4), st.floats(0.1, 0.9))
def test_relobralo_without_memory_always_looks_back_to_the_first_losses(rows, decay):
    weights = run(ReLoBRaLo(decay, memory=0.0), rows)[0][-1]

    def balance(before):
        return 3 * (f64(rows[-1]) / f64(before)).softmax(dim=0)

    torch.testing.assert_close(weights, decay * balance(rows[0]) + (1 - decay) * balance(rows[-2]))


@given(batches(positive | st.just(0.0)), st.sampled_from([0.0, 1e-8]))
@example([[1.0, 0.0, 2.0], [0.0, 0.0, 2.0], [1.0, 1.0, 2.0], [1.0, 1.0, 2.0]], 0.0)
def test_cov_agrees_with_the_oracle(rows, floor):
    steps = [{"losses": f64(row)} for row in rows]
    for a, b in zip(run(CoV(floor), rows)[0], cov.weights(steps, None, variance_floor=floor), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@given(batches(nearby, least=4), nearby)
def test_cov_gives_a_loss_that_does_not_change_nothing(rows, constant):
    rows = [[constant, *row[1:]] for row in rows]
    assume(any(row[1] != rows[0][1] for row in rows[:-1]))
    assert run(CoV(), rows)[0][-1][0].item() == pytest.approx(0.0, abs=1e-7)


def test_cov_of_losses_that_never_change_is_equal():
    assert run(CoV(), [[1.0, 2.0]] * 5)[0][-1].tolist() == [0.5, 0.5]


def test_a_task_that_joins_has_its_share_in_cov_for_two_steps():
    rows = [{"a": 1.0, "b": 2.0}, {"a": 2.0, "b": 2.1}, {"a": 1.0, "b": 2.2}]
    rows += [{"a": 1.5, "b": 2.0, "c": 5.0}, {"a": 1.0, "b": 2.5, "c": 4.0}, {"a": 1.0, "b": 2.0, "c": 4.0}]
    weights = run(CoV(), rows)[0]
    without = run(CoV(), [{task: row[task] for task in "ab"} for row in rows])[0]
    for k in (3, 4):
        assert weights[k][2].item() == pytest.approx(1 / 3)
        torch.testing.assert_close(weights[k][:2], 2 / 3 * without[k])
    assert weights[5][2].item() != pytest.approx(1 / 3)


@given(batches(positive | st.just(0.0)), st.sampled_from([0.5, 0.9, 0.99]))
@example([[1.0, 0.0, -2.0], [3.0, 0.0, 2.0], [1.0, 0.0, -2.0], [1.0, 0.0, 2.0]], 0.5)
def test_slaw_agrees_with_the_oracle(rows, decay):
    agree(SLAW(decay), slaw, rows, decay=decay)


@given(batches(nearby, least=3), positive)
def test_a_tasks_unit_divides_its_weight_in_slaw(rows, factor):
    assume(all(len({row[t] for row in rows}) > 1 for t in range(3)))
    weights = run(SLAW(), rows)[0][-1]
    scaled = run(SLAW(), [[factor * row[0], *row[1:]] for row in rows])[0][-1]
    torch.testing.assert_close(factor * scaled[0] / scaled[1], weights[0] / weights[1], rtol=1e-6, atol=0.0)


def test_slaw_estimates_the_gradients_norms():
    # ℓ_t = g_t · θ on a random walk of θ: the standard deviations of the losses are as the norms of the gradients.
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 50, generator=generator, dtype=torch.float64) * f64([[1.0], [10.0], [0.1]])
    points = torch.randn(4000, 50, generator=generator, dtype=torch.float64)
    weights = run(SLAW(decay=0.9995), (points @ rows.T).tolist())[0][-1]
    inverse = 1 / rows.norm(dim=1)
    torch.testing.assert_close(weights, 3 * inverse / inverse.sum(), rtol=0.05, atol=0.0)


def test_slaw_of_losses_that_were_always_zero_is_one():
    assert run(SLAW(), [[0.0, 1.0, 2.0], [0.0, 2.0, 4.0]])[0][-1].tolist() == pytest.approx([1.0, 4 / 3, 2 / 3])


def test_a_long_run_keeps_slaw_within_its_bounds():
    history, states = run(SLAW(decay=0.9), [[k % 3 + 1.0, k % 2 + 1.0] for k in range(200)])
    assert float(states[-1]["count"]["0"]) == pytest.approx(11.0)
    assert history[-1].sum().item() == pytest.approx(2.0)


@pytest.mark.parametrize(
    "weighting",
    [ReLoBRaLo(), CoV(), SoftAdapt(variant="loss-weighted")],
    ids=lambda weighting: type(weighting).__name__,
)
def test_a_negative_loss_is_named(weighting):
    with pytest.raises(MTLWeightError, match=rf"{type(weighting).__name__}: expected losses >= 0.*found b = -2\."):
        run(weighting, [{"a": 1.0, "b": -2.0}])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: SoftAdapt(math.inf), "SoftAdapt: expected a finite sharpness"),
        (lambda: SoftAdapt(order=0), "SoftAdapt: expected order >= 1"),
        (lambda: SoftAdapt(variant="other"), "SoftAdapt: expected variant"),
        (lambda: SoftAdapt(slope_at="other"), "SoftAdapt: expected slope_at"),
        (lambda: ReLoBRaLo(1.0), r"ReLoBRaLo: expected decay in \[0, 1\)"),
        (lambda: ReLoBRaLo(temperature=0.0), "ReLoBRaLo: expected a finite temperature > 0"),
        (lambda: ReLoBRaLo(memory=1.5), r"ReLoBRaLo: expected memory in \[0, 1\]"),
        (lambda: CoV(-1.0), "CoV: expected a finite variance_floor >= 0"),
        (lambda: SLAW(1.0), r"SLAW: expected decay in \[0, 1\)"),
        (lambda: SLAW(floor=0.0), r"SLAW: expected floor in \(0, 1\)"),
    ],
)
def test_hyperparameters_out_of_range_raise(make, match):
    with pytest.raises(MTLWeightError, match=match):
        make()
