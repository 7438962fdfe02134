"""Tasks and parameters that come and go, under every weighting that ships."""

import copy
import functools
import io

import pytest
import torch
from torch import nn

from mtlweight import DBMTL, MGDA, UW, ExcessMTL, MoCo, MTLWeightError, MultiTaskOptimizer, Needs, SLGrad, View
from mtlweight._statistics import Given, tensors_of
from mtlweight._weighting import ReferenceUse, evaluate
from tests.problems import Problem, same, step
from tests.registry import CASES

MEASURED = Needs.GRAMIAN | Needs.JACOBIAN | Needs.ALIGNMENT
REMEMBERS_ENTRIES = (MoCo, DBMTL, ExcessMTL)
ONE_EACH = {type(case.weighting): case for case in CASES}.values()
"""Of each method and combinator the last row of the registry."""
every_method = pytest.mark.parametrize("case", ONE_EACH, ids=[repr(case.weighting) for case in ONE_EACH])


def tasks_of(case):
    return tuple(map(str, range(3 if 3 in case.tasks else max(case.tasks))))


def wrap(problem, weighting, *, shared=None, parameters=None, engine="auto"):
    adam = torch.optim.Adam(problem.model.parameters() if parameters is None else parameters, lr=0.01)
    shared = problem.encoder if shared is None else shared
    return MultiTaskOptimizer(adam, weighting, shared=shared, model=problem.model, engine=engine)


def train(problem, optimizer, first, last):
    for k in range(first, last):
        step(optimizer, lambda k=k: problem.samples(k), reference=lambda k=k: problem.reference(k + 50))


# Tasks


@functools.cache
def statistics(k, tasks, samples):
    """One batch of random numbers, with losses above zero."""
    random = torch.Generator().manual_seed(k)
    rows = torch.randn(len(tasks), samples, 4, generator=random, dtype=torch.float64)
    losses = 0.1 + torch.rand(len(tasks), samples, generator=random, dtype=torch.float64)
    alignment = torch.randn(len(tasks), samples, generator=random, dtype=torch.float64)
    given = {"losses": losses, "jacobian": rows, "alignment": alignment}
    return given if samples > 1 else {name: values[:, 0] for name, values in given.items()}


def rows_of(state, task):
    """All that a state keeps of one task."""
    if task in state:
        return state[task]
    return {name: rows_of(part, task) for name, part in state.items() if not isinstance(part, torch.Tensor)}


def weighed(weighting, k, tasks, state, known):
    samples = 3 if weighting.writes == "sample" or Needs.SAMPLES in weighting.needs else 1
    given = statistics(k % 10, tasks, samples)
    weights, state = evaluate(weighting, View(Given(**given, tasks=tasks, known=known), step=k), state)
    if weighting.observes_at(k):
        after = View(Given(losses=(0.9 + 0.01 * (k % 7)) * given["losses"], tasks=tasks, known=known), step=k)
        state = weighting.observe(after, state)
    return weights, state


@every_method
def test_a_task_that_is_absent_for_a_thousand_steps_finds_its_state_as_it_left_it(case):
    tasks, state = tasks_of(case), None
    for k in range(3):
        _, state = weighed(case.weighting, k, tasks, state, tasks)
    before = copy.deepcopy(rows_of(state, "1"))
    if list(tensors_of(state)):  # else an absence is nothing but another batch
        for k in range(3, 1003):
            _, state = weighed(case.weighting, k, tuple(task for task in tasks if task != "1"), state, tasks)
    assert same(rows_of(state, "1"), before)
    weights, state = weighed(case.weighting, 1003, tasks, state, tasks)
    assert len(weights) == len(tasks)
    assert all(tensor.isfinite().all() for tensor in (weights, *tensors_of(state)))


@every_method
def test_a_batch_without_any_task_changes_nothing_and_is_counted(case):
    p = Problem(tasks_of(case))
    optimizer = wrap(p, case.weighting)
    train(p, optimizer, 0, 1)
    before = p.everything(optimizer)
    looks = case.weighting.observes or (case.weighting.reference or ReferenceUse()).lookahead is not None
    forms = [lambda: dict.fromkeys(p.tasks)] if looks else [dict.fromkeys(p.tasks), lambda: dict.fromkeys(p.tasks)]
    for losses in forms:
        optimizer.zero_grad()
        assert float(optimizer.combine(losses, reference=p.reference).detach()) == 0
        optimizer.step()
    after = p.everything(optimizer)
    for each in (before, after):
        each["optimizer"]["mtlweight"].pop("skipped")
    assert optimizer.report.skipped == len(forms)
    assert same(after["optimizer"], before["optimizer"])
    assert same(after["parameters"], before["parameters"])


# Parameters


@every_method
def test_a_shared_module_frozen_in_part_trains_as_if_it_were_the_other_part(case):
    p, q = Problem(tasks_of(case)), Problem(tasks_of(case))
    p.encoder[0].bias.requires_grad_(False)
    rest = [parameter for parameter in q.model.parameters() if parameter is not q.encoder[0].bias]
    ours = wrap(p, case.weighting)
    theirs = wrap(q, case.weighting, shared=[q.encoder[0].weight], parameters=rest)
    train(p, ours, 0, 3)
    train(q, theirs, 0, 3)
    torch.testing.assert_close(p.parameters(), q.parameters(), rtol=1e-10, atol=1e-12)
    assert not same(p.parameters(), Problem(tasks_of(case)).parameters())


@every_method
def test_a_frozen_shared_module_trains_the_heads_or_is_an_error_that_changes_nothing(case):
    p = Problem(tasks_of(case))
    optimizer = wrap(p, case.weighting)
    p.encoder.requires_grad_(False)
    before = p.everything(optimizer)
    use = case.weighting.reference or ReferenceUse()
    if case.weighting.needs & MEASURED and use.scope != "all":
        with pytest.raises(MTLWeightError, match=r"no shared parameter requires grad: expected .* none\. Unfreeze"):
            train(p, optimizer, 0, 1)
        if use.lookahead != "stay":  # which takes a step within combine
            assert same(p.everything(optimizer), before)
        p.encoder.requires_grad_(True)
        train(p, optimizer, 0, 1)
        assert optimizer.report.step == 1
    else:
        train(p, optimizer, 0, 2)
        changed = {name for name, value in p.parameters().items() if not same(value, before["parameters"][name])}
        assert changed == {name for name in before["parameters"] if name.startswith("heads")}


def frozen(problem, _optimizer):
    problem.encoder[0].bias.requires_grad_(False)


def thawed(problem, _optimizer):
    problem.encoder[0].bias.requires_grad_(True)


def grown(problem, optimizer):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        problem.encoder.append(nn.Linear(5, 5, dtype=problem.dtype))
    optimizer.add_param_group({"params": problem.encoder[-1].parameters(), "lr": 0.02})


def outcome(weighting, changes, *, anew, tasks=("0", "1"), engine="auto"):
    """Trains through changes of the shared parameters; ``anew`` with an optimizer made and loaded after each."""
    problem = Problem(tasks)
    optimizer = wrap(problem, weighting, engine=engine)
    train(problem, optimizer, 0, 2)
    for k, change in enumerate(changes, 2):
        change(problem, optimizer)
        if anew:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = MultiTaskOptimizer(
                copy.copy(optimizer.optimizer), weighting, shared=problem.encoder, model=problem.model, engine=engine
            )
            optimizer.load_state_dict(saved)
        train(problem, optimizer, k, k + 1)
    return problem.everything(optimizer)


@every_method
def test_shared_parameters_that_change_in_mid_training_are_seen_as_by_an_optimizer_made_after_the_change(case):
    trained = functools.partial(outcome, case.weighting, tasks=tasks_of(case))
    if any(kind.__name__ in repr(case.weighting) for kind in REMEMBERS_ENTRIES):
        for change in (frozen, grown):
            with pytest.raises(MTLWeightError, match="remembers a number for each entry"):
                trained([change], anew=False)
    else:
        assert same(*(trained([frozen, grown, thawed], anew=anew) for anew in (False, True)))


@pytest.mark.parametrize("engine", ["rows", "batched", "features", "samples", "forward", "pullback"])
def test_every_engine_sees_shared_parameters_that_change_in_mid_training(engine):
    weighting = SLGrad("0", ema=0.5) if engine in ("forward", "pullback") else MGDA()
    went_on, made_anew, unchanged = (
        outcome(weighting, changes, anew=anew, engine=engine)
        for changes, anew in (([frozen, grown, thawed], False), ([frozen, grown, thawed], True), ([], False))
    )
    assert same(went_on, made_anew)
    assert went_on["parameters"].keys() > unchanged["parameters"].keys()


@pytest.mark.parametrize(
    ("weighting", "in_parts"),
    [(MoCo(), False), (DBMTL(), False), (ExcessMTL(), False), (UW() >> MoCo(), False), (ExcessMTL(), True)],
)
def test_a_state_about_entries_refuses_other_parameters_even_if_they_have_as_many_entries(weighting, in_parts, device):
    p = Problem(device=device)
    p.model.encoder = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 5))
    p.model.to(device, p.dtype)
    optimizer, layers = wrap(p, weighting), (p.encoder[0], p.encoder[2])

    def trained(optimizer, k, first, second):
        layers[0].requires_grad_(first)
        layers[1].requires_grad_(second)
        part = functools.partial(p.samples, k)
        step(optimizer, [part] if in_parts else part)

    trained(optimizer, 0, True, False)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, map_location=device, weights_only=True))
    trained(optimizer, 1, True, False)
    optimizer.zero_grad()
    before = p.everything(optimizer)
    with pytest.raises(MTLWeightError, match=r"remembers a number .* the .* 45 entries, found .* 45\. .* anew"):
        trained(optimizer, 2, False, True)
    assert same(p.everything(optimizer), before)
    anew = wrap(p, weighting)  # as the message says
    trained(anew, 2, False, True)
    trained(optimizer, 2, True, False)
    assert (optimizer.report.step, anew.report.step) == (3, 1)
