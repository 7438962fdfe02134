"""Steps that nobody commits are noticed, and the wrapped optimizer's own methods can be reached."""

import copy
import gc
import itertools
import warnings
import weakref

import pytest
import torch

from mtlweight import DWA, FAMO, MGDA, UW, Equal, MultiTaskOptimizer, every
from tests.problems import Counting, Problem, own, same, step, wrap


def backward(optimizer, p, k=0):
    loss = optimizer.combine(p.losses(k))
    loss.backward()


def warned(record):
    return [str(w.message) for w in record if str(w.message).startswith("mtlweight: ")]


@pytest.mark.parametrize("weighting", [Counting(), DWA(), UW(), every(2, UW()), UW() >> MGDA()], ids=repr)
def test_two_combines_whose_gradients_add_up_are_warned_of_once_and_counted(weighting):
    p = Problem()
    optimizer = wrap(p, weighting, shared=p.encoder)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.zero_grad()
            for k in range(2):
                backward(optimizer, p, k)
            optimizer.step()
    (message,) = warned(record)
    assert "combine was called again before step()" in message
    assert "accumulate(k)" in message
    assert record[-1].filename == __file__
    assert (optimizer.report.step, optimizer.report.uncommitted) == (3, 3)


def test_a_weighting_without_a_state_loses_nothing_and_is_counted_alone():
    p = Problem()
    optimizer = wrap(p, MGDA(), shared=p.encoder)
    for k in range(2):
        backward(optimizer, p, k)
    optimizer.step()
    assert optimizer.report.uncommitted == 1


class Unseen(torch.optim.Optimizer):
    """Writes to the parameters in a way that autograd does not notice, as many published optimizers do."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self):
        for p in self.param_groups[0]["params"]:
            p.data.add_(p.grad.data, alpha=-0.1)


@pytest.mark.parametrize("weighting", [Counting(), Equal()], ids=repr)
@pytest.mark.parametrize("cleared", [True, False])
@pytest.mark.parametrize("unseen", [True, False])
@pytest.mark.parametrize("copied", [True, False])
def test_a_step_of_the_wrapped_optimizer_behind_ours_is_warned_of_once_and_counted(weighting, cleared, unseen, copied):
    p = Problem()
    optimizer = MultiTaskOptimizer(Unseen(p.model.parameters()) if unseen else p.sgd(), weighting)
    p, optimizer = copy.deepcopy((p, optimizer)) if copied else (p, optimizer)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for k in range(3):
            backward(optimizer, p, k)
            optimizer.optimizer.step()
            if cleared:
                optimizer.zero_grad()
    (message,) = warned(record)
    assert f"{type(optimizer.optimizer).__name__} was stepped after a combine, but not by this optimizer's" in message
    assert "Call step() of this one" in message
    assert (optimizer.report.step, optimizer.report.uncommitted) == (0, 2)  # the last one may still be committed


def each(optimizer, p):
    optimizer.zero_grad()
    for k in range(2):
        with optimizer.accumulate(2, weigh="each"):
            backward(optimizer, p, k)
    optimizer.step()


def together(optimizer, p):
    optimizer.zero_grad()
    for k in range(2):
        with optimizer.accumulate(2):
            loss = optimizer.combine(lambda k=k: p.samples(k)) / 2
        loss.backward()
    optimizer.step()


CALLS = {
    "no backward": lambda o, p: o.combine(p.losses()),
    "cleared": lambda o, p: (backward(o, p), o.zero_grad()),
    "cleared to zeros": lambda o, p: (backward(o, p), o.zero_grad(set_to_none=False)),
    "cleared by the model": lambda o, p: (backward(o, p), p.model.zero_grad()),
    "committed": lambda o, p: (backward(o, p), o.step()),
    "closure": lambda o, p: o.step(lambda: (o.zero_grad(), backward(o, p))[1]),
    "each": each,
    "together": together,
    "skipped": lambda o, p: (o.combine({"left": p.losses()["left"] * torch.nan}).backward(), o.step()),
}


@pytest.mark.parametrize(("first", "second"), [*itertools.product(CALLS, CALLS)])
def test_whatever_ends_in_a_step_or_without_gradients_is_not_warned_of(first, second):
    p = Problem()
    optimizer = wrap(p, Counting(), on_nonfinite="skip")
    for _ in range(2):
        CALLS[first](optimizer, p)
        CALLS[second](optimizer, p)
    assert optimizer.report.uncommitted == 0


def test_a_step_that_a_gradient_scaler_skips_is_not_warned_of_though_somebody_clamps_parameters():
    p = Problem(dtype=torch.float32)
    optimizer = wrap(p, Counting())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    for k in range(3):
        optimizer.zero_grad()
        scaler.scale(optimizer.combine(p.losses(k))).backward()
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            p.encoder[0].weight.clamp_(-1, 1)
    assert optimizer.report.step < 3
    assert optimizer.report.uncommitted == 0


def test_a_sum_of_two_combines_is_warned_of_though_its_backward_comes_late():
    p = Problem()
    optimizer = wrap(p, Counting())
    scalar = optimizer.combine(p.losses(0)) + optimizer.combine(p.losses(1))
    with pytest.warns(UserWarning, match="combine was called again before step"):
        scalar.backward()
    optimizer.step()
    assert (optimizer.report.step, optimizer.report.uncommitted) == (1, 1)


def test_a_sum_of_micro_batches_that_are_weighed_each_loses_nothing():
    p = Problem()
    optimizer = wrap(p, Counting())
    with optimizer.accumulate(2, weigh="each"):
        scalar = optimizer.combine(p.losses(0)) + optimizer.combine(p.losses(1))
    scalar.backward()
    optimizer.step()
    assert optimizer.report.uncommitted == 0


def test_a_second_backward_through_a_committed_scalar_is_not_counted():
    p = Problem()
    optimizer = wrap(p, Counting())
    scalar = optimizer.combine(p.losses())
    scalar.backward(retain_graph=True)
    optimizer.zero_grad()
    optimizer.step()
    optimizer.combine({"left": p.model.encoder[0].bias.sum()})
    torch.autograd.grad(scalar, p.model.encoder[0].bias, allow_unused=True)
    assert optimizer.report.uncommitted == 0


def test_a_combine_for_looking_between_backward_and_step_is_warned_of():
    p = Problem()
    optimizer = wrap(p, UW())
    backward(optimizer, p)
    with pytest.warns(UserWarning, match=r"commits the later one alone.*to look at other losses, do not call combine"):
        optimizer.combine(p.losses(1))


def test_a_scalar_that_is_kept_keeps_nothing_of_its_step():
    p = Problem()
    optimizer = wrap(p, FAMO() >> MGDA(), shared=p.encoder)

    class Data:
        """What a callable holds."""

    kept, seen = [], []
    for k in range(2):
        data = Data()
        seen.append(weakref.ref(data))
        optimizer.zero_grad()
        loss = optimizer.combine(lambda data=data, k=k: p.losses(k) if data else None)
        kept.append(loss)
        loss.backward()
        optimizer.step()
    del data
    gc.collect()
    assert all(reference() is None for reference in seen)


# The wrapped optimizer's methods


class Sharp(torch.optim.SGD):
    """A method of two steps, as sharpness-aware minimization is often written."""

    rho = 0.05

    def first_step(self):
        return "first"

    def _private(self):
        return "private"


def test_public_methods_and_attributes_of_the_wrapped_optimizer_can_be_reached_and_private_ones_cannot():
    p = Problem()
    optimizer = MultiTaskOptimizer(Sharp(p.model.parameters(), lr=0.1), UW())
    assert optimizer.first_step() == "first"
    assert optimizer.rho == 0.05
    for copied in (optimizer, copy.deepcopy(optimizer)):
        assert copied.first_step() == "first"
        for name in ("_private", "nothing", "_step_supports_amp_scaling"):
            assert not hasattr(copied, name)
    with pytest.raises(AttributeError, match=r"no attribute 'nothing'.*neither has the wrapped Sharp"):
        optimizer.nothing  # noqa: B018


def test_a_half_built_optimizer_has_no_attributes_and_no_endless_search():
    with pytest.raises(AttributeError):
        MultiTaskOptimizer.__new__(MultiTaskOptimizer).anything  # noqa: B018


def test_what_the_uncommitted_combine_left_is_not_in_the_state():
    p = Problem()
    optimizer = wrap(p, Counting())
    step(optimizer, p.losses())
    before = own(optimizer)
    backward(optimizer, p)
    assert same(own(optimizer), before)
