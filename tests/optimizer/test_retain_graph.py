"""``combine(..., retain_graph=True)``: the weights are constants, and the backward is the ordinary one."""

import copy

import pytest
import torch
from torch import nn

from mtlweight import (
    IMTLG,
    MGDA,
    UW,
    Constant,
    GradDrop,
    MTLWeightError,
    MultiTaskOptimizer,
    PCGrad,
    SLGrad,
    UPGrad,
)
from mtlweight.testing._conformance import name_of
from tests.optimizer.registered import losses_of, tasks_of
from tests.problems import Problem, same, step, wrap
from tests.registry import BY_READING

ON_GRADIENTS = [MGDA(), IMTLG(), PCGrad(), UPGrad()]
read_gradients = pytest.mark.parametrize("weighting", ON_GRADIENTS, ids=lambda by: type(by).__name__)


@pytest.mark.parametrize(
    "case", [case for case in BY_READING if case.weighting.writes != "entry"], ids=lambda case: name_of(case.weighting)
)
def test_its_gradients_are_those_without_it(case):
    found = []
    for retain in (False, True):
        p = Problem(tasks_of(case))
        optimizer = wrap(p, case.weighting, shared=p.encoder, model=p.model)
        for k in range(3):
            given = lambda k=k, p=p: losses_of(p, case.weighting, k)  # noqa: E731
            optimizer.zero_grad()
            loss = optimizer.combine(given, reference=p.reference, retain_graph=retain)
            loss.backward()
            optimizer.step()
            found.append((p.gradients(), loss.detach()))
    torch.testing.assert_close(found[:3], found[3:], rtol=1e-9, atol=1e-12)


def regulariser(features):
    return features.square().mean()


@read_gradients
def test_a_term_that_shares_the_graph_may_be_added_to_the_scalar(weighting):
    p = Problem()
    q = copy.deepcopy(p)
    x, y = p.batch()

    def losses(problem):
        features = problem.encoder(x)
        heads = problem.model.heads.items()
        return {t: (h(features).squeeze(-1) - y[t]).square().mean() for t, h in heads}, regulariser(features)

    given, term = losses(p)
    (wrap(p, weighting, shared=p.encoder).combine(given, retain_graph=True) + 3 * term).backward()
    given, term = losses(q)
    term = 3 * regulariser(q.encoder(x))
    wrap(q, weighting, shared=q.encoder).combine(given).backward()
    term.backward()
    torch.testing.assert_close(p.gradients(), q.gradients())


@read_gradients
def test_second_derivatives_are_those_of_the_weighted_losses(weighting):
    p = Problem()
    parameters = list(p.model.parameters())
    optimizer = wrap(p, weighting, shared=p.encoder)

    def curvature(loss):
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        vectors = [torch.ones_like(g) for g in gradients]
        return torch.autograd.grad(gradients, parameters, vectors)

    found = curvature(optimizer.combine(p.losses(), retain_graph=True))
    weights = optimizer._record.pending.report.weights
    expected = curvature(torch.dot(weights, torch.stack([*p.losses().values()])))
    torch.testing.assert_close(found, expected)
    assert any(each.any() for each in found)


def test_the_reference_that_is_learned_has_second_derivatives_too():
    p = Problem()
    optimizer = wrap(p, SLGrad("left", learn_reference=True), shared=p.encoder, model=p.model)
    loss = optimizer.combine(p.samples, reference=p.reference, retain_graph=True)
    weight = p.encoder[0].weight

    def curvature(loss):
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), weight)[0]

    weights = optimizer._record.pending.report.weights
    weighted = (weights * torch.stack([*p.samples().values()])).sum()
    torch.testing.assert_close(curvature(loss), curvature(weighted + p.reference()))


def test_hooks_that_count_backwards_see_one_where_they_are_off_while_gradients_are_measured():
    p = Problem()
    optimizer = wrap(p, MGDA(), shared=p.encoder)
    seen, on = [], True
    p.encoder[1].register_full_backward_hook(lambda *_: seen.append(1) if on else None)
    losses = p.losses()
    on = False
    loss = optimizer.combine(losses, retain_graph=True)
    on = True
    loss.backward()
    assert len(seen) == 1


# Errors


@pytest.mark.parametrize(
    ("weighting", "options", "found"),
    [
        (GradDrop(), {}, "weights per gradient entry"),
        (UW(), {"heads": "unweighted"}, "heads='unweighted'"),
        (UW(), {"outer": True}, "outer="),
        (UW(), {"parts": True}, "losses in parts"),
    ],
    ids=["entries", "unweighted heads", "outer", "parts"],
)
def test_what_has_no_one_graph_says_so_and_changes_nothing(weighting, options, found):
    p = Problem()
    parts = options.pop("parts", False)
    if options.get("outer"):
        options = {"outer": list(p.model.heads.parameters())}
    optimizer = wrap(p, weighting, shared=p.encoder, **options)
    step(optimizer, p.losses(), **({"reference": p.reference()} if "outer" in options else {}))
    before = p.everything(optimizer)
    with pytest.raises(MTLWeightError, match=rf"retain_graph=True.*found {found}.*Leave it out"):
        optimizer.combine([p.samples] if parts else p.losses(), retain_graph=True)
    assert same(p.everything(optimizer), before)


@read_gradients
@pytest.mark.parametrize("heads", ["weighted", "unweighted"])
def test_a_backward_through_the_graph_that_measuring_freed_names_it(weighting, heads):
    p = Problem()
    optimizer = wrap(p, weighting, shared=p.encoder, heads=heads)
    features = p.encoder(p.batch()[0])
    losses = {task: head(features).square().mean() for task, head in p.model.heads.items()}
    loss = optimizer.combine(losses)
    for again in (loss + regulariser(features), losses["left"], features.sum()):
        with pytest.raises(MTLWeightError, match=r"freed by an earlier.*combine\(\.\.\., retain_graph=True\)"):
            again.backward()
    loss = optimizer.combine(p.losses())
    with pytest.raises(MTLWeightError, match=r"no graph of their own.*combine\(\.\.\., retain_graph=True\)"):
        loss.backward(create_graph=True)


def test_weightings_that_read_losses_alone_need_none_of_this():
    p = Problem()
    features = p.encoder(p.batch()[0])
    losses = {task: head(features).square().mean() for task, head in p.model.heads.items()}
    loss = wrap(p, Constant({"left": 1.0, "right": 2.0})).combine(losses)
    gradients = torch.autograd.grad(loss + regulariser(features), list(p.encoder.parameters()), create_graph=True)
    assert all(g.requires_grad for g in gradients)


def test_a_scaled_scalar_scales_the_gradient_alone():
    p = Problem()
    optimizer = MultiTaskOptimizer(p.sgd(), MGDA(), shared=p.encoder)
    optimizer.combine(p.losses(), retain_graph=True).backward()
    plain = p.gradients()
    nn.Module.zero_grad(p.model)
    (1024 * optimizer.combine(p.losses(), retain_graph=True)).backward()
    torch.testing.assert_close(p.gradients(), {name: 1024 * g for name, g in plain.items()})
