"""Training through the wrapper: as with the bare optimizer, whatever else acts on it."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from mtlweight import DWA, MGDA, UW, Equal, GradNorm, MTLWeightError, MultiTaskOptimizer, PCGrad
from tests.problems import Problem, plain_step, same, step, wrap

# The bare optimizer

OPTIMIZERS = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.05),
    "SGD with momentum": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda ps: torch.optim.Adam(ps, lr=0.01),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.01, amsgrad=True),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, lr=0.01, momentum=0.5, centered=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", list(OPTIMIZERS.values()), ids=list(OPTIMIZERS))
def test_equal_weights_train_bit_for_bit_as_the_bare_optimizer_on_the_plain_sum(make, dtype, device):
    p = Problem(("a", "b", "c"), dtype=dtype, device=device)
    q = copy.deepcopy(p)
    optimizer, bare = MultiTaskOptimizer(make(p.model.parameters()), Equal()), make(q.model.parameters())
    for k in range(10):
        step(optimizer, p.losses(k))
        plain_step(bare, q.losses(k))
    assert same(p.parameters(), q.parameters())
    assert same(optimizer.optimizer.state_dict(), bare.state_dict())


# Schedulers

SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=13),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.3),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k)),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
    ),
}
schedulers = pytest.mark.parametrize("make", list(SCHEDULERS.values()), ids=list(SCHEDULERS))


def scheduled(optimizer, scheduler, problem, steps, take, start=0):
    """Trains, and returns the learning rates and momenta that the wrapped optimizer used."""
    used = []
    for k in range(start, start + steps):
        group = optimizer.param_groups[0]
        used.append((group["lr"], group["momentum"]))
        take(optimizer, problem.losses(k))
        plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
        scheduler.step(*[1.0] * plateau)
    return used


@schedulers
def test_schedulers_set_the_same_rates_as_on_the_bare_optimizer_and_do_not_warn(make):
    p = Problem()
    q = copy.deepcopy(p)
    optimizer, bare = wrap(p, Equal()), q.sgd()
    ours = scheduled(optimizer, make(optimizer), p, 12, step)
    theirs = scheduled(bare, make(bare), q, 12, plain_step)
    assert ours == theirs
    assert len(set(ours)) > 1
    assert same(p.parameters(), q.parameters())


@schedulers
def test_schedulers_of_the_wrapped_optimizer_act_too(make):
    p = Problem()
    q = copy.deepcopy(p)
    optimizer, bare = wrap(p, Equal()), q.sgd()
    assert scheduled(optimizer, make(optimizer.optimizer), p, 12, step) == scheduled(
        bare, make(bare), q, 12, plain_step
    )


@schedulers
def test_a_scheduler_resumes_with_the_optimizer(make):
    p = Problem()
    optimizer = wrap(p, UW())
    scheduler = make(optimizer)
    scheduled(optimizer, scheduler, p, 4, step)
    q = copy.deepcopy(p)
    resumed = wrap(q, UW())
    again = make(resumed)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again.load_state_dict(scheduler.state_dict())
    ours = scheduled(optimizer, scheduler, p, 4, step, start=4)
    assert ours == scheduled(resumed, again, q, 4, step, start=4)
    assert same(p.parameters(), q.parameters())


def test_a_scheduler_does_not_warn_if_the_first_step_is_skipped():
    p = Problem()
    optimizer = wrap(p, UW(), on_nonfinite="skip")
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    step(optimizer, {"left": p.losses()["left"] * torch.nan})
    scheduler.step()
    assert optimizer.report.skipped == 1


def test_a_scheduler_still_warns_if_it_steps_before_the_optimizer():
    p = Problem()
    optimizer = wrap(p, UW())
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\)` before `optimizer.step\(\)"):
        scheduler.step()


# Parameters that come, freeze and thaw


def test_a_group_added_in_mid_training_is_trained_as_by_the_bare_optimizer():
    p = Problem()
    q = copy.deepcopy(p)
    ours = MultiTaskOptimizer(torch.optim.SGD(p.encoder.parameters(), lr=0.1, momentum=0.9), Equal())
    bare = torch.optim.SGD(q.encoder.parameters(), lr=0.1, momentum=0.9)
    for k in range(8):
        if k == 4:
            ours.add_param_group({"params": p.model.heads.parameters(), "lr": 0.01})
            bare.add_param_group({"params": q.model.heads.parameters(), "lr": 0.01})
        for problem in (p, q):
            problem.model.zero_grad()  # the heads' gradients too, before they belong to the optimizer
        step(ours, p.losses(k))
        plain_step(bare, q.losses(k))
    assert len(ours.param_groups) == 2
    assert same(p.parameters(), q.parameters())


def test_a_parameter_added_to_a_shared_module_in_mid_training_is_shared():
    p = Problem()
    optimizer = wrap(p, MGDA(), shared=p.encoder)
    p.train(optimizer, 1)
    extra = nn.Linear(5, 5, dtype=p.dtype)
    p.encoder.append(extra)
    optimizer.add_param_group({"params": extra.parameters()})
    before = extra.weight.detach().clone()
    p.train(optimizer, 1)
    assert not torch.equal(extra.weight, before)
    shared = list(p.encoder.parameters())
    rows = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in p.losses().values()]
    squares = [sum(g.square().sum() for g in row) for row in rows]
    p.train(optimizer, 1, start=0)
    torch.testing.assert_close(optimizer.report.gramian.diagonal(), torch.stack(squares))


@pytest.mark.parametrize("weighting", [Equal(), UW(), MGDA(), PCGrad(), GradNorm()], ids=repr)
def test_freezing_and_thawing_parts_equals_the_same_on_the_weighted_sum(weighting):
    p = Problem()
    q = copy.deepcopy(p)
    optimizer, bare = wrap(p, weighting, shared=p.encoder), q.sgd()
    for k in range(6):
        for problem in (p, q):
            problem.encoder[0].bias.requires_grad_(k % 2 == 0)
            problem.model.heads["right"].requires_grad_(k % 3 != 1)
        step(optimizer, p.losses(k))
        weighted = (w * loss for w, loss in zip(optimizer.report.weights, q.losses(k).values(), strict=True))
        bare.zero_grad()
        sum(weighted).backward()
        bare.step()
        torch.testing.assert_close(p.parameters(), q.parameters(), rtol=1e-12, atol=1e-12)


def test_a_frozen_shared_module_trains_its_heads_under_a_weighting_that_reads_losses():
    p = Problem()
    p.encoder.requires_grad_(False)
    optimizer = wrap(p, UW(), shared=p.encoder)
    before = p.parameters()
    p.train(optimizer, 2)
    for name, value in p.parameters().items():
        assert torch.equal(value, before[name]) == name.startswith("encoder")


def test_a_frozen_shared_module_is_an_error_for_a_weighting_that_reads_gradients():
    p = Problem()
    optimizer = wrap(p, MGDA(), shared=p.encoder)
    p.train(optimizer, 1)
    p.encoder.requires_grad_(False)
    with pytest.raises(MTLWeightError, match=r"MGDA reads gradients, but no shared parameter requires grad.*Unfreeze"):
        optimizer.combine(p.losses())
    p.encoder.requires_grad_(True)
    p.train(optimizer, 1)
    assert optimizer.report.step == 2


# Accumulation


@pytest.mark.filterwarnings("ignore:mtlweight. combine was called again before step")
@pytest.mark.parametrize("weighting", [Equal(), DWA(), MGDA(), PCGrad()], ids=repr)
def test_two_backwards_before_a_step_add_their_gradients(weighting):
    p = Problem()
    optimizer = wrap(p, weighting, shared=p.encoder)
    p.train(optimizer, 2)
    alone = []
    for k in (2, 3):
        optimizer.zero_grad()
        optimizer.combine(p.losses(k)).backward()
        alone.append(p.gradients())
    optimizer.zero_grad()
    for k in (2, 3):
        optimizer.combine(p.losses(k)).backward()
    expected = {name: alone[0][name] + alone[1][name] for name in alone[0]}
    torch.testing.assert_close(p.gradients(), expected, rtol=1e-12, atol=1e-12)
    optimizer.step()
    assert optimizer.report.step == 3  # one step, however many batches


def test_accumulation_with_equal_weights_is_the_plain_one_bit_for_bit():
    p = Problem()
    q = copy.deepcopy(p)
    optimizer, bare = wrap(p, Equal()), q.sgd()
    for k in range(0, 6, 2):
        optimizer.zero_grad()
        bare.zero_grad()
        for each in (k, k + 1):
            (optimizer.combine(p.losses(each)) / 2).backward()
            (sum(q.losses(each).values()) / 2).backward()
        optimizer.step()
        bare.step()
    assert same(p.parameters(), q.parameters())
