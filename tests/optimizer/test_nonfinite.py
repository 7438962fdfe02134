"""Values that are not finite: raise, skip or drop, and never into the state."""

import copy
from dataclasses import dataclass

import pytest
import torch

from mtlweight import (
    DWA,
    MGDA,
    UW,
    Constant,
    Equal,
    GradDrop,
    GradNorm,
    MTLWeightError,
    MultiTaskOptimizer,
    Needs,
    NonFiniteError,
    PCGrad,
    SLGrad,
    Weighting,
    ema,
    weighting,
)
from tests.problems import Counting, Problem, own, poison, same, step, wrap

TASKS = ("a", "b", "c")
READS_GRADIENTS = [MGDA(), PCGrad(), GradNorm(), GradDrop(), UW() >> MGDA()]
READS_LOSSES = [Equal(), UW(), DWA(), ema(DWA())]
BAD_LOSSES = {"NaN": torch.nan, "inf": torch.inf, "-inf": -torch.inf}


def bad_loss(p, value):
    losses = p.losses(5)
    return {**losses, "b": losses["b"] * 0 + value}


def bad_gradient(p, _=None):
    losses = p.losses(5)
    return {**losses, "b": losses["b"] + poison(p.encoder[0].weight)}


BAD = {name: (lambda p, value=value: bad_loss(p, value)) for name, value in BAD_LOSSES.items()}
every_bad_loss = pytest.mark.parametrize("bad", list(BAD.values()), ids=list(BAD))


def bad_for(each):
    """What a weighting can see of a bad batch before the step."""
    gradients = Needs.GRAMIAN in each.needs or Needs.JACOBIAN in each.needs
    return {**BAD, **({"gradient": bad_gradient} if gradients else {})}


CASES = [
    pytest.param(each, bad, id=f"{each!r}-{name}")
    for each in (*READS_LOSSES, *READS_GRADIENTS)
    for name, bad in bad_for(each).items()
]


# Raise


@pytest.mark.parametrize(("each", "bad"), CASES)
def test_raise_names_the_task_and_leaves_parameters_and_state_untouched(each, bad, device):
    p = Problem(TASKS, device=device)
    optimizer = wrap(p, each, shared=p.encoder)
    p.train(optimizer, 3)
    before = p.everything(optimizer)
    with pytest.raises(NonFiniteError, match=r"The (loss|gradient) of task b is not finite: expected .*, found ") as e:
        optimizer.combine(bad(p))
    assert e.value.tasks == ("b",)
    assert same(p.everything(optimizer), before)
    p.train(optimizer, 1, start=3)
    assert optimizer.report.step == 4
    assert optimizer.report.skipped == 0


def test_all_bad_tasks_are_named():
    p = Problem(TASKS)
    with pytest.raises(NonFiniteError, match="The loss of task a, c is not finite"):
        wrap(p, Equal()).combine({t: x * (torch.nan if t != "b" else 1) for t, x in p.losses().items()})


def test_one_bad_sample_is_enough():
    p = Problem(TASKS)
    samples = p.samples()
    samples["b"] = samples["b"] * torch.tensor([1, 1, torch.nan, 1, 1, 1], dtype=p.dtype)
    with pytest.raises(NonFiniteError, match="The loss of task b is"):
        wrap(p, Equal()).combine(samples)


@pytest.mark.parametrize("each", READS_LOSSES, ids=repr)
def test_raise_finds_a_gradient_that_only_the_backward_shows_before_anything_has_changed(each):
    p = Problem(TASKS)
    optimizer = wrap(p, each)
    p.train(optimizer, 3)
    optimizer.zero_grad()
    optimizer.combine(bad_gradient(p)).backward()
    before = p.everything(optimizer)
    with pytest.raises(NonFiniteError, match=r"A gradient is not finite after backward: expected .* \[5, 4\]\. The"):
        optimizer.step()
    assert same(p.everything(optimizer), before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, -1])
def test_one_bad_entry_of_one_gradient_is_found(value, at):
    p = Problem(TASKS, dtype=torch.float32)
    optimizer = wrap(p, Equal())
    optimizer.combine(p.losses()).backward()
    p.model.heads["c"].weight.grad[0, at] = value
    with pytest.raises(NonFiniteError, match=r"A gradient .* found NaN or infinity .* \[1, 5\]\. The"):
        optimizer.step()


def test_sparse_gradients_are_checked_too():
    table = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = MultiTaskOptimizer(torch.optim.SGD(table.parameters(), lr=0.1), Equal())
    rows = table(torch.tensor([1, 3, 3]))
    optimizer.combine({"a": rows.sum(), "b": rows.square().sum()}).backward()
    optimizer.step()
    assert optimizer.report.step == 1
    optimizer.zero_grad()
    optimizer.combine({"a": table(torch.tensor([1, 3])).sum() + poison(table(torch.tensor([2])))}).backward()
    with pytest.raises(NonFiniteError):
        optimizer.step()


NAMES = {
    "model": (lambda p: {"model": p.model, "shared": p.encoder}, r"'encoder\.0\.weight' of shape \[5, 4\]"),
    "module": (lambda p: {"shared": p.encoder}, r"'0\.weight' of shape \[5, 4\]"),
    "neither": (lambda p: {"shared": [*p.encoder.parameters()]}, r"parameter 0 of group 0, of shape \[5, 4\]"),
}
named = pytest.mark.parametrize(("options", "name"), list(NAMES.values()), ids=list(NAMES))


@named
@pytest.mark.parametrize("each", [Equal(), *READS_GRADIENTS], ids=repr)
def test_the_first_bad_parameter_is_named_as_the_user_named_it(each, options, name):
    p = Problem(TASKS)
    optimizer = wrap(p, each, **options(p))
    losses = p.losses()
    losses["b"] = losses["b"] + poison(p.encoder[0].weight) + poison(p.encoder[0].bias)
    with pytest.raises(NonFiniteError, match=rf"found NaN or infinity for {name}\. "):
        step(optimizer, losses)


@named
def test_the_first_bad_parameter_of_a_reference_is_named(options, name):
    p = Problem(TASKS)
    optimizer = wrap(p, SLGrad("a"), **options(p))
    with pytest.raises(NonFiniteError, match=rf"gradient of the reference .* found NaN or infinity for {name}\. "):
        optimizer.combine(p.samples(), reference=p.reference() + poison(p.encoder[0].weight))


@named
@pytest.mark.parametrize("each", [Equal(), MGDA()], ids=repr)
def test_a_parameter_that_is_not_finite_itself_is_named_beside_the_task(each, options, name):
    p = Problem(TASKS)
    optimizer = wrap(p, each, **options(p))
    with torch.no_grad():
        p.encoder[0].weight[0, 0] = torch.inf
        p.model.heads["b"].bias[0] = torch.nan
    expected = rf"The loss of task b is .* found NaN or infinity, which {name} holds itself\. Go back to a checkpoint"
    with pytest.raises(NonFiniteError, match=expected):
        optimizer.combine(p.losses())


def test_a_bad_gradient_of_a_parameter_elsewhere_is_told_by_its_shape():
    p = Problem(TASKS)
    optimizer = MultiTaskOptimizer(
        torch.optim.SGD(p.model.heads.parameters(), lr=0.1), MGDA(), shared=[*p.encoder.parameters()]
    )
    with pytest.raises(NonFiniteError, match=r"of task b .* for a parameter of shape \[5, 4\]\. Look"):
        optimizer.combine(bad_gradient(p))


# Skip


@pytest.mark.parametrize(("each", "bad"), CASES)
def test_skip_leaves_parameters_and_state_untouched_and_counts(each, bad):
    p = Problem(TASKS)
    q = copy.deepcopy(p)
    optimizer = wrap(p, each, shared=p.encoder, on_nonfinite="skip")
    clean = wrap(q, each, shared=q.encoder)
    p.train(optimizer, 3)
    q.train(clean, 3)
    assert step(optimizer, bad(p)) == 0
    assert same(p.parameters(), q.parameters())
    p.train(optimizer, 2, start=3)
    q.train(clean, 2, start=3)
    assert same(p.parameters(), q.parameters())
    assert same(own(optimizer)["state"], own(clean)["state"])
    assert same(optimizer.optimizer.state_dict(), clean.optimizer.state_dict())
    assert (optimizer.report.step, optimizer.report.skipped, optimizer.report.dropped) == (5, 1, {})


@pytest.mark.parametrize("policy", ["skip", "drop"])
@pytest.mark.parametrize("each", READS_LOSSES, ids=repr)
def test_a_gradient_that_only_the_backward_shows_is_skipped_where_no_task_is_to_blame(each, policy):
    p = Problem(TASKS)
    optimizer = wrap(p, each, on_nonfinite=policy)
    p.train(optimizer, 3)
    before, state = p.parameters(), copy.deepcopy(own(optimizer)["state"])
    step(optimizer, bad_gradient(p))
    assert same(p.parameters(), before)
    assert same(own(optimizer)["state"], state)
    assert (optimizer.report.step, optimizer.report.skipped) == (3, 1)


def test_a_combine_that_is_skipped_leaves_gradients_as_they_were():
    p = Problem(TASKS)
    optimizer = wrap(p, Equal(), on_nonfinite="skip")
    optimizer.combine(p.losses()).backward()
    before = p.gradients()
    optimizer.combine(bad_loss(p, torch.nan)).backward()
    assert same(p.gradients(), before)


def test_a_skipped_step_works_under_a_gradient_scaler():
    p = Problem(TASKS)
    optimizer = wrap(p, Equal(), on_nonfinite="skip")
    scaler = torch.amp.GradScaler("cpu")
    for losses in (p.losses, lambda: bad_loss(p, torch.nan), p.losses):
        optimizer.zero_grad()
        scaler.scale(optimizer.combine(losses())).backward()
        scaler.step(optimizer)
        scaler.update()
    assert (optimizer.report.step, optimizer.report.skipped) == (2, 1)


# Drop


@pytest.mark.parametrize("form", ["mapping", "callable"])
@pytest.mark.parametrize(("each", "bad"), CASES)
def test_drop_trains_as_if_the_task_were_absent_and_counts(each, bad, form):
    p = Problem(TASKS)
    q = copy.deepcopy(p)
    dropping = wrap(p, each, shared=p.encoder, on_nonfinite="drop")
    without = wrap(q, each, shared=q.encoder)
    p.train(dropping, 3)
    q.train(without, 3)
    for times in (1, 2):
        value = step(dropping, (lambda: bad(p)) if form == "callable" else bad(p))
        assert same(value, step(without, q.losses(5, tasks=["a", "c"])))
        assert dropping.report.dropped == {"b": times}
        assert dropping.report.tasks == ("a", "c")
    p.train(dropping, 2, start=3)
    q.train(without, 2, start=3)
    assert same(p.parameters(), q.parameters())
    assert same(own(dropping)["state"], own(without)["state"])
    assert dropping.report.skipped == 0


def test_a_task_dropped_from_the_first_batch_of_a_tensor_is_known_later():
    p = Problem(("0", "1"))
    optimizer = wrap(p, UW(), on_nonfinite="drop")
    losses = torch.stack(list(p.losses().values()))
    step(optimizer, losses + torch.tensor([0, torch.nan], dtype=p.dtype))
    assert own(optimizer)["tasks"] == ["0", "1"]
    step(optimizer, torch.stack(list(p.losses(1).values())))
    assert optimizer.report.tasks == ("0", "1")
    with pytest.raises(MTLWeightError, match="of the 2 tasks"):
        optimizer.combine(losses[:1])


@pytest.mark.parametrize("each", [UW(), MGDA()], ids=repr)
def test_drop_skips_the_step_where_stacking_lets_one_tasks_nan_into_all_gradients(each):
    # Backward through the stack multiplies the bad row's NaN by zero. Losses in a mapping have no such connection.
    p = Problem(("0", "1"))
    optimizer = wrap(p, each, shared=p.encoder, on_nonfinite="drop")
    before = p.parameters()
    losses = p.losses()
    step(optimizer, torch.stack([losses["0"], losses["1"] * torch.nan]))
    assert same(p.parameters(), before)
    assert (optimizer.report.step, optimizer.report.skipped) == (0, 1)
    assert optimizer.report.dropped["1"] == 1


def test_a_batch_from_which_all_tasks_are_dropped_is_skipped():
    p = Problem(TASKS)
    optimizer = wrap(p, UW(), on_nonfinite="drop")
    before = p.parameters()
    step(optimizer, {task: loss * torch.nan for task, loss in p.losses().items()})
    assert same(p.parameters(), before)
    assert optimizer.report.dropped == {"a": 1, "b": 1, "c": 1}
    assert (optimizer.report.step, optimizer.report.skipped) == (0, 1)


def test_dropped_tasks_are_counted_when_the_step_is_taken_and_not_at_each_combine():
    p = Problem(TASKS)
    optimizer = wrap(p, UW(), on_nonfinite="drop")
    for _ in range(3):
        optimizer.combine(bad_loss(p, torch.nan))
    assert optimizer.report.dropped == {}
    step(optimizer, bad_loss(p, torch.nan))
    assert optimizer.report.dropped == {"b": 1}


def test_weights_given_in_the_order_of_the_tasks_stay_with_their_tasks_when_one_is_dropped():
    p = Problem(TASKS)
    optimizer = wrap(p, Constant([1.0, 2.0, 3.0]), on_nonfinite="drop")
    step(optimizer, bad_loss(p, torch.nan))
    assert optimizer.report.task_weights == {"a": 1.0, "c": 3.0}


# The reference


@pytest.mark.parametrize(
    "bad", [lambda p: p.reference() * torch.nan, lambda p: p.reference() + poison(p.encoder[0].bias)]
)
@pytest.mark.parametrize("as_callable", [False, True])
@pytest.mark.parametrize("policy", ["raise", "skip", "drop"])
def test_a_reference_that_is_not_finite_raises_or_skips(bad, as_callable, policy):
    p = Problem(TASKS)
    optimizer = wrap(p, SLGrad("a"), shared=p.encoder, on_nonfinite=policy)
    step(optimizer, p.samples(), reference=p.reference())
    before, parameters = p.everything(optimizer), p.parameters()
    reference = (lambda: bad(p)) if as_callable else bad(p)
    if policy == "raise":
        with pytest.raises(NonFiniteError, match=r"The gradient of the reference is not finite: expected .* found NaN"):
            optimizer.combine(p.samples(1), reference=reference)
        assert same(p.everything(optimizer), before)
    else:
        step(optimizer, p.samples(1), reference=reference)
        assert same(p.parameters(), parameters)
        assert (optimizer.report.step, optimizer.report.skipped, optimizer.report.dropped) == (1, 1, {})


@pytest.mark.parametrize("engine", ["forward", "pullback", "samples", "rows"])
def test_drop_drops_a_task_whose_alignment_is_not_finite(engine):
    p = Problem(TASKS)
    optimizer = wrap(p, SLGrad("a"), shared=p.encoder, model=p.model, on_nonfinite="drop", engine=engine)

    def losses():
        samples = p.samples()
        return {**samples, "b": samples["b"] * torch.inf}

    step(optimizer, losses, reference=p.reference)
    assert optimizer.report.dropped == {"b": 1}
    assert optimizer.report.tasks == ("a", "c")
    assert optimizer.report.weights.shape == (2, 6)


# The weighting's own


@weighting(Needs.LOSSES)
def bad_weights(view):
    return view.losses * torch.nan


@dataclass(frozen=True)
class BadState(Weighting):
    """Writes good weights, and after two steps a bad state."""

    needs = Needs.LOSSES

    def init(self, view):
        return {"nested": {"count": torch.zeros(())}}

    def weigh(self, view, state):
        count = state["nested"]["count"] + 1
        return torch.ones_like(view.losses), {"nested": {"count": torch.where(count > 2, torch.nan, count)}}


@pytest.mark.parametrize("policy", ["raise", "skip", "drop"])
@pytest.mark.parametrize("each", [bad_weights, BadState()], ids=repr)
def test_neither_weights_nor_a_state_that_are_not_finite_are_ever_kept(each, policy):
    p = Problem(TASKS)
    optimizer = wrap(p, each, on_nonfinite=policy)
    good = 0 if each is bad_weights else 2
    p.train(optimizer, good)
    before, parameters = copy.deepcopy(own(optimizer)["state"]), p.parameters()
    if policy == "raise":
        with pytest.raises(NonFiniteError, match=r"returned weights or a state that are not finite.*expected.*found"):
            optimizer.combine(p.losses())
    else:
        p.train(optimizer, 3)
        assert optimizer.report.skipped == 3
    assert same(own(optimizer)["state"], before)
    assert same(p.parameters(), parameters)
    assert optimizer.report.step == good


def test_a_gradient_that_becomes_bad_within_a_step_of_lbfgs_raises_since_parameters_have_moved():
    p = Problem(TASKS)
    optimizer = MultiTaskOptimizer(torch.optim.LBFGS(p.model.parameters(), max_iter=5), Counting(), on_nonfinite="skip")
    evaluations = 0

    def closure():
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        loss = optimizer.combine(p.losses() if evaluations < 3 else bad_loss(p, torch.nan))
        loss.backward()
        return loss

    with pytest.raises(NonFiniteError, match=r"xpected finite numbers throughout .* found NaN .* Lower the learning"):
        optimizer.step(closure)
    assert own(optimizer)["state"] is None
    assert optimizer.report.step == 0
