"""TrimmedMean, MoCo, ExcessMTL: from the tasks' gradients, entry by entry and over the steps."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mtlweight import ExcessMTL, MoCo, MTLWeightError, TrimmedMean
from tests.oracles import excess_mtl, moco, trimmed_mean
from tests.weightings._run import run_rows


@st.composite
def jacobians(draw, steps=1, least=1, exponents=(-10, 10)):
    m, n = draw(st.integers(least, 5)), draw(st.integers(1, 4))
    scale = 10.0 ** draw(st.integers(*exponents))
    elements = st.integers(-3, 3)
    count = draw(st.integers(1, steps))
    return [scale * torch.from_numpy(draw(arrays(np.float64, (m, n), elements=elements))) for _ in range(count)]


def agree(found, expected, rtol=1e-7, atol=0.0):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@given(jacobians(), st.floats(0, 0.49))
def test_the_trimmed_mean_agrees_with_the_oracle(rows, fraction):
    agree(run_rows(TrimmedMean(fraction), rows)[0], trimmed_mean.weights([{"jacobian": rows[0]}], None, fraction))


@given(jacobians(), st.floats(0, 0.49))
def test_the_step_is_the_mean_of_the_middle_values(rows, fraction):
    (J,) = rows
    m = len(J)
    k = min(math.ceil(round(fraction * m, 9)), (m - 1) // 2)
    step = (TrimmedMean(fraction)(jacobian=J) * J).sum(dim=0)
    torch.testing.assert_close(step, J.sort(dim=0).values[k : m - k].mean(dim=0), rtol=1e-9, atol=1e-9 * J.abs().max())


@given(jacobians(least=3), st.integers(0, 4), st.floats(1, 6))
def test_one_outlier_cannot_move_the_trimmed_mean_out_of_the_others_range(rows, place, exponent):
    (J,) = rows
    J = J.clone()
    others = torch.cat([J[: place % len(J)], J[place % len(J) + 1 :]])
    J[place % len(J)] *= 10.0**exponent
    step = (TrimmedMean()(jacobian=J) * J).sum(dim=0)
    slack = 1e-9 * others.abs().max()
    assert (step >= others.min(dim=0).values - slack).all()
    assert (step <= others.max(dim=0).values + slack).all()


@pytest.mark.parametrize(("m", "fraction", "k"), [(30, 0.1, 3), (10, 0.1, 1), (11, 0.1, 2), (2, 0.4, 0), (5, 0.49, 2)])
def test_the_number_of_trimmed_values(m, fraction, k):
    weights = TrimmedMean(fraction)(jacobian=torch.arange(m, dtype=torch.float64)[:, None])[:, 0]
    assert int((weights == 0).sum()) == 2 * k
    assert weights.sum().item() == pytest.approx(1.0)


@given(jacobians(steps=5, exponents=(-3, 3)), st.floats(0.1, 1), st.floats(0.01, 1), st.floats(0, 1))
def test_moco_agrees_with_the_oracle(rows, tracking, step_size, ridge):
    # A step longer than the curvature allows leaps from corner to corner of the simplex and multiplies rounding.
    step_size /= max(1.0, *(float((J @ J.T).abs().max()) for J in rows))
    options = {"tracking": tracking, "step_size": step_size, "ridge": ridge}
    expected = moco.weights([{"jacobian": J} for J in rows], None, **options)
    for J, a, b in zip(rows, run_rows(MoCo(**options), rows)[0], expected, strict=True):
        size = max(float(K.abs().max()) for K in rows) / float(J[J != 0].abs().min()) if J.any() else 0.0
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8 * size)


@given(jacobians(steps=5, exponents=(-3, 3)), st.lists(st.floats(0, 10), min_size=25, max_size=25))
def test_the_official_moco_agrees_with_the_oracle(rows, values):
    m = len(rows[0])
    losses = [torch.tensor(values[m * k : m * k + m], dtype=torch.float64) for k in range(len(rows))]
    steps = [{"jacobian": J, "losses": row} for J, row in zip(rows, losses, strict=True)]
    expected = moco.weights(steps, None, form="official")
    for J, a, b in zip(rows, run_rows(MoCo(form="official"), rows, losses)[0], expected, strict=True):
        size = 10 / float(J[J != 0].abs().min()) if J.any() else 0.0
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8 * size)


@given(jacobians(steps=5, exponents=(0, 0)))
def test_mocos_step_is_the_tracked_gradients_combination_wherever_a_gradient_is_not_zero(rows):
    weights, states = run_rows(MoCo(), rows)
    for J, W, state in zip(rows, weights, states, strict=True):
        tracked = torch.stack([state["gradient"][str(t)] for t in range(len(J))])
        shares = torch.stack([state["weight"][str(t)] for t in range(len(J))])
        assert shares.min() >= 0
        assert shares.sum().item() == pytest.approx(1.0)
        some = (J != 0).any(dim=0)
        torch.testing.assert_close((W * J).sum(dim=0)[some], (shares @ tracked)[some])
        assert (W[:, ~some] == 0).all()


def test_with_the_same_gradients_again_and_again_moco_goes_to_the_min_norm_point():
    J = torch.tensor([[1.0, 0.0], [0.0, math.sqrt(3.0)]], dtype=torch.float64)
    states = run_rows(MoCo(tracking=1.0), [J] * 1000)[1]
    assert [float(states[-1]["weight"][task]) for task in "01"] == pytest.approx([0.75, 0.25], abs=1e-2)


@settings(max_examples=200)
@given(jacobians(steps=5), st.floats(0.01, 3), st.integers(1, 3))
def test_excess_mtl_agrees_with_the_oracle(rows, step_size, warmup):
    expected = excess_mtl.weights([{"jacobian": J} for J in rows], None, step_size=step_size, warmup=warmup)
    agree(run_rows(ExcessMTL(step_size, warmup), rows)[0], expected, rtol=1e-6, atol=1e-12)


@given(jacobians(steps=5), st.integers(-10, 10))
def test_units_do_not_matter_to_excess_mtl(rows, exponent):
    scaled = [10.0**exponent * J for J in rows]
    agree(run_rows(ExcessMTL(), rows)[0], run_rows(ExcessMTL(), scaled)[0], atol=1e-9)


def test_excess_mtl_prefers_the_task_whose_gradients_do_not_shrink():
    rows = [torch.tensor([[1.0], [1.0]], dtype=torch.float64) * torch.tensor([[1.0], [0.5**k]]) for k in range(10)]
    history = run_rows(ExcessMTL(), rows)[0]
    assert history[0].tolist() == [0.5, 0.5]
    assert history[-1][0] > history[1][0] > 0.5


@pytest.mark.parametrize("warmup", [1, 2])
def test_a_gradient_of_zero_is_no_part_of_the_warm_up_of_excess_mtl(warmup):
    J, late = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [0.0]])
    rows = [k * J for k in range(1, warmup + 1)]
    late_rows = [late, *[row for kept in rows for row in (kept, late)], J]
    curves = run_rows(ExcessMTL(warmup=warmup), late_rows)[1][-1]["baseline"]
    expected = run_rows(ExcessMTL(warmup=warmup), [*rows, J])[1][-1]["baseline"]
    assert float(curves["1"]) == pytest.approx(float(expected["1"]))


def test_a_weight_of_excess_mtl_never_becomes_zero_for_good():
    large, small = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])
    J = torch.ones(2, 1)
    history, states = run_rows(ExcessMTL(step_size=1e4), [J, *[large] * 5, *[small] * 400])
    assert history[5].tolist() == [1.0, 0.0]
    assert states[5]["logit"]["1"].isfinite()
    assert history[-1].tolist() == [0.0, 1.0]


def test_the_present_tasks_of_excess_mtl_share_what_they_had():
    J = torch.tensor([[1.0], [2.0], [3.0]])
    rows = [J, 2 * J, J[:2], J]
    tasks = ["abc", "abc", "ab", "abcd"]
    rows[3] = torch.cat([J, J[:1]])
    history, states = run_rows(ExcessMTL(), rows, tasks=tasks)
    assert torch.equal(states[1]["logit"]["c"], states[2]["logit"]["c"])
    masses = [sum(float(states[k]["logit"][task].exp()) for task in "ab") for k in (1, 2)]
    assert masses[0] == pytest.approx(masses[1])
    assert history[3].sum().item() == pytest.approx(1.0)
    total = sum(float(logit.exp()) for logit in states[3]["logit"].values())
    assert total == pytest.approx(4.0)  # one a task


@pytest.mark.parametrize("weighting", [MoCo(), ExcessMTL()])
def test_another_number_of_parameters_is_explained(weighting):
    name = type(weighting).__name__
    with pytest.raises(MTLWeightError, match=f"{name} remembers each task's gradient: expected 2 .* found 3"):
        run_rows(weighting, [torch.ones(2, 2), torch.ones(2, 3)])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: TrimmedMean(0.5), r"TrimmedMean: expected fraction in \[0, 0.5\)"),
        (lambda: TrimmedMean(math.nan), "TrimmedMean: expected fraction"),
        (lambda: MoCo(0.0), r"MoCo: expected tracking in \(0, 1\]"),
        (lambda: MoCo(step_size=0.0), "MoCo: expected a finite step_size > 0"),
        (lambda: MoCo(ridge=-1.0), "MoCo: expected a finite ridge >= 0"),
        (lambda: MoCo(form="other"), "MoCo: expected form"),
        (lambda: ExcessMTL(0.0), "ExcessMTL: expected a finite step_size > 0"),
        (lambda: ExcessMTL(warmup=0), "ExcessMTL: expected warmup >= 1"),
    ],
)
def test_hyperparameters_out_of_range_raise(make, match):
    with pytest.raises(MTLWeightError, match=match):
        make()
