"""Looking one step ahead leaves no trace; and how the reference's gradient may be taken."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from mtlweight import Constant, MTLWeightError, MultiTaskOptimizer, Needs, NonFiniteError, SLGrad, Weighting
from mtlweight._weighting import ReferenceUse
from tests.zoo import NETWORKS, Recipe, TwoTasks, alignment, close, combined, gradient, numbers, problem, scope_of

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "AdamW with a tensor for a rate": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), foreach=False),
    "Adadelta": torch.optim.Adadelta,
    "Adagrad": torch.optim.Adagrad,
    "ASGD": torch.optim.ASGD,
    "NAdam": torch.optim.NAdam,
    "RMSprop": lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.5),
    "Rprop": torch.optim.Rprop,
    "two groups": lambda p: torch.optim.SGD([{"params": p[:2], "lr": 0.2}, {"params": p[2:]}], lr=0.1, momentum=0.5),
}


LEFT = ReferenceUse(("left",))


@dataclass(frozen=True)
class Even(Weighting):
    """The same weight for all samples, whatever it reads."""

    reference: ReferenceUse = LEFT
    needs = Needs.ALIGNMENT | Needs.SAMPLES
    writes = "sample"

    def weigh(self, view, state):
        return torch.full_like(view.sample_alignment, 0.25), state


def looking(lookahead, **options):
    return Even(ReferenceUse(("left",), lookahead=lookahead, **options))


def stateful():
    return problem(Recipe(noisy, numbers(5)))


def noisy():
    """Buffers that advance, and random masks."""
    return TwoTasks(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.4), nn.Tanh(), nn.Linear(4, 4)), 4)


def wrapped(p, weighting, build=OPTIMIZERS["SGD"], **options):
    options = {"shared": p.model.encoder, "model": p.model, **options}
    return MultiTaskOptimizer(build(list(p.model.parameters())), weighting, **options)


def everything(p, optimizer):
    """Parameters, gradients and the wrapped optimizer's state, each with the tensor that holds it."""
    inner = optimizer.optimizer
    tensors = [x for q in p.model.parameters() for x in (q, q.grad, *inner.state[q].values())]
    tensors += [value for group in inner.param_groups for value in group.values()]
    return [(id(x), x.detach().clone()) if isinstance(x, torch.Tensor) else x for x in tensors]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("lookahead", ["reference", "both"])
def test_what_is_left_is_as_after_evaluating_the_losses_once(name, lookahead):
    p = stateful()
    optimizer = wrapped(p, looking(lookahead), OPTIMIZERS[name])
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.combine(p.sample_losses, reference=p.reference).backward()
        before, once = everything(p, optimizer), copy.deepcopy(p)
        random = torch.get_rng_state()
        optimizer.combine(p.sample_losses, reference=p.reference)
        assert same(everything(p, optimizer), before)
        drawn = torch.get_rng_state()
        torch.set_rng_state(random)
        once.run = once.model
        once.sample_losses()
        assert torch.equal(torch.get_rng_state(), drawn)
        buffers = zip(p.model.buffers(), once.model.buffers(), strict=True)
        assert all(torch.allclose(a, b, rtol=1e-12) for a, b in buffers)
        optimizer.step()


@pytest.mark.parametrize("engine", ["forward", "pullback", "samples", "rows"])
@pytest.mark.parametrize("lookahead", ["reference", "both", "stay"])
@pytest.mark.parametrize("scope", ["shared", "main", "all"])
def test_gradients_are_taken_where_they_are_said_to_be(lookahead, engine, scope):
    p, here = problem(NETWORKS["linear"]), problem(NETWORKS["linear"])
    optimizer = wrapped(p, looking(lookahead, scope=scope), OPTIMIZERS["Adam"], engine=engine)
    other = wrapped(here, Constant(1), OPTIMIZERS["Adam"])
    there = copy.deepcopy(here)
    ahead = OPTIMIZERS["Adam"](list(there.model.parameters()))
    sum(there.task_losses().values()).backward()  # the default: weight 1 for each task
    ahead.step()
    report = combined(p, optimizer, p.sample_losses)
    towards = gradient(there.reference(), scope_of(there, scope))
    at = here if lookahead == "reference" else there
    rows = [gradient(sample, scope_of(at, scope)) @ towards for loss in at.sample_losses().values() for sample in loss]
    assert close(report.alignment, torch.stack(rows).reshape(2, -1))
    # And the step: from here with the losses' gradients here, or with "stay" from there with those there.
    start = there if lookahead == "stay" else here
    stepping = ahead if lookahead == "stay" else other.optimizer
    stepping.zero_grad()
    (0.25 * torch.stack([*start.sample_losses().values()])).sum().backward()
    stepping.step()
    found, expected = ([*q.model.parameters()] for q in (p, start))
    assert all(close(a.detach(), b.detach(), 1e-9) for a, b in zip(found, expected, strict=True))


def test_what_enters_the_shared_layers_may_be_a_parameter_that_moves_ahead():
    torch.manual_seed(5)
    model, rate = nn.Linear(4, 4).double(), 0.5
    queries = nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4).sin())

    def losses():
        return {"left": model(queries).tanh().mean(dim=1)}

    def reference():
        return model(queries).tanh().square().mean()

    parameters = [*model.parameters(), queries]
    optimizer = MultiTaskOptimizer(
        torch.optim.SGD(parameters, lr=rate), looking("reference"), shared=[model, queries], model=model
    )
    optimizer.combine(losses, reference=reference).backward()
    rows = [gradient(sample, parameters) for sample in losses()["left"]]
    here = [p.detach().clone() for p in parameters]
    flat = gradient(losses()["left"].mean(), parameters)
    with torch.no_grad():
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p -= rate * part.view_as(p)
    towards = gradient(reference(), parameters)
    with torch.no_grad():
        for p, value in zip(parameters, here, strict=True):
            p.copy_(value)
    optimizer.step()
    assert close(optimizer.report.alignment, torch.stack([row @ towards for row in rows])[None])


def test_whatever_is_evaluated_ahead_draws_the_masks_of_the_step_itself():
    p, masks = stateful(), []
    p.model.encoder[2].register_forward_hook(lambda _module, _args, output: masks.append(output.detach() == 0))
    combined(p, wrapped(p, looking("both"), engine="pullback"), p.sample_losses)
    *ahead, final = masks
    assert len(ahead) == 3  # the losses for the step, the reference, the losses for their gradients
    assert all(torch.equal(mask, final) for mask in ahead)


def test_hooks_and_schedulers_see_one_step():
    p = problem(NETWORKS["linear"])
    optimizer = wrapped(p, looking("both"))
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)
    combined(p, optimizer, p.sample_losses)
    scheduler.step()
    assert seen == ["pre", "post"]


class Nested(torch.optim.Adam):
    """Torch has wrapped the inherited step too, which runs the same hooks."""

    def step(self, closure=None):
        return super().step(closure)


def test_hooks_do_not_run_ahead_where_a_step_calls_another():
    p, seen = problem(NETWORKS["linear"]), []
    torch.optim.Adam(p.model.parameters())
    optimizer = wrapped(p, looking("both"), Nested)
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    optimizer.combine(p.sample_losses, reference=p.reference).backward()
    assert seen == []
    optimizer.step()
    assert {*seen} == {"pre", "post"}


def test_a_reference_that_fails_ahead_leaves_what_was_there():
    p = stateful()
    optimizer = wrapped(p, looking("both"))
    combined(p, optimizer, p.sample_losses)
    before = everything(p, optimizer)

    def fails():
        raise KeyError("the user's own")

    with pytest.raises(KeyError, match="the user's own"):
        optimizer.combine(p.sample_losses, reference=fails)
    assert same(everything(p, optimizer), before)


def test_a_loss_that_is_not_finite_takes_no_part_in_the_step_ahead():
    p, other = problem(NETWORKS["linear"]), problem(NETWORKS["linear"])
    optimizer = wrapped(p, looking("reference"), on_nonfinite="drop")
    report = combined(p, optimizer, lambda: {**p.sample_losses(), "right": p.sample_losses()["right"] * torch.nan})
    expected = wrapped(other, looking("reference"))
    alone = combined(other, expected, lambda: {"left": other.sample_losses()["left"], "right": None})
    assert (report.tasks, dict(report.dropped)) == (("left",), {"right": 1})
    assert close(report.alignment, alone.alignment)


@pytest.mark.parametrize("lookahead", ["reference", "both"])
def test_a_task_whose_gradient_is_not_finite_takes_no_part_either_and_is_named(lookahead):
    def losses():
        found = p.sample_losses()
        return {**found, "right": found["right"] + (0 * found["right"]).sqrt()}

    p, other = problem(NETWORKS["linear"]), problem(NETWORKS["linear"])
    with pytest.raises(NonFiniteError, match="of task right is not finite"):
        combined(p, wrapped(p, looking(lookahead)), losses)
    report = combined(p, wrapped(p, looking(lookahead), on_nonfinite="drop"), losses)
    alone = combined(
        other,
        wrapped(other, looking(lookahead)),
        lambda: {"left": other.sample_losses()["left"], "right": None},
    )
    assert (report.tasks, dict(report.dropped)) == (("left",), {"right": 1})
    assert close(report.alignment, alone.alignment)


class Around(torch.optim.SGD):
    """Keeps its state in another optimizer."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1)
        self.inner = torch.optim.SGD(self.param_groups[0]["params"], lr=0.1)


def test_without_a_callable_or_with_an_optimizer_that_takes_a_closure_it_says_what_it_expects():
    p = problem(NETWORKS["linear"])
    optimizer = wrapped(p, looking("reference"))
    with pytest.raises(MTLWeightError, match=r"expected losses as a callable, found computed tensors\. Pass combine"):
        optimizer.combine(p.sample_losses(), reference=p.reference)
    with pytest.raises(MTLWeightError, match=r"expected reference as a callable, found computed tensors\. Pass"):
        optimizer.combine(p.sample_losses, reference=p.reference())
    lbfgs = wrapped(p, looking("reference"), torch.optim.LBFGS)
    with pytest.raises(MTLWeightError, match=r"whose step needs no closure, found LBFGS\. Use another"):
        lbfgs.combine(p.sample_losses, reference=p.reference)
    nested = wrapped(p, looking("reference"), Around)
    with pytest.raises(MTLWeightError, match=r"of its own, found Around.* Wrap the innermost optimizer\."):
        nested.combine(p.sample_losses, reference=p.reference)


# How the reference's gradient is taken.


def references(p, count=3):
    """Held-out batches with losses of both tasks."""
    torch.manual_seed(9)
    batches = [torch.randn_like(p.held_out) for _ in range(count)]
    return [lambda x=x, task=task: p.score(p.run(x))[task].mean() for x in batches for task in ("left", "right")]


def test_several_references_count_by_their_mean_and_are_evaluated_one_at_a_time():
    p, other = problem(NETWORKS["linear"]), problem(NETWORKS["linear"])
    each = references(p)[::2]
    optimizer = wrapped(p, SLGrad("left", learn_reference=True))
    optimizer.combine(p.sample_losses, reference=each).backward()
    optimizer.step()
    mean = torch.stack([reference() for reference in references(other)[::2]]).mean()
    assert close(optimizer.report.alignment, alignment(other.sample_losses(), mean, other.shared))
    total = mean + (optimizer.report.weights * torch.stack([*other.sample_losses().values()])).sum()
    expected = gradient(total, list(other.model.parameters()))
    assert close(torch.cat([q.grad.flatten() for q in p.model.parameters()]), expected)


@pytest.mark.parametrize("scope", ["shared", "main", "all"])
@pytest.mark.parametrize("form", ["callables", "a callable", "tensors"])
def test_a_reference_for_each_main_task_counts_by_their_sum(scope, form):
    p, other = problem(NETWORKS["linear"]), problem(NETWORKS["linear"])
    left, right = references(p, 1)
    mapping = {"right": right, "left": left}
    given = {
        "callables": mapping,
        "a callable": lambda: {task: loss() for task, loss in mapping.items()},
        "tensors": {task: loss() for task, loss in mapping.items()},
    }[form]
    optimizer = wrapped(p, Even(ReferenceUse(("left", "right"), scope=scope)))
    optimizer.combine(p.sample_losses, reference=given).backward()
    optimizer.step()
    total = sum(loss() for loss in references(other, 1))
    parameters = other.shared if scope == "shared" else list(other.model.parameters())
    assert optimizer.report.engine == "forward"
    assert close(optimizer.report.alignment, alignment(other.sample_losses(), total, parameters))


def test_a_mapping_must_name_the_main_tasks():
    p = problem(NETWORKS["linear"])
    with pytest.raises(MTLWeightError, match=r"each main task, left; found left, right\. Name the same tasks"):
        wrapped(p, looking(None)).combine(p.sample_losses, reference=dict.fromkeys(("left", "right"), p.reference))


def test_an_averaged_reference_remembers_committed_steps_alone_and_is_saved():
    p = problem(NETWORKS["linear"])
    weighting = Even(ReferenceUse(("left",), ema=0.75))
    frozen = lambda q: torch.optim.SGD(q, lr=0.0)  # noqa: E731  # so that all gradients are of one point
    optimizer = wrapped(p, weighting, frozen)
    gradients = [gradient(reference(), p.shared) for reference in references(p)]
    rows = torch.stack([gradient(s, p.shared) for loss in p.sample_losses().values() for s in loss]).reshape(2, -1, 24)
    average = None
    for reference, g in zip(references(p), gradients, strict=True):
        average = g if average is None else 0.75 * average + 0.25 * g
        for _ in range(2):  # the first is not committed
            optimizer.combine(p.sample_losses, reference=reference)
        optimizer.step()
        assert close(optimizer.report.alignment, rows @ average)
        resumed = wrapped(p, weighting, frozen)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer = resumed


def test_a_unit_reference_has_norm_one_and_a_zero_one_stays_zero():
    p, other = problem(NETWORKS["linear"]), problem(NETWORKS["linear"])
    weighting = Even(ReferenceUse(("left",), unit=True))
    report = combined(p, wrapped(p, weighting), p.sample_losses)
    towards = other.reference()
    norm = gradient(towards, other.shared).norm()
    assert close(report.alignment, alignment(other.sample_losses(), towards, other.shared) / norm, 1e-6)
    p.reference = lambda: 0.0 * other.reference()
    other.model = p.model
    other.run = p.model
    assert not combined(p, wrapped(p, weighting), p.sample_losses).alignment.any()


def test_uses_that_differ_in_the_point_are_not_chained():
    with pytest.raises(MTLWeightError, match="links that agree"):
        looking("both") >> replace(looking("both"), reference=ReferenceUse(("left",)))
