"""Extremes of scale and shape through the whole optimizer: a finite step that keeps every claim, or a clear error."""

import pytest
import torch

from mtlweight import MTLWeightError, MultiTaskOptimizer
from mtlweight.testing._conformance import per_sample
from tests.optimizer.registered import (
    TASKS,
    Rounded,
    combined,
    engines_of,
    every_engine,
    every_weighting,
    statistics,
    tasks_of,
    wrapped,
)
from tests.registry import BY_READING


def near(found, expected, rtol):
    """Equal to rounding, relative to the largest entry; zero to zero."""
    return bool((found - expected).abs().max() <= rtol * expected.abs().max())


def flat(tensors):
    return torch.cat([torch.zeros(0, dtype=torch.float64), *(t.flatten().double() for t in tensors if t is not None)])


def finite(optimizer):
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = [optimizer.report.weights, *parameters, *(p.grad for p in parameters if p.grad is not None)]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


# Scale


def trained(case, scale, lr, reference_scale=1.0):
    """The gradient over the shared parameters and the weights, of two steps."""
    p = Rounded(tasks_of(case), torch.float32)
    optimizer = wrapped(p, case.weighting, lr=lr)
    found = []
    for k in range(2):
        combined(optimizer, p, k, scale, reference_scale).backward()
        optimizer.step()
        assert finite(optimizer), k
        found.append((flat(q.grad for q in p.encoder.parameters()), optimizer.report.weights))
    return found


@pytest.mark.parametrize("power", [-40, 40])  # a trillion
@every_engine
def test_statistics_have_exactly_the_scale_of_losses_and_reference(engine, power):
    found, plain = (statistics(Rounded(TASKS, torch.float32), engine, scale, scale) for scale in (2.0**power, 1.0))
    for name, values in plain.items():
        squared = name in ("gramian", "alignment")
        assert near(found[name], 2.0 ** (power + squared * power) * values.double(), 1e-6), name


@every_weighting
def test_a_step_is_finite_for_losses_of_every_scale_and_for_the_invariant_the_same(case):
    degree, use = case.weighting.traits.scale_degree, case.weighting.reference
    # The step is as long at every scale; but heads have steps of their own beside weights per entry.
    lr = 0.0 if case.weighting.writes == "entry" else 0.1
    plain = trained(case, 1.0, lr)
    for scale in (2.0**-40, 2.0**40):
        trained(case, scale, 0.0, reference_scale=scale)
        learnt = scale if use and use.learn else 1.0
        found = trained(case, scale, lr / scale ** (1 + (degree or 0)), reference_scale=learnt)
        if degree is not None:
            for (gradient, weights), (g, w) in zip(found, plain, strict=True):
                assert near(weights, scale**degree * w, 1e-6), scale
                assert near(gradient, scale ** (1 + degree) * g, 1e-6), scale


@pytest.mark.parametrize(
    "case", [case for case in BY_READING if case.weighting.reference and case.weighting.reference.unit]
)
def test_a_reference_whose_norm_is_taken_out_counts_the_same_at_every_scale(case):
    plain, *others = (trained(case, 1.0, 0.1, reference_scale=2.0**power) for power in (0, -80, 40))
    for found in others:
        for (_, weights), (_, w) in zip(found, plain, strict=True):
            assert near(weights, w, 1e-6)


@every_weighting
def test_a_step_is_finite_where_one_tasks_losses_are_a_trillionth_and_anothers_a_trillion(case):
    p = Rounded(tasks_of(case), torch.float32)
    optimizer = wrapped(p, case.weighting, lr=2.0**-50)
    scales = {task: 2.0 ** (-40 if i % 2 else 40) for i, task in enumerate(p.tasks)}
    for k in range(2):
        combined(optimizer, p, k, scales).backward()
        optimizer.step()
        assert finite(optimizer)


# Shape


class Linear(torch.nn.Module):
    """Losses 1 + A θ: their gradients over the shared parameters are A's rows. The 1 and a number a task are heads."""

    def __init__(self, m, n, b, kind):
        super().__init__()
        self.shared = torch.nn.Linear(n, 1, bias=False)
        torch.nn.init.zeros_(self.shared.weight)
        self.level, self.heads = torch.nn.Parameter(torch.ones(())), torch.nn.Parameter(torch.zeros(m))
        rows = torch.randn(m, b, n, generator=torch.Generator().manual_seed(1)) / 16
        first = rows[:1].expand(m, b, n)
        signs = torch.tensor([1.0, -1.0]).repeat(m)[:m, None, None]
        self.rows = {"any": rows, "zero": 0 * rows, "equal": first, "opposed": signs * first}[kind]

    def losses(self, means):
        losses = self.level + self.shared(self.rows)[..., 0] + self.heads[:, None]
        return {str(t): loss for t, loss in enumerate((losses.mean(dim=1) if means else losses).unbind())}


SHAPES = [
    (1, 1, 3, "any"),
    (1, 3, 3, "zero"),
    (2, 3, 3, "zero"),
    (2, 3, 3, "equal"),
    (2, 3, 3, "opposed"),
    (2, 3, 1, "any"),
    (7, 1, 3, "any"),
    (7, 3, 3, "opposed"),
    (40, 60, 1, "any"),
    (128, 3, 3, "any"),
]


@every_weighting
def test_a_step_is_finite_and_keeps_every_claim_for_any_number_of_tasks_parameters_and_samples(case):
    weighting, samples = case.weighting, case.weighting.traits.samples
    for m, n, b, kind in SHAPES:
        if m not in case.tasks and not min(case.tasks) <= m <= 128 * (8 in case.tasks):
            continue
        for engine in engines_of(weighting) if m == 1 else ["auto"]:
            p = Linear(m, n, b, kind)
            inner = torch.optim.SGD(p.parameters(), lr=1e-3)
            optimizer = MultiTaskOptimizer(inner, weighting, shared=p.shared, model=p, engine=engine)
            reference = (lambda p=p: p.losses(True)["0"]) if weighting.reference else None

            def losses(p=p):
                return p.losses(not per_sample(weighting))

            for _ in range(2 if m < 7 else 1):
                optimizer.zero_grad()
                if b < samples:
                    with pytest.raises(MTLWeightError, match=f"expected at least {samples} samples a task, found {b}"):
                        optimizer.combine(losses, reference=reference)
                    break
                optimizer.combine(losses, reference=reference).backward()
                optimizer.step()
                assert finite(optimizer), (m, n, b, kind, engine)
                keeps_claims(optimizer, p, kind)


def keeps_claims(optimizer, p, kind):
    traits, weights = optimizer.weighting.traits, optimizer.report.weights
    m, step = len(p.heads), flat([p.shared.weight.grad])
    jacobian = p.rows.mean(dim=1).double()
    lengths = jacobian.norm(dim=1)
    each = weights if weights.ndim == 1 else weights.sum(dim=1)
    reach = max(float((each.abs() * lengths).sum()), 1e-300)
    assert not traits.nonnegative or (weights >= 0).all()
    if traits.total is not None and weights.abs().sum() > 0:
        assert float(each.sum()) == pytest.approx(m if traits.total == "m" else traits.total, rel=1e-6)
    if traits.nonconflicting:
        assert (jacobian @ step >= -1e-5 * lengths * reach).all()
    if kind == "zero" or (kind == "opposed" and m > 1 and traits.stationary is not None):
        assert step.norm() <= 1e-5 * reach
    if kind == "equal" and traits.nonnegative and weights.ndim == 1:
        assert near(step, each.sum() * jacobian[0], 1e-5)
