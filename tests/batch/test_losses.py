"""What combine accepts, and what its scalar is: values, gradients, absent tasks, heads and shared parameters."""

import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mtlweight import (
    DWA,
    MGDA,
    RLW,
    UW,
    Constant,
    Equal,
    GradDrop,
    GradNorm,
    MultiTaskOptimizer,
    Needs,
    PCGrad,
    SLGrad,
    ema,
    weighting,
)
from tests.problems import Problem, own, same, same_numbers, step, wrap

TASKS = ("a", "b", "c")


# Forms

FORMS = {
    "tensor": lambda losses: torch.stack(list(losses().values())),
    "callable of a mapping": lambda losses: losses,
    "callable of a tensor": lambda losses: lambda: torch.stack(list(losses().values())),
    "mapping with absent tasks": lambda losses: {**losses(), "absent": None},
}
forms = pytest.mark.parametrize("form", list(FORMS.values()), ids=list(FORMS))


@forms
@pytest.mark.parametrize("per_sample", [False, True], ids=["scalars", "per sample"])
@pytest.mark.parametrize("weighting", [DWA(), MGDA(), GradDrop()], ids=repr)
def test_every_form_of_the_losses_gives_the_step_that_a_mapping_of_scalars_gives(form, per_sample, weighting, device):
    p = Problem(("0", "1"), device=device)
    q = copy.deepcopy(p)
    ours, theirs = wrap(p, weighting, shared=p.encoder), wrap(q, weighting, shared=q.encoder)
    for k in range(3):
        value = step(ours, form(partial(p.samples if per_sample else p.losses, k)))
        same_numbers(value, step(theirs, q.losses(k)))
        same_numbers(ours.report.weights, theirs.report.weights)
        assert ours.report.tasks == theirs.report.tasks == ("0", "1")
    same_numbers(p.parameters(), q.parameters())


@forms
@pytest.mark.parametrize("as_callable", [False, True], ids=["reference", "callable reference"])
def test_every_form_of_losses_per_sample_gives_the_same_weights_per_sample(form, as_callable):
    p = Problem(("0", "1"))
    optimizer = wrap(p, SLGrad("0"), shared=p.encoder, model=p.model)
    expected = wrap(p, SLGrad("0"), shared=p.encoder)
    expected.combine(p.samples(), reference=p.reference())
    optimizer.combine(form(p.samples), reference=p.reference if as_callable else p.reference())
    for each in (optimizer, expected):
        each.step()
    same_numbers(optimizer.report.weights, expected.report.weights)
    assert optimizer.report.weights.shape == (2, 6)


@given(st.permutations(TASKS))
@settings(max_examples=12)
def test_the_order_of_the_keys_does_not_matter(order):
    results = []
    for tasks in (TASKS, order):
        p = Problem(TASKS)
        optimizer = wrap(p, UW() >> ema(DWA()) >> MGDA(), shared=p.encoder)
        for k in range(3):
            losses = p.losses(k)
            step(optimizer, {task: losses[task] for task in (tasks if k else TASKS)})
        results.append((p.parameters(), own(optimizer)["state"], optimizer.report.task_weights))
        assert optimizer.report.tasks == TASKS
    same_numbers(results[1], results[0], rtol=1e-9)


# The value


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize(
    "weighting", [Equal(), Constant([3.0, -2.0]), UW(), RLW(), MGDA(), PCGrad(), GradDrop(), GradNorm()], ids=repr
)
def test_the_value_of_combine_is_the_plain_sum_of_the_losses(weighting, per_sample):
    p = Problem()
    optimizer = wrap(p, weighting, shared=p.encoder)
    for k in range(3):
        value = step(optimizer, p.samples(k) if per_sample else p.losses(k))
        with torch.no_grad():
            plain = sum(p.losses(k).values())
        assert value.ndim == 0
        # The step has moved the parameters since.
        assert float(value) == pytest.approx(sum(optimizer.report.task_losses.values()))
        assert not value.isclose(plain)


def test_the_value_of_combine_with_a_learnt_reference_is_the_plain_sum_too():
    p = Problem()
    optimizer = wrap(p, SLGrad("left", learn_reference=True), shared=p.encoder)
    combined = optimizer.combine(p.samples(), reference=p.reference())
    same_numbers(combined.detach(), sum(p.losses().values()).detach())


@pytest.mark.parametrize("weighting", [Equal(), MGDA(), GradDrop()], ids=repr)
def test_multiplying_the_scalar_multiplies_all_gradients(weighting):
    p = Problem()
    optimizer = wrap(p, weighting, shared=p.encoder)
    found = []
    for factor in (1.0, -0.25):
        optimizer.zero_grad()
        (factor * optimizer.combine(p.losses())).backward()
        found.append(p.gradients())
    same_numbers(found[1], {name: -0.25 * g for name, g in found[0].items()})


# Absent tasks

KEEPING = [UW(), DWA(), GradNorm(), ema(RLW()), UW() >> DWA()]


def of_task(state, task):
    """Everything in a state that is kept under the name of a task."""
    return {
        key: value if key == task else of_task(value, task)
        for key, value in state.items()
        if key == task or isinstance(value, dict)
    }


@pytest.mark.parametrize("absent", ["missing", "None"])
@pytest.mark.parametrize("weighting", KEEPING, ids=repr)
def test_an_absent_task_gets_no_weight_keeps_its_state_and_comes_back(weighting, absent):
    p = Problem(TASKS)
    optimizer = wrap(p, weighting, shared=p.encoder)
    p.train(optimizer, 3)
    kept = copy.deepcopy(of_task(own(optimizer)["state"], "b"))
    others = copy.deepcopy(of_task(own(optimizer)["state"], "a"))
    head = {name: value for name, value in p.parameters().items() if name.startswith("heads.b")}
    for k in range(3, 6):
        losses = p.losses(k, tasks=["a", "c"])
        optimizer.zero_grad()
        optimizer.combine(losses if absent == "missing" else {**losses, "b": None}).backward()
        assert p.model.heads["b"].weight.grad is None
        optimizer.step()
        assert optimizer.report.tasks == ("a", "c")
        assert set(optimizer.report.task_weights) == {"a", "c"}
    assert same(of_task(own(optimizer)["state"], "b"), kept)
    assert not same(of_task(own(optimizer)["state"], "a"), others)
    assert same({name: p.parameters()[name] for name in head}, head)
    p.train(optimizer, 2, start=6)
    assert optimizer.report.tasks == TASKS
    assert not same(of_task(own(optimizer)["state"], "b"), kept)


def test_the_weight_of_a_task_that_comes_back_is_what_it_was():
    p = Problem(TASKS)
    optimizer = wrap(p, UW())
    p.train(optimizer, 3)
    s = float(own(optimizer)["state"]["log_variance"]["b"])
    p.train(optimizer, 4, start=3, tasks=["a", "c"])
    p.train(optimizer, 1, start=7)
    assert optimizer.report.task_weights["b"] == pytest.approx(torch.exp(torch.tensor(-s)).item(), rel=1e-6)


def test_a_task_may_come_for_the_first_time_in_mid_training():
    p = Problem(TASKS)
    optimizer = wrap(p, UW() >> DWA())
    p.train(optimizer, 3, tasks=["a", "b"])
    p.train(optimizer, 2, start=3)
    assert own(optimizer)["tasks"] == ["a", "b", "c"]
    assert set(optimizer.report.task_weights) == set(TASKS)


@pytest.mark.parametrize(
    ("weighting", "as_callable"),
    [
        *((each, as_callable) for each in (Equal(), UW(), MGDA()) for as_callable in (False, True)),
        (SLGrad("a"), False),
        (SLGrad("a"), True),
    ],
    ids=repr,
)
def test_a_batch_without_any_task_skips_the_step_and_is_counted(weighting, as_callable):
    p = Problem(TASKS)
    optimizer = wrap(p, weighting, shared=p.encoder, model=p.model)
    step(optimizer, p.samples(), reference=p.reference())
    before, saved = p.parameters(), copy.deepcopy(optimizer.state_dict())
    absent = dict.fromkeys(TASKS)
    for count in (1, 2):
        assert step(optimizer, (lambda: absent) if as_callable else absent, reference=p.reference()) == 0
        assert optimizer.report.skipped == count
    assert same(p.parameters(), before)
    assert optimizer.report.step == 1
    saved["mtlweight"]["skipped"] = 2
    assert same(optimizer.state_dict(), saved)
    step(optimizer, p.samples(1), reference=p.reference())
    assert optimizer.report.step == 2


# Gradients, heads and shared parameters


@weighting(Needs.LOSSES)
def lopsided(view):
    return torch.tensor([3.0, 0.5], dtype=view.dtype, device=view.device)


@weighting(Needs.GRAMIAN)
def lopsided_gramian(view):
    assert view.gramian.shape == (2, 2)
    return torch.tensor([3.0, 0.5], dtype=view.dtype, device=view.device)


@weighting(Needs.JACOBIAN, writes="entry")
def lopsided_entries(view):
    return torch.tensor([3.0, 0.5], dtype=view.dtype, device=view.device)[:, None].expand_as(view.jacobian)


@weighting(Needs.JACOBIAN, writes="entry")
def ones_per_entry(view):
    return torch.ones_like(view.jacobian)


def gradient(problem, weights):
    """The gradient of the weighted sum, by name."""
    weighted = sum(w * loss for w, loss in zip(weights, problem.losses().values(), strict=True))
    names = [name for name, _ in problem.model.named_parameters()]
    return dict(zip(names, torch.autograd.grad(weighted, list(problem.model.parameters())), strict=True))


@pytest.mark.parametrize("heads", ["weighted", "unweighted"])
@pytest.mark.parametrize("each", [lopsided, lopsided_gramian, lopsided_entries, lopsided >> ones_per_entry], ids=repr)
def test_heads_get_the_gradient_of_the_weighted_or_of_the_plain_sum_as_chosen(each, heads):
    p = Problem()
    optimizer = wrap(p, each, shared=p.encoder, heads=heads)
    optimizer.combine(p.losses()).backward()
    weighted, plain = gradient(p, [3.0, 0.5]), gradient(p, [1.0, 1.0])
    unweighted = heads == "unweighted" or each.writes == "entry"
    expected = {name: (plain if unweighted and "heads" in name else weighted)[name] for name in weighted}
    same_numbers(p.gradients(), expected)


def test_heads_are_weighted_by_default():
    p, q = Problem(), Problem()
    wrap(p, lopsided_gramian, shared=p.encoder).combine(p.losses()).backward()
    wrap(q, lopsided_gramian, shared=q.encoder, heads="weighted").combine(q.losses()).backward()
    assert same(p.gradients(), q.gradients())


def test_heads_get_the_plain_gradient_beside_weights_per_sample_if_unweighted():
    p = Problem()
    optimizer = wrap(p, SLGrad("left"), shared=p.encoder, heads="unweighted")
    optimizer.combine(p.samples(), reference=p.reference()).backward()
    plain, found = gradient(p, [1.0, 1.0]), p.gradients()
    same_numbers({n: found[n] for n in found if "heads" in n}, {n: plain[n] for n in found if "heads" in n})
    assert not torch.allclose(found["encoder.0.weight"], plain["encoder.0.weight"])


SHARED = {
    "module": lambda p: p.encoder,
    "generator": lambda p: p.encoder.parameters(),
    "list of parameters": lambda p: list(p.encoder.parameters()),
    "several modules": lambda p: [p.encoder[0], p.encoder[1]],
    "tuple of a module and one of its parameters": lambda p: (p.encoder[0].bias, p.encoder),
    "parameters apart": lambda p: iter([p.encoder[0].weight, p.encoder[0].bias]),
    "module list": lambda p: nn.ModuleList([p.encoder]),
}


@pytest.mark.parametrize("shared", list(SHARED.values()), ids=list(SHARED))
@pytest.mark.parametrize("weighting", [MGDA(), PCGrad()], ids=repr)
def test_shared_parameters_may_be_named_in_any_way(shared, weighting):
    p = Problem()
    q = copy.deepcopy(p)
    ours, theirs = wrap(p, weighting, shared=shared(p)), wrap(q, weighting, shared=q.encoder)
    p.train(ours, 3)  # a generator must serve more than one step
    q.train(theirs, 3)
    same_numbers(ours.report.gramian, theirs.report.gramian)
    same_numbers(p.parameters(), q.parameters())


def test_gradients_are_compared_over_the_shared_parameters_alone():
    p = Problem()
    shared = p.encoder[0].weight
    gradients = [torch.autograd.grad(loss, shared, retain_graph=True)[0] for loss in p.losses().values()]
    rows = torch.stack(gradients).flatten(1)
    optimizer = wrap(p, MGDA(), shared=shared)
    p.train(optimizer, 1)
    same_numbers(optimizer.report.gramian, rows @ rows.T)


def test_a_tied_parameter_counts_once():
    p = Problem()
    optimizer = wrap(p, MGDA(), shared=[p.encoder, p.encoder, p.encoder[0].weight])
    q = copy.deepcopy(p)
    twin = wrap(q, MGDA(), shared=q.encoder)
    p.train(optimizer, 1)
    q.train(twin, 1)
    same_numbers(optimizer.report.gramian, twin.report.gramian)


def test_a_shared_parameter_that_one_task_does_not_reach_counts_as_zero_there():
    w, v = (nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in (1.0, 2.0))
    optimizer = MultiTaskOptimizer(torch.optim.SGD([w, v], lr=0.1), lopsided_gramian, shared=[w, v])
    step(optimizer, {"a": w * v, "b": w.square()})
    same_numbers(optimizer.report.gramian, torch.tensor([[5.0, 4.0], [4.0, 4.0]], dtype=torch.float64))
    same_numbers(torch.stack([w.grad, v.grad]), torch.tensor([7.0, 3.0], dtype=torch.float64))


# The report


def test_the_report_tells_losses_weights_norms_and_cosines_of_the_committed_step():
    w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    optimizer = MultiTaskOptimizer(torch.optim.SGD([w], lr=0.1), lopsided_gramian, shared=w)
    step(optimizer, {"a": 3 * w[0], "b": 4 * w.sum()})
    report = optimizer.report
    assert report.step == 1
    assert report.engine == "rows"
    assert report.task_losses == {"a": 3.0, "b": 12.0}
    assert report.task_weights == {"a": 3.0, "b": 0.5}
    assert report.norms == pytest.approx({"a": 3.0, "b": 32**0.5})
    cosine = 0.5**0.5
    same_numbers(report.cosines, torch.tensor([[1.0, cosine], [cosine, 1.0]], dtype=torch.float64))
    optimizer.combine({"a": w.sum(), "b": w.sum()}).backward()
    assert optimizer.report.weights is report.weights  # nothing is committed yet


def test_the_cosine_with_a_gradient_of_zero_is_zero():
    w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    optimizer = MultiTaskOptimizer(torch.optim.SGD([w], lr=0.1), lopsided_gramian, shared=w)
    step(optimizer, {"a": w[0], "b": 0 * w.sum()})
    same_numbers(optimizer.report.cosines, torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64))


def test_a_report_before_the_first_step_is_empty():
    report = wrap(Problem(), MGDA()).report
    assert (report.step, report.tasks, report.task_losses, report.task_weights, report.norms) == (0, (), {}, {}, {})
    assert report.cosines is None


def test_a_report_of_weights_per_sample_adds_them_up_by_task():
    p = Problem()
    optimizer = wrap(p, SLGrad("left", total=2.0), shared=p.encoder)
    step(optimizer, p.samples(), reference=p.reference())
    report = optimizer.report
    assert report.weights.shape == report.losses.shape == report.alignment.shape == (2, 6)
    assert sum(report.task_weights.values()) == pytest.approx(2.0)
    same_numbers(report.task_losses["left"], float(report.losses[0].mean()))


def test_a_report_of_weights_per_entry_averages_them_by_task():
    p = Problem()
    optimizer = wrap(p, lopsided_entries, shared=p.encoder)
    p.train(optimizer, 1)
    assert optimizer.report.task_weights == pytest.approx({"left": 3.0, "right": 0.5})
    assert optimizer.report.norms == {}


def test_a_reference_that_nothing_reads_is_not_evaluated():
    p = Problem()
    step(wrap(p, MGDA(), shared=p.encoder), p.losses(), reference=lambda: pytest.fail("evaluated"))


def test_the_report_tells_weights_per_entry_from_as_many_per_sample():
    p = Problem()
    entries = p.encoder[0].bias  # 5 of them, as many as samples
    optimizer = wrap(p, GradDrop(), shared=[entries])
    step(optimizer, {task: loss[:5] for task, loss in p.samples().items()})
    report = optimizer.report
    assert report.weights.shape == report.losses.shape == (2, 5)
    assert report.task_weights == {
        task: pytest.approx(float(row.mean())) for task, row in zip(p.tasks, report.weights, strict=True)
    }
