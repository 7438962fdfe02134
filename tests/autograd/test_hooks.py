"""Hooks of parameters: they run once, on what the backward of the step brings, whatever was measured before it."""

import copy
import warnings

import pytest
import torch

from mtlweight import MGDA, UW, Constant, GradDrop, MoCo, MultiTaskOptimizer, SLGrad, every
from tests.batch.test_look_ahead import looking, wrapped
from tests.zoo import NETWORKS, close, combined, jacobian, on_samples, optimizer_for, oracle, problem, written

ENGINES = ("forward", "pullback", "samples", "rows")
CASES = {
    "losses": (UW(), "task_losses", {}),
    "rows": (MGDA(), "task_losses", {"engine": "rows"}),
    "batched": (MGDA(), "task_losses", {"engine": "batched"}),
    "samples": (MGDA(), "sample_losses", {"engine": "samples"}),
    "features": (MGDA(), "task_losses", {"engine": "features"}),
    "rows, unweighted heads": (MGDA(), "task_losses", {"heads": "unweighted"}),
    "losses, unweighted heads": (Constant([2.0, 0.5]), "task_losses", {"heads": "unweighted"}),
    "Jacobian": (MoCo(), "task_losses", {}),
    "entries": (GradDrop(), "task_losses", {}),
    "some steps": (every(2, MGDA()), "task_losses", {}),
    **{f"alignments, {e}": (on_samples, "sample_losses", {"engine": e}) for e in ENGINES},
    "a reference that teaches": (SLGrad("left", learn_reference=True), "sample_losses", {}),
}


def hooked(p, hook=lambda gradient: -gradient.clamp(-0.05, 0.1)):
    """The problem's parameters with a hook that no sum of gradients commutes with, and how often each one ran."""
    runs = dict.fromkeys(range(len([*p.model.parameters()])), 0)

    def each(k):
        def run(gradient):
            runs[k] += 1
            return hook(gradient)

        return run

    for k, parameter in enumerate(p.model.parameters()):
        parameter.register_hook(each(k))
    return runs


def taken(p, weighting, losses, parts=None, **options):
    """The gradients of one step."""
    losses = getattr(p, losses)
    whole = {"shared": p.model.encoder, "model": p.model, **options}
    optimizer = MultiTaskOptimizer(torch.optim.SGD(p.model.parameters(), lr=0.0), weighting, **whole)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        given = losses if parts is None else parts(losses)
        optimizer.combine(
            given, reference=p.reference if weighting.reference or weighting is on_samples else None
        ).backward()
    return [q.grad for q in p.model.parameters()]


@pytest.mark.parametrize("case", CASES)
def test_hooks_run_once_on_the_weighted_gradient(case):
    weighting, losses, options = CASES[case]
    p, plain = problem(NETWORKS["linear"]), problem(NETWORKS["linear"])
    runs = hooked(p)
    found, expected = taken(p, weighting, losses, **options), taken(plain, weighting, losses, **options)
    assert all(close(a, -b.clamp(-0.05, 0.1)) for a, b in zip(found, expected, strict=True))
    assert {*runs.values()} == {1}


@pytest.mark.parametrize("weighting", [UW(), SLGrad("left")], ids=repr)
def test_hooks_run_once_for_losses_in_parts(weighting):
    def parts(losses):
        return [
            lambda: {task: loss[:2] for task, loss in losses().items()},
            lambda: {task: loss[2:] for task, loss in losses().items()},
        ]

    p, plain = problem(NETWORKS["linear"]), problem(NETWORKS["linear"])
    runs = hooked(p)
    found, expected = (taken(q, weighting, "sample_losses", parts) for q in (p, plain))
    assert all(close(a, -b.clamp(-0.05, 0.1)) for a, b in zip(found, expected, strict=True))
    assert {*runs.values()} == {1}


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_what_is_measured_is_before_the_hooks_for_every_engine(engine):
    p, plain = problem(NETWORKS["linear"]), problem(NETWORKS["linear"])
    hooked(p)
    report = combined(p, optimizer_for(p, on_samples, engine=engine), p.sample_losses)
    assert report.engine == ("forward" if engine == "auto" else engine)
    assert not report.fallbacks
    assert close(report.alignment, oracle(plain, "sample_losses"))


def test_a_step_ahead_is_along_what_the_hooks_make_of_the_gradient():
    """As the step itself: three times the gradient is three times the learning rate."""
    p, fast = problem(NETWORKS["linear"]), problem(NETWORKS["linear"])
    hooked(p, lambda gradient: 3 * gradient)
    found = combined(p, wrapped(p, looking("both"), lambda q: torch.optim.SGD(q, lr=0.01)), p.sample_losses)
    expected = combined(fast, wrapped(fast, looking("both"), lambda q: torch.optim.SGD(q, lr=0.03)), fast.sample_losses)
    assert close(found.alignment, expected.alignment)


def test_a_step_ahead_through_float16_shows_the_hooks_gradients_of_their_own_size():
    sizes = []
    for dtype in (torch.float32, torch.float16):
        torch.manual_seed(0)
        encoder, x = torch.nn.Linear(3, 4).to(dtype), torch.randn(6, 3).to(dtype)
        seen = []
        encoder.weight.register_hook(lambda g, seen=seen: seen.append(float(g.abs().max())))
        optimizer = MultiTaskOptimizer(
            torch.optim.SGD(encoder.parameters(), lr=0.01), SLGrad("a", lookahead=True), shared=encoder, model=encoder
        )

        def loss(encoder=encoder, x=x):
            return encoder(x).square().mean(dim=1)

        optimizer.combine(lambda loss=loss: {"a": loss()}, reference=loss)
        sizes.append(seen[0])
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)


def test_a_hook_that_is_removed_in_the_meantime_stays_removed():
    p = problem(NETWORKS["linear"])
    seen, first = [], p.shared[0]
    handle = first.register_hook(lambda _: seen.append("removed"))
    first.register_hook(lambda _: seen.append("kept"))
    p.model.heads["left"].register_full_backward_hook(lambda *_: handle.remove())
    taken(p, MGDA(), "task_losses", engine="rows")
    assert seen == ["kept"]


def test_hooks_are_as_they_were_also_after_an_error():
    p = problem(NETWORKS["linear"])
    runs = hooked(p)
    before = copy.copy(p.shared[0]._backward_hooks)
    losses = {task: loss.mean() for task, loss in p.sample_losses().items()}
    sum(losses.values()).backward()  # frees the graph, so that measuring fails
    with pytest.raises(Exception, match="freed"):
        optimizer_for(p, MGDA(), engine="rows").combine(losses)
    assert p.shared[0]._backward_hooks == before
    assert {*runs.values()} == {1}


def test_a_hook_of_an_output_changes_the_gradient_as_in_any_backward():
    p, other = problem(NETWORKS["linear"]), problem(NETWORKS["linear"])

    def losses(p):
        z = p.model.encoder(p.x)
        z.register_hook(lambda gradient: 2 * gradient)
        return {task: loss.mean() for task, loss in p.score(p.model.decode(z)).items()}

    optimizer = optimizer_for(p, MGDA())
    optimizer.combine(losses(p)).backward()
    optimizer.step()
    rows = jacobian(losses(other), other.shared)
    assert close(optimizer.report.gramian, rows @ rows.T)
    assert close(written(p.shared), optimizer.report.weights @ rows)


def test_a_hook_that_the_losses_register_runs_in_every_step():
    p, plain, ran = problem(NETWORKS["linear"]), problem(NETWORKS["linear"]), []

    def losses():
        p.model.encoder[0].weight.register_hook(lambda _: ran.append(1))
        return p.sample_losses()

    optimizer = optimizer_for(p, on_samples)
    for step in range(3):
        before = len(ran)
        report = combined(p, optimizer, losses)
        assert len(ran) > before, step
    assert report.engine == "forward"
    assert close(report.alignment, oracle(plain, "sample_losses"))
