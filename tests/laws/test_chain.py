"""The laws of `>>`: a monoid, in which each link sees the problem weighted by those before it."""

from math import prod

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mtlweight import Constant, GradDrop, Needs, SLGrad, View, chain, weighting
from mtlweight._statistics import Given, gramian_of
from mtlweight._weighting import evaluate
from tests.laws.problems import SEED, factors, problems, run, same, steady, weightings


@given(weightings, weightings, weightings, problems())
def test_chain_is_associative(a, b, c, steps):
    expected = run(chain(a, b, c), steps)
    same(run((a >> b) >> c, steps), expected)
    same(run(a >> (b >> c), steps), expected)


@given(weightings, problems())
def test_constant_1_is_the_identity_on_both_sides(a, steps):
    expected = run(a, steps)
    same(run(Constant(1) >> a, steps), expected)
    same(run(a >> Constant(1), steps), expected)


@given(problems())
def test_constant_1_is_the_identity_of_a_weighting_per_entry_too(steps):
    expected = run(GradDrop(0.1), steps)
    same(run(Constant(1) >> GradDrop(0.1), steps), expected)
    same(run(GradDrop(0.1) >> Constant(1), steps), expected)


@given(arrays(np.float64, (2, 3), elements=st.floats(-10, 10)).map(torch.from_numpy))
def test_constant_1_is_the_identity_of_a_weighting_per_sample_too(alignment):
    steps = [{"alignment": alignment}]
    expected = run(SLGrad("0"), steps)
    same(run(Constant(1) >> SLGrad("0"), steps), expected)
    same(run(SLGrad("0") >> Constant(1), steps), expected)


@given(weightings)
def test_a_chain_of_one_is_that_one(a):
    assert chain(a) == a
    assert chain(chain(a)) == a


@given(st.lists(steady, min_size=2, max_size=4), problems())
def test_each_link_sees_the_problem_weighted_by_those_before_it(links, steps):
    states = [None for _ in links]
    expected = []
    for k, step in enumerate(steps):
        losses, J, alignment = step["losses"], step["jacobian"], step["alignment"]
        written = []
        for i, link in enumerate(links):
            given_now = Given(losses=losses, jacobian=J, alignment=alignment)
            w, states[i] = evaluate(link, View(given_now, step=k, seed=SEED), states[i])
            losses, J, alignment = w * losses, w[:, None] * J, w * alignment
            written.append(w)
        expected.append(prod(written))
    same(run(chain(*links), steps), expected, rtol=1e-6, atol=1e-9)  # solvers amplify rounding


@given(problems(steps=1))
def test_after_a_weighting_per_entry_the_next_link_sees_the_weighted_entries(steps):
    (step,) = steps
    seen = []

    @weighting(Needs.GRAMIAN | Needs.JACOBIAN)
    def look(view):
        seen.extend([view.gramian, view.jacobian])
        return torch.full((len(view.tasks),), 2.0, dtype=view.dtype)

    W = run(GradDrop(), steps)[0]
    same(run(GradDrop() >> look, steps), [2 * W])
    same(seen, [gramian_of(W * step["jacobian"]), W * step["jacobian"]], rtol=1e-12)


class PerSample:
    """A source with a gradient for each task and sample, ``[m, b, n]``."""

    device = torch.device("cpu")

    def __init__(self, losses, gradients, reference):
        self._losses, self._gradients, self._reference = losses, gradients, reference
        self.tasks = self.known = tuple(map(str, range(len(losses))))

    def losses(self):
        return self._losses

    def shares(self):
        return torch.full_like(self._losses, 1 / self._losses.shape[1])

    def jacobian(self, coefficients):
        c = self.shares() if coefficients is None else coefficients
        return (c[:, :, None] * self._gradients).sum(dim=1)

    def gramian(self, coefficients):
        return self.jacobian(coefficients) @ self.jacobian(coefficients).T

    def alignment(self):
        return self._gradients @ self._reference

    def reference_gradient(self):
        return self._reference


@st.composite
def samples(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    m, b, n = draw(st.integers(1, 3)), draw(st.integers(1, 4)), 5
    shapes = ((m, b), (m, b, n), n)
    source = PerSample(*(torch.from_numpy(rng.standard_normal(shape)) for shape in shapes))
    W, V = (draw(arrays(np.float64, (m, b), elements=st.floats(0.0, 10.0)).map(torch.from_numpy)) for _ in range(2))
    return source, W, V, draw(factors(m)), draw(factors(m))


def statistics(view):
    return [view.losses, view.gramian, view.jacobian, view.alignment]


def per_sample(view):
    return [view.sample_losses, view.sample_alignment]


@given(samples())
def test_scaling_by_tasks_scales_losses_rows_and_alignment_and_the_gramian_on_both_sides(data):
    source, _, _, w, _ = data
    plain, scaled = View(source), View(source).scaled(w)
    J = w[:, None] * plain.jacobian
    expected = [w * plain.losses, w[:, None] * plain.gramian * w[None, :], J, w * plain.alignment]
    same(statistics(scaled), expected, rtol=1e-12, atol=1e-12)
    same([scaled.gramian], [J @ J.T], rtol=1e-12, atol=1e-12)
    same(per_sample(scaled), [w[:, None] * each for each in per_sample(plain)], rtol=1e-12, atol=1e-300)


@given(samples())
def test_scaling_by_samples_makes_the_tasks_their_weighted_totals(data):
    source, W, _, _, _ = data
    plain, scaled = View(source), View(source).scaled(W)
    J = source.jacobian(W)
    totals = [(W * plain.sample_losses).sum(1), J @ J.T, J, (W * plain.sample_alignment).sum(1)]
    same(statistics(scaled), totals, rtol=1e-12, atol=1e-12)
    same(per_sample(scaled), [W * each for each in per_sample(plain)], rtol=1e-12, atol=1e-300)


@given(samples())
def test_scaled_twice_is_scaled_by_the_product(data):
    source, W, V, w, v = data
    pairs = [((w, v), w * v), ((W, V), W * V), ((w, W), w[:, None] * W), ((W, w), W * w[:, None])]
    for (first, second), product in pairs:
        twice, once = View(source).scaled(first).scaled(second), View(source).scaled(product)
        same(statistics(twice), statistics(once), rtol=1e-11, atol=1e-11)
        same(per_sample(twice), per_sample(once), rtol=1e-11, atol=1e-300)


@given(samples(), st.data())
def test_entries_scaled_twice_are_scaled_by_the_product(data, draw):
    source, _, _, w, _ = data
    entries = arrays(np.float64, source.jacobian(None).shape, elements=st.floats(-3, 3)).map(torch.from_numpy)
    E, F = draw.draw(entries), draw.draw(entries)
    pairs = [((E, F), E * F), ((w, E), w[:, None] * E), ((E, w), w[:, None] * E)]
    for (first, second), product in pairs:
        levels = ["task" if weights.ndim == 1 else "entry" for weights in (first, second)]
        twice = View(source).scaled(first, levels[0]).scaled(second, levels[1])
        once = View(source).scaled(product, "entry")
        for name in ("gramian", "jacobian", "alignment"):
            same([getattr(twice, name)], [getattr(once, name)], rtol=1e-10, atol=1e-10)


@given(weightings, problems())
def test_one_sample_a_task_counts_as_the_task(a, steps):
    columns = [{**step, "losses": step["losses"][:, None], "alignment": step["alignment"][:, None]} for step in steps]
    same(run(a, columns), run(a, steps))
    for column, step in zip(columns, steps, strict=True):
        one, scalar = View(Given(**column)), View(Given(**step))
        same([one.losses, one.alignment], [scalar.losses, scalar.alignment])
