"""The oracles on cases worked by hand from the papers, and the fast weightings against the oracles."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import mtlweight
from mtlweight import View
from mtlweight._statistics import Given
from mtlweight._weighting import evaluate
from tests.oracles import constant, dwa, equal, graddrop, gradnorm, mgda, pcgrad, rlw, slgrad, uw

SEED = 7


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def generators(steps):
    return [View(Given(**step), step=k, seed=SEED).generator for k, step in enumerate(steps)]


def fast(weighting, steps):
    """The library's weights over the same steps, the state handed on."""
    state, history = None, []
    for k, step in enumerate(steps):
        weights, state = evaluate(weighting, View(Given(**step), step=k, seed=SEED), state)
        history.append(weights)
    return history


def agree(weighting, oracle, steps, rtol=1e-9, atol=0.0, **hyperparameters):
    found = fast(weighting, steps)
    expected = oracle.weights(steps, generators(steps), **hyperparameters)
    assert len(found) == len(expected) == len(steps)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


positive = st.floats(1e-6, 1e6)


@st.composite
def loss_steps(draw, elements=positive, max_steps=6):
    m = draw(st.integers(1, 4))
    rows = draw(arrays(np.float64, (draw(st.integers(1, max_steps)), m), elements=elements))
    return [{"losses": torch.from_numpy(row.copy())} for row in rows]


@st.composite
def jacobians(draw, max_m=5, max_n=6):
    """Generic, conflicting, opposed, duplicate, zero and rank-one rows, in all proportions and at all scales."""
    m, n = draw(st.integers(1, max_m)), draw(st.integers(1, max_n))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    J = rng.standard_normal((m, n))
    for t in range(1, m):
        J[t] = draw(st.sampled_from([J[t], J[t], J[t] - 2 * J[0], -J[0], J[0], 3 * J[0], 0 * J[0]]))
    exponents = draw(arrays(np.float64, (m, 1), elements=st.integers(-2, 2)))
    return torch.from_numpy(J * 10**exponents * 10.0 ** draw(st.integers(-10, 15)))


# What the papers say, by hand.


def test_equal_weights_are_ones():
    assert equal.weights([{"losses": f64([5.0, 7.0])}] * 2, [None, None])[1].tolist() == [1.0, 1.0]


def test_constant_weights_are_given_by_number_by_order_or_by_name():
    step = {"losses": f64([5.0, 7.0])}
    assert constant.weights([step], [None], 2.0)[0].tolist() == [2.0, 2.0]
    assert constant.weights([step], [None], [1.0, 3.0])[0].tolist() == [1.0, 3.0]
    assert constant.weights([step], [None], {"1": 1.0, "0": 3.0})[0].tolist() == [3.0, 1.0]


def test_rlw_is_the_softmax_of_its_generators_first_draws():
    z = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (found,) = rlw.weights([{"losses": f64([1.0, 1.0, 1.0])}], [torch.Generator().manual_seed(3)])
    assert found.sum().item() == pytest.approx(1.0)
    assert (found[0] / found[2]).log().item() == pytest.approx((z[0] - z[2]).item())


@pytest.mark.parametrize(
    ("s", "loss", "step_size", "expected"),
    [
        (0.0, 1.0, 0.5, 0.0),  # at the minimum already
        (1.0, 0.0, 0.25, 1.0),  # no minimum: it rests
        (0.0, (1 + 1 / 0.5) * math.e, 0.5, 1.0),  # 1 = 0 - 0.5 (1 - exp(-1) 3 e)
        (2.0, 0.5, 4.0, 0.0),  # 0 = 2 - 4 (1 - 0.5)
    ],
)
def test_uw_takes_the_implicit_step(s, loss, step_size, expected):
    assert uw.implicit_step(s, loss, step_size) == pytest.approx(expected, abs=1e-14)


def test_uw_weighs_by_the_inverse_variance_before_its_step():
    first, second = uw.weights([{"losses": f64([0.5])}] * 2, [None, None], step_size=4.0, initial=2.0)
    assert first.item() == pytest.approx(math.exp(-2))
    assert second.item() == pytest.approx(1.0)


def test_dwa_is_equal_for_two_periods_and_then_the_softmax_of_the_ratios():
    steps = [{"losses": f64(row)} for row in ([4.0, 4.0], [2.0, 4.0], [9.0, 9.0])]
    found = dwa.weights(steps, [None] * 3, temperature=0.5)
    assert found[0].tolist() == found[1].tolist() == [1.0, 1.0]
    a, b = math.exp(0.5 / 0.5), math.exp(1 / 0.5)
    assert found[2].tolist() == pytest.approx([2 * a / (a + b), 2 * b / (a + b)])


def test_dwa_averages_over_a_period():
    steps = [{"losses": f64(row)} for row in ([3.0, 4.0], [5.0, 4.0], [1.0, 4.0], [3.0, 4.0], [0.0, 0.0])]
    found = dwa.weights(steps, [None] * 5, temperature=1.0, period=2)
    assert [row.tolist() for row in found[:4]] == [[1.0, 1.0]] * 4
    a, b = math.exp(2 / 4), math.exp(1)
    assert found[4].tolist() == pytest.approx([2 * a / (a + b), 2 * b / (a + b)])


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[2.0, 0.0], [0.0, 1.0]], [0.2, 0.8]),  # orthogonal: by the inverse squared norms
        ([[1.0, 0.0], [3.0, 0.0]], [1.0, 0.0]),  # eq. 5, clipped
        ([[1.0, 0.0], [-3.0, 0.0]], [0.75, 0.25]),  # opposed: they cancel
        ([[1.0, 1.0], [1.0, -1.0], [5.0, 0.0]], [0.5, 0.5, 0.0]),
        ([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], [0.25, 0.25, 0.5]),  # duplicates share
        ([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]], [0.0, 0.5, 0.5]),  # zero gradients share
    ],
)
def test_mgda_finds_the_shortest_combination(rows, expected):
    J = f64(rows)
    assert mgda.weights([{"gramian": J @ J.T}], [None])[0].tolist() == pytest.approx(expected, abs=1e-12)


def test_pcgrad_projects_each_of_two_opposing_gradients_on_the_others_normal_plane():
    J = f64([[1.0, 0.0], [-1.0, 1.0]])  # <g, h> = -1: g + h/2 = (.5, .5), h + g = (0, 1)
    for step in ({"jacobian": J}, {"gramian": J @ J.T}):
        (found,) = pcgrad.weights([step], generators([step]))
        assert found.tolist() == pytest.approx([2.0, 1.5])
        assert (found @ J).tolist() == pytest.approx([0.5, 1.5])


def test_pcgrad_takes_the_others_in_the_order_of_their_keys():
    J = f64([[1.0, 0.0], [-1.0, 2.0], [-1.0, -1.0]])
    seen = set()
    for seed in range(20):
        (found,) = pcgrad.weights([{"jacobian": J}], [torch.Generator().manual_seed(seed)])
        seen.add(tuple(round(x, 12) for x in found.tolist()))
    # Of g_0: (1, 0) + .2 g_1 = (.8, .4), + .6 g_2; or + .5 g_2 = (.5, -.5), + .3 g_1.
    # Of g_1: (-1, 2) + 1 g_0 = (0, 2), + 1 g_2; or + .5 g_2 = (-1.5, 1.5), + 1.5 g_0.
    # Of g_2: (-1, -1) + .2 g_1 = (-1.2, -.6), + 1.2 g_0; or + 1 g_0 = (0, -1), + .4 g_1.
    of_0, of_1, of_2 = [(1, 0.2, 0.6), (1, 0.3, 0.5)], [(1, 1, 1), (1.5, 1, 0.5)], [(1.2, 0.2, 1), (1, 0.4, 1)]
    possible = {
        tuple(round(sum(parts), 12) for parts in zip(a, b, c, strict=True)) for a in of_0 for b in of_1 for c in of_2
    }
    assert seen <= possible
    assert len(seen) > 3


def test_gradnorm_takes_weight_from_the_task_with_the_larger_norm():
    step = {"losses": f64([1.0, 1.0]), "gramian": f64([[9.0, 0.0], [0.0, 1.0]])}
    first, second = gradnorm.weights([step] * 2, [None, None], alpha=1.0, step_size=0.1)
    assert first.tolist() == [1.0, 1.0]
    # Norms 3 and 1, mean 2: slopes 3 and -1 over 2. Then 1 - .15 and 1 + .05, rescaled to the sum 2.
    assert second.tolist() == pytest.approx([2 * 0.85 / 1.9, 2 * 1.05 / 1.9])


def test_gradnorm_gives_weight_to_the_task_that_trains_slowly():
    gramian = f64([[1.0, 0.0], [0.0, 1.0]])
    steps = [{"losses": f64(row), "gramian": gramian} for row in ([2.0, 8.0], [1.0, 8.0], [1.0, 8.0])]
    found = gradnorm.weights(steps, [None] * 3, alpha=1.0, step_size=0.1)
    assert found[1].tolist() == [1.0, 1.0]  # nothing to do at first
    assert found[2].tolist() == pytest.approx([0.9, 1.1])  # progress 1/2 and 1, targets 2/3 and 4/3


def test_graddrop_keeps_the_drawn_sign():
    J = f64([[3.0, 1.0, 0.0], [-1.0, 2.0, -5.0]])
    draws = torch.rand(3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (found,) = graddrop.weights([{"jacobian": J}], [torch.Generator().manual_seed(0)], leak=0.25)
    positive_stays = draws[0].item() < 0.75  # P = (1 + 2/4) / 2
    assert found[:, 0].tolist() == ([1.0, 0.25] if positive_stays else [0.25, 1.0])
    assert found[:, 1].tolist() == [1.0, 1.0]
    assert found[1, 2].item() == 1.0


def test_slgrad_clamps_and_divides_by_the_total_over_tasks_and_samples():
    (found,) = slgrad.weights([{"alignment": f64([[3.0, -1.0], [0.0, 1.0]])}], [None], total=2.0)
    assert found.tolist() == [[1.5, 0.0], [0.0, 0.5]]
    (found,) = slgrad.weights([{"alignment": f64([[-3.0], [0.0]])}], [None])
    assert found.tolist() == [[0.0], [0.0]]


# The fast weightings agree with them.


@given(loss_steps())
def test_equal_agrees(steps):
    agree(mtlweight.Equal(), equal, steps)


@given(loss_steps(), st.floats(-3, 3))
def test_constant_agrees(steps, weight):
    m = len(steps[0]["losses"])
    for weights in (weight, [weight * t for t in range(m)], {str(t): weight + t for t in reversed(range(m))}):
        agree(mtlweight.Constant(weights), constant, steps, weights=weights)


@given(loss_steps())
def test_rlw_agrees(steps):
    agree(mtlweight.RLW(), rlw, steps, rtol=1e-12)


@given(
    loss_steps(st.floats(0.0, 1e12)),
    st.floats(-6, 6).map(lambda e: 10.0**e),
    st.floats(-5, 5),
)
def test_uw_agrees(steps, step_size, initial):
    found = fast(mtlweight.UW(step_size, initial), steps)
    expected = uw.weights(steps, generators(steps), step_size=step_size, initial=initial)
    for a, b in zip(found, expected, strict=True):
        assume(b.isfinite().all() and (b > 0).all())  # losses of 0 and huge steps leave what a float can hold
        torch.testing.assert_close(a.log(), b.log(), rtol=1e-12, atol=1e-12)


@given(
    loss_steps(st.floats(1e-6, 1e6) | st.just(0.0), max_steps=9),
    st.floats(0.1, 1e3),
    st.integers(1, 3),
)
@example([{"losses": f64([1e-6, 1.0])}, {"losses": f64([1e6, 1.0])}, {"losses": f64([1.0, 1.0])}], 0.1, 1)
def test_dwa_agrees(steps, temperature, period):
    agree(
        mtlweight.DWA(temperature, period),
        dwa,
        steps,
        rtol=1e-7,  # exp of ratios up to 1e13: their rounding counts
        atol=1e-12,
        temperature=temperature,
        period=period,
    )


@settings(max_examples=200)
@given(jacobians())
def test_mgda_agrees(J):
    step = {"gramian": J @ J.T}
    (found,), (expected,) = fast(mtlweight.MGDA(), [step]), mgda.weights([step], [None])
    norms = J.norm(dim=1)
    unit = expected @ norms
    torch.testing.assert_close(found @ J, expected @ J, rtol=0.0, atol=1e-7 * max(unit.item(), 1e-300))
    if unit > 0 and (expected @ J).norm() <= 1e-6 * unit:
        return  # where the gradients cancel, the step alone is unique
    if unit > 0:  # in units that a row's scale does not change
        torch.testing.assert_close(found * norms / unit, expected * norms / unit, rtol=0.0, atol=1e-4)
    else:
        torch.testing.assert_close(found, expected)


@settings(max_examples=200)
@given(st.lists(jacobians(), min_size=1, max_size=2), st.booleans())
def test_pcgrad_agrees(Js, from_vectors):
    steps = [{"gramian": J @ J.T} for J in Js]
    slow = [{"jacobian": J} for J in Js] if from_vectors else steps
    found = fast(mtlweight.PCGrad(), steps)
    expected = pcgrad.weights(slow, generators(slow))
    for J, a, b in zip(Js, found, expected, strict=True):
        norms = J.norm(dim=1)
        size = max(norms.max().item(), 1e-300)
        # Rounding may count as a conflict between rows that do not have one: it is small beside the largest row.
        atol = 1e-6 if J.shape[0] > J.shape[1] else 1e-9
        torch.testing.assert_close(a * norms / size, b * norms / size, rtol=0.0, atol=atol)


@settings(max_examples=200)
@given(
    st.integers(1, 4).flatmap(
        lambda m: st.lists(
            st.tuples(
                arrays(np.float64, m, elements=st.floats(1e-6, 1e6) | st.just(0.0)),
                arrays(np.float64, m, elements=st.floats(1e-3, 1e3) | st.just(0.0)),
            ),
            min_size=1,
            max_size=6,
        )
    ),
    st.floats(0, 3),
    st.sampled_from([0.025, 0.5, 5.0]),
)
def test_gradnorm_agrees(rows, alpha, step_size):
    steps = [{"losses": torch.from_numpy(a), "gramian": torch.from_numpy(n).square().diag()} for a, n in rows]
    agree(mtlweight.GradNorm(alpha, step_size), gradnorm, steps, atol=1e-9, alpha=alpha, step_size=step_size)


@given(st.lists(jacobians(), min_size=1, max_size=3), st.floats(0, 1))
def test_graddrop_agrees(Js, leak):
    steps = [{"jacobian": J} for J in Js]
    agree(mtlweight.GradDrop(leak), graddrop, steps, rtol=1e-12, leak=leak)


@given(
    arrays(np.float64, st.tuples(st.integers(1, 3), st.integers(1, 5)), elements=st.floats(-1e6, 1e6)),
    st.integers(-10, 15),
    st.floats(1e-3, 1e3),
)
def test_slgrad_agrees(alignment, exponent, total):
    alignment[abs(alignment) < 1e-100] = 0.0  # what little a float holds below 1e-308 has no relative precision
    step = {"alignment": torch.from_numpy(alignment) * 10.0**exponent}
    agree(mtlweight.SLGrad("0", total=total), slgrad, [step], rtol=1e-12, atol=1e-300, total=total)
