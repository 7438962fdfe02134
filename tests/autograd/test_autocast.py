"""Autocast around the whole step: it is for the user's model, not for what is measured of it."""

import contextlib

import pytest
import torch

from mtlweight import FAMO, IMTLG, MGDA, GradDrop, NashMTL, SLGrad
from tests.problems import Problem, same, wrap
from tests.zoo import close


def bfloat16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def trained(weighting, around, inside, *, give=lambda closure: closure, samples=False, penalty=None, **options):
    """Two steps: weights and gradients of each."""
    p = Problem(dtype=torch.float32)
    optimizer = wrap(p, weighting, shared=p.encoder, model=p.model, penalty=penalty, **options)
    found = []
    for k in range(2):

        def losses(k=k):
            with inside():
                return p.samples(k) if samples else p.losses(k)

        def reference():
            with inside():
                return p.reference()

        optimizer.zero_grad()
        with around():
            scalar = optimizer.combine(give(losses), reference=reference if weighting.reference else None)
        scalar.backward()
        with around():
            optimizer.step()
        found.append([optimizer.report.weights, optimizer.report.losses, optimizer.report.engine, p.gradients()])
    return found, p.parameters()


CASES = {
    "Gramian": (IMTLG(), {}),
    "Gramian of parts": (MGDA(), {"give": lambda closure: [closure, closure], "samples": True}),
    "Gramian of a few rows in one backward": (NashMTL(), {"engine": "batched"}),
    "Jacobian": (GradDrop(), {}),
    "forward": (SLGrad("left"), {"samples": True}),
    "pullback": (SLGrad("left"), {"samples": True, "engine": "pullback"}),
    "rows": (SLGrad("left"), {"samples": True, "engine": "rows"}),
    "one step ahead": (SLGrad("left", lookahead=True), {"samples": True}),
    "all one step ahead": (SLGrad("left", lookahead=True, samples_at="ahead"), {"samples": True}),
    "a look after the step": (FAMO(), {}),
    "a penalty": (IMTLG(), {"penalty": lambda losses, *_: sum(x * x for x in losses.values())}),
}


@pytest.mark.parametrize(("weighting", "options"), list(CASES.values()), ids=list(CASES))
def test_autocast_around_combine_is_as_autocast_around_the_model_alone(weighting, options):
    alone = trained(weighting, contextlib.nullcontext, bfloat16, **options)
    assert same(trained(weighting, bfloat16, contextlib.nullcontext, **options), alone)


def test_the_backward_of_measured_rows_may_be_inside_autocast():
    gradients = []
    for around in (contextlib.nullcontext, bfloat16):
        p = Problem(dtype=torch.float32)
        scalar = wrap(p, IMTLG(), shared=p.encoder).combine(p.losses())
        with around():
            scalar.backward()
        gradients.append(p.gradients())
    assert same(*gradients)


def test_three_similar_tasks_weigh_the_same_inside_autocast():
    p = Problem(("a", "b", "c"), dtype=torch.float32)
    x, y = p.batch()
    common = sum(y.values())
    weights = []
    for around in (contextlib.nullcontext, bfloat16):
        outputs = p.model.encoder(x) @ torch.ones(5)
        losses = {task: (outputs - common - 0.1 * y[task]).square().mean() for task in y}
        optimizer = wrap(p, IMTLG(), shared=p.encoder)
        with around():
            optimizer.combine(losses).backward()
        optimizer.step()
        p = Problem(("a", "b", "c"), dtype=torch.float32)
        weights.append(optimizer.report.weights)
    assert same(*weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_may_be_autocast_where_the_reference_is_not(dtype):
    """Numbers for which inner products of the data are beyond float16, and gradients are not."""
    found = []
    for around in (contextlib.nullcontext, lambda: torch.autocast("cpu", dtype)):
        p = Problem(dtype=torch.float32)
        p.encoder[0].weight.data.mul_(1e-3)
        batch = p.batch
        p.batch = lambda k=0, size=6, batch=batch: (300 * batch(k, size)[0], batch(k, size)[1])

        def losses(p=p, around=around):
            with around():
                return {task: loss.float() for task, loss in p.samples().items()}

        optimizer = wrap(p, SLGrad("left"), shared=p.encoder)
        optimizer.combine(losses, reference=lambda p=p: 1e-4 * p.reference()).backward()
        optimizer.step()
        assert optimizer.report.engine == "forward"
        found.append(optimizer.report.alignment)
    assert close(found[1], found[0], 0.1)
