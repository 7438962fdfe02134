"""The twelve rules that a wrapper around an optimizer has to keep, each from a failure seen in practice."""

import copy
import io
import pickle

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from mtlweight import DWA, MGDA, RLW, UW, Equal, GradDrop, GradNorm, MultiTaskOptimizer, PCGrad, ema, every
from tests.problems import (
    KEY,
    Counting,
    Problem,
    own,
    plain_step,
    same,
    same_numbers,
    step,
    wrap,
)

INNER = {
    "Adam": lambda p: torch.optim.Adam(p.model.parameters(), lr=0.05),
    "SGD with momentum": lambda p: torch.optim.SGD(p.model.parameters(), lr=0.1, momentum=0.9),
}
inner_optimizers = pytest.mark.parametrize("inner", list(INNER.values()), ids=list(INNER))


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# 1. Aliases


def test_groups_state_and_defaults_are_the_wrapped_ones_also_after_loading_has_rebound_them():
    p = Problem()
    inner = p.sgd()
    optimizer = MultiTaskOptimizer(inner, UW())
    p.train(optimizer, 2)
    groups = inner.param_groups
    for load in (inner.load_state_dict, lambda _: optimizer.load_state_dict(optimizer.state_dict())):
        load(inner.state_dict())
        assert inner.param_groups is not groups  # loading does rebind
        groups = inner.param_groups
        for name in ("param_groups", "state", "defaults"):
            assert getattr(optimizer, name) is getattr(inner, name)


@pytest.mark.parametrize("name", ["param_groups", "state", "defaults"])
def test_setting_groups_state_or_defaults_sets_the_wrapped_ones(name):
    inner = Problem().sgd()
    optimizer = MultiTaskOptimizer(inner, UW())
    value = copy.copy(getattr(inner, name))
    setattr(optimizer, name, value)
    assert getattr(inner, name) is value


def test_a_learning_rate_set_through_the_wrapper_moves_the_parameters_after_a_load_too():
    p = Problem()
    optimizer = wrap(p, Equal())
    p.train(optimizer, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0].update(lr=0.0)
    before = p.parameters()
    p.train(optimizer, 1)
    assert same(p.parameters(), before)


# 2. Optimizer.__init__


def test_wrapping_an_optimizer_that_has_trained_keeps_its_state():
    p = Problem()
    inner = p.sgd()
    for k in range(3):
        plain_step(inner, p.losses(k))
    before = copy.deepcopy(inner.state_dict())
    optimizer = MultiTaskOptimizer(inner, UW(), shared=p.encoder)
    assert len(inner.state) == len(list(p.model.parameters()))
    assert same(inner.state_dict(), before)
    assert optimizer.state is inner.state


def test_the_wrapper_is_an_optimizer():
    assert isinstance(wrap(Problem(), UW()), torch.optim.Optimizer)


# 3. Checkpoints


@inner_optimizers
def test_a_bare_optimizer_loads_our_checkpoint_and_goes_on_alike(inner):
    p = Problem()
    optimizer = MultiTaskOptimizer(inner(p), UW())
    p.train(optimizer, 3)
    q = copy.deepcopy(p)
    bare = inner(q)
    bare.load_state_dict(through_a_file(optimizer.state_dict()))
    for k in range(3, 6):
        plain_step(optimizer, p.losses(k))
        plain_step(bare, q.losses(k))
    assert same(p.parameters(), q.parameters())


@inner_optimizers
def test_we_load_a_bare_optimizers_checkpoint_with_a_warning_and_go_on_alike(inner):
    p = Problem()
    bare = inner(p)
    for k in range(3):
        plain_step(bare, p.losses(k))
    q = copy.deepcopy(p)
    optimizer = MultiTaskOptimizer(inner(q), Counting())
    q.train(optimizer, 1, start=7)
    q.model.load_state_dict(p.model.state_dict())
    with pytest.warns(UserWarning, match="no key 'mtlweight': the weighting starts afresh"):
        optimizer.load_state_dict(through_a_file(bare.state_dict()))
    assert own(optimizer)["state"] is None
    assert optimizer.report.step == 0
    plain_step(bare, p.losses(3))
    step(optimizer, q.losses(3))  # the first weights of a fresh state are 1
    assert same(p.parameters(), q.parameters())


@inner_optimizers
@pytest.mark.parametrize(
    "weighting",
    [
        UW(),
        DWA(period=2),
        RLW(),
        MGDA(),
        PCGrad(),
        GradNorm(),
        GradDrop(),
        ema(RLW()),
        every(3, MGDA()),
        UW() >> DWA() >> PCGrad(),
    ],
    ids=repr,
)
def test_a_resumed_training_equals_the_uninterrupted_one_bit_for_bit(weighting, inner):
    p = Problem()
    optimizer = MultiTaskOptimizer(inner(p), weighting, shared=p.encoder, seed=5)
    p.train(optimizer, 4)
    q = copy.deepcopy(p)
    resumed = MultiTaskOptimizer(inner(q), weighting, shared=q.encoder)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert resumed.report.step == 4
    p.train(optimizer, 4, start=4)
    q.train(resumed, 4, start=4)
    assert same(p.parameters(), q.parameters())
    assert same(optimizer.state_dict(), resumed.state_dict())


def test_the_state_dict_is_the_wrapped_ones_with_one_more_key():
    p = Problem()
    optimizer = wrap(p, UW())
    p.train(optimizer, 2)
    found = optimizer.state_dict()
    assert same({key: value for key, value in found.items() if key != KEY}, optimizer.optimizer.state_dict())
    assert found.keys() - optimizer.optimizer.state_dict().keys() == {KEY}


def test_a_state_dict_that_is_kept_does_not_change_while_training_goes_on():
    p = Problem()
    optimizer = wrap(p, DWA())
    p.train(optimizer, 3)
    kept = own(optimizer)
    copied = copy.deepcopy(kept)
    p.train(optimizer, 3)
    assert same(kept, copied)


def test_counts_of_skipped_and_dropped_are_resumed():
    p = Problem()
    optimizer = wrap(p, UW(), on_nonfinite="drop")
    bad = p.losses()["left"] * torch.nan
    step(optimizer, {**p.losses(), "left": bad})
    step(optimizer, {"left": bad, "right": None})
    resumed = wrap(p, UW())
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert (resumed.report.skipped, resumed.report.dropped) == (1, {"left": 2})


# 4. Hooks


@pytest.mark.parametrize("on", ["the wrapper", "the wrapped"])
@pytest.mark.parametrize(
    ("register", "act"),
    [
        ("register_step_pre_hook", "step"),
        ("register_step_post_hook", "step"),
        ("register_state_dict_pre_hook", "save"),
        ("register_state_dict_post_hook", "save"),
        ("register_load_state_dict_pre_hook", "load"),
        ("register_load_state_dict_post_hook", "load"),
    ],
)
def test_each_hook_fires_exactly_once_wherever_it_is_registered(register, act, on):
    p = Problem()
    optimizer = wrap(p, UW())
    p.train(optimizer, 1)
    saved = optimizer.state_dict()
    calls = []
    target = optimizer if on == "the wrapper" else optimizer.optimizer
    handle = getattr(target, register)(lambda *_: calls.append(1))
    actions = {
        "step": lambda: p.train(optimizer, 1),
        "save": optimizer.state_dict,
        "load": lambda: optimizer.load_state_dict(saved),
    }
    for name, action in actions.items():
        action()
        assert len(calls) == (name == act), name
        calls.clear()
    handle.remove()
    actions[act]()
    assert not calls


def test_hooks_that_were_there_before_wrapping_fire_too():
    p = Problem()
    inner = p.sgd()
    calls = []
    inner.register_step_post_hook(lambda *_: calls.append(1))
    p.train(MultiTaskOptimizer(inner, UW()), 3)
    assert len(calls) == 3


@pytest.mark.parametrize("register", [register_optimizer_step_pre_hook, register_optimizer_step_post_hook])
def test_global_hooks_fire_exactly_once_a_step(register):
    p = Problem()
    optimizer = wrap(p, UW())
    calls = []
    handle = register(lambda *_: calls.append(1))
    try:
        p.train(optimizer, 3)
        assert len(calls) == 3
        another = copy.deepcopy(optimizer)
        calls.clear()
        another.step()
        assert len(calls) == 1
    finally:
        handle.remove()


# 5. Copies

COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda value: pickle.loads(pickle.dumps(value))}
copies = pytest.mark.parametrize("make_copy", list(COPIES.values()), ids=list(COPIES))


@copies
def test_a_copy_keeps_the_wrapped_optimizer_and_all_else(make_copy):
    p = Problem()
    optimizer = wrap(p, DWA(), shared=p.encoder, heads="unweighted", on_nonfinite="skip", seed=3)
    p.train(optimizer, 3)
    twin = make_copy(optimizer)
    assert type(twin) is MultiTaskOptimizer
    assert type(twin.optimizer) is torch.optim.SGD
    assert twin.weighting == optimizer.weighting
    assert repr(twin) == repr(optimizer)
    assert same(twin.state_dict(), optimizer.state_dict())
    assert twin.report.task_weights == optimizer.report.task_weights


@copies
def test_a_copy_is_detached_from_the_original(make_copy):
    p = Problem()
    optimizer = wrap(p, DWA(), shared=p.encoder)
    p.train(optimizer, 3)
    q, twin = make_copy((p, optimizer))
    before = p.everything(optimizer)
    q.train(twin, 3, start=3)
    twin.param_groups[0]["lr"] = 7.0
    assert same(p.everything(optimizer), before)
    assert not same(q.parameters(), p.parameters())


@pytest.mark.parametrize(
    ("make_copy", "engine"),
    [
        (copy.deepcopy, "auto"),
        (copy.deepcopy, "features"),
        (COPIES["pickle"], "auto"),
        (COPIES["pickle"], "features"),
    ],
)
def test_a_model_and_optimizer_copied_together_train_like_the_originals(make_copy, engine):
    p = Problem()
    optimizer = wrap(p, MGDA(), shared=p.encoder, engine=engine)
    p.train(optimizer, 2)
    q, twin = make_copy((p, optimizer))
    p.train(optimizer, 3, start=2)
    q.train(twin, 3, start=2)
    assert same(p.everything(optimizer), q.everything(twin))


def test_a_copy_made_between_combine_and_step_commits_nothing():
    p = Problem()
    optimizer = wrap(p, Counting())
    p.train(optimizer, 2)
    optimizer.combine(p.losses(2)).backward()
    q, twin = copy.deepcopy((p, optimizer))
    twin.step()  # a copied parameter has no gradient
    assert twin.report.step == 2
    assert same(q.parameters(), p.parameters())
    optimizer.step()
    assert optimizer.report.step == 3


# 6. No attribute leaks


def test_what_the_wrapped_optimizer_says_of_amp_scaling_does_not_leak():
    p = Problem()
    inner = p.sgd(fused=True)
    assert inner._step_supports_amp_scaling
    optimizer = MultiTaskOptimizer(inner, UW())
    assert not hasattr(optimizer, "_step_supports_amp_scaling")
    with pytest.raises(AttributeError):
        _ = optimizer.no_such_attribute


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_a_fused_optimizer_under_a_gradient_scaler_steps_as_far_as_without_one(kind, device):
    p = Problem(dtype=torch.float32, device=device)
    q = copy.deepcopy(p)
    optimizer = MultiTaskOptimizer(kind(p.model.parameters(), lr=0.01, fused=True), Equal())
    bare = kind(q.model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    for k in range(5):
        optimizer.zero_grad()
        scaler.scale(optimizer.combine(p.losses(k))).backward()
        scaler.step(optimizer)
        scaler.update()
        plain_step(bare, q.losses(k))
    same_numbers(p.parameters(), q.parameters(), rtol=1e-5)


# 7. The wrapped optimizer's state


def test_nothing_is_written_into_the_wrapped_optimizers_state():
    p = Problem()
    q = copy.deepcopy(p)
    optimizer = MultiTaskOptimizer(torch.optim.Adam(p.model.parameters()), GradNorm(), shared=p.encoder)
    optimizer.combine(p.losses()).backward()
    assert len(optimizer.state) == 0  # the wrapped optimizer initialises itself at its first step
    p.train(optimizer, 2)
    bare = torch.optim.Adam(q.model.parameters())
    plain_step(bare, q.losses())
    assert [set(s) for s in optimizer.state.values()] == [set(s) for s in bare.state.values()]
    assert all(isinstance(key, torch.nn.Parameter) for key in optimizer.state)


# 8. Attributes


def test_the_wrapper_has_exactly_one_attribute_of_its_own():
    p = Problem()
    optimizer = wrap(p, DWA(), shared=p.encoder)
    p.train(optimizer, 2)
    optimizer.load_state_dict(optimizer.state_dict())
    for each in (optimizer, copy.deepcopy(optimizer)):
        assert len(vars(each)) == 1
        assert next(iter(vars(each))).startswith("_")


@pytest.mark.parametrize("name", ["_strategy", "_optimizer"])
def test_no_attribute_has_a_name_that_lightning_rebinds(name):
    assert not hasattr(wrap(Problem(), UW()), name)


# 9. The wrapped optimizer


def test_the_wrapped_optimizer_is_exposed():
    inner = Problem().sgd()
    assert MultiTaskOptimizer(inner, UW()).optimizer is inner


# 10. Only committed steps count


def test_a_step_without_combine_is_the_wrapped_optimizers_own_and_not_counted():
    p = Problem()
    q = copy.deepcopy(p)
    optimizer, bare = wrap(p, Counting()), q.sgd()
    p.train(optimizer, 1)
    plain_step(bare, q.losses())
    before = own(optimizer)
    plain_step(optimizer, p.losses(1))
    plain_step(bare, q.losses(1))
    assert same(p.parameters(), q.parameters())
    assert same(own(optimizer), before)
    assert optimizer.report.step == 1


def test_a_combine_without_step_is_not_counted():
    p = Problem()
    optimizer = wrap(p, Counting())
    optimizer.combine(p.losses()).backward()
    assert optimizer.report.step == 0
    assert own(optimizer)["state"] is None
    assert own(optimizer)["tasks"] == []


@inner_optimizers
def test_distributed_checkpointing_probes_with_a_fake_step_that_is_not_counted(inner):
    p = Problem()
    optimizer = MultiTaskOptimizer(inner(p), Counting())
    before = p.parameters()
    get_optimizer_state_dict(p.model, optimizer)
    assert own(optimizer)["step"] == 0
    assert own(optimizer)["state"] is None
    assert same(p.parameters(), before)
    p.train(optimizer, 1)
    assert float(own(optimizer)["state"]["count"]) == 1


@inner_optimizers
def test_distributed_checkpointing_saves_and_loads_the_wrapped_optimizers_state(inner):
    p = Problem()
    optimizer = MultiTaskOptimizer(inner(p), Equal())
    p.train(optimizer, 3)
    q = copy.deepcopy(p)
    loaded = MultiTaskOptimizer(inner(q), Equal())
    with pytest.warns(UserWarning, match="starts afresh"):  # that format has no place for keys of others
        set_optimizer_state_dict(q.model, loaded, copy.deepcopy(get_optimizer_state_dict(p.model, optimizer)))
    p.train(optimizer, 3, start=3)
    q.train(loaded, 3, start=3)
    same_numbers(p.parameters(), q.parameters())


# 11. Scaling; under gradient scalers: test_mixed_precision.py


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighting", [MGDA(), GradNorm(), UW(), PCGrad()], ids=repr)
def test_statistics_weights_and_states_are_not_in_the_parameters_low_precision(weighting, dtype):
    p = Problem(dtype=dtype)
    optimizer = wrap(p, weighting, shared=p.encoder)
    p.train(optimizer, 3)
    assert optimizer.report.weights.dtype == torch.float64
    assert optimizer.report.losses.dtype == torch.float32
    assert optimizer.report.gramian is None or optimizer.report.gramian.dtype == torch.float64
    assert all(parameter.dtype == dtype for parameter in p.model.parameters())
    assert all(value.isfinite().all() for value in p.parameters().values())


def test_losses_in_half_precision_whose_sum_overflows_it_are_still_summed():
    w = torch.nn.Parameter(torch.ones((), dtype=torch.float16))
    optimizer = MultiTaskOptimizer(torch.optim.SGD([w], lr=1e-6), Equal())
    combined = optimizer.combine({"a": w * 60000, "b": w * 60000})
    assert float(combined.detach()) == 2 * float(torch.tensor(60000.0, dtype=torch.float16))


# 12. Tolerances: test_extremes.py
