"""``step(closure)``: one decision a step, and the value of the objective whose gradient it is."""

import copy

import pytest
import torch

from mtlweight import (
    DWA,
    FAMO,
    IMTLG,
    MGDA,
    STCH,
    UW,
    Constant,
    Equal,
    GradDrop,
    MTLWeightError,
    MultiTaskOptimizer,
    PCGrad,
    SLGrad,
    UPGrad,
)
from tests.problems import Counting, Problem, own, same, step, wrap


def with_closure(optimizer, problem, k, combine):
    evaluations = 0

    def closure():
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        loss = combine(problem.losses(k))
        loss.backward()
        return loss

    return optimizer.step(closure), evaluations


@pytest.mark.training
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_with_equal_weights_converges_as_the_bare_one(line_search, seed):
    p = Problem(seed=seed)
    q = copy.deepcopy(p)
    options = {"lr": 0.5, "max_iter": 5, "line_search_fn": line_search}
    optimizer = MultiTaskOptimizer(torch.optim.LBFGS(p.model.parameters(), **options), Equal())
    bare = torch.optim.LBFGS(q.model.parameters(), **options)
    first = float(sum(p.losses().values()).detach())
    for _ in range(10):
        ours, evaluations = with_closure(optimizer, p, 0, optimizer.combine)
        theirs, wanted = with_closure(bare, q, 0, lambda losses: sum(losses.values()))
        assert float(ours.detach()) == float(theirs.detach())
        assert evaluations == wanted
    assert same(p.parameters(), q.parameters())
    assert float(sum(p.losses().values()).detach()) < 0.1 * first
    assert optimizer.report.step == 10


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_the_state_advances_once_a_step_however_often_the_closure_runs(line_search):
    p = Problem()
    lbfgs = torch.optim.LBFGS(p.model.parameters(), lr=0.1, max_iter=7, line_search_fn=line_search)
    optimizer = MultiTaskOptimizer(lbfgs, Counting())
    for k in range(1, 4):
        _, evaluations = with_closure(optimizer, p, 0, optimizer.combine)
        assert evaluations > 1
        assert float(own(optimizer)["state"]["count"]) == optimizer.report.step == k


def test_weights_stay_fixed_within_one_step_of_lbfgs():
    p = Problem()
    optimizer = MultiTaskOptimizer(torch.optim.LBFGS(p.model.parameters(), max_iter=5, lr=0.1), DWA() >> UW())
    seen = []

    def combine(losses):
        combined = optimizer.combine(losses)
        seen.append(optimizer._record.pending.report.weights)
        return combined

    for k in range(3):
        with_closure(optimizer, p, k, combine)
        assert len(seen) > 1
        assert all(torch.equal(weights, seen[0]) for weights in seen)
        seen.clear()
    assert all(value.isfinite() for value in own(optimizer)["state"]["1"]["log_variance"].values())


def test_adam_with_a_closure_equals_adam_without():
    p = Problem()
    q = copy.deepcopy(p)
    ours = MultiTaskOptimizer(torch.optim.Adam(p.model.parameters()), DWA())
    theirs = MultiTaskOptimizer(torch.optim.Adam(q.model.parameters()), DWA())
    for k in range(4):
        _, evaluations = with_closure(ours, p, k, ours.combine)
        assert evaluations == 1
        step(theirs, q.losses(k))
    assert same(p.everything(ours), q.everything(theirs))


def test_a_closure_that_clears_gradients_after_combine_as_lightning_does_is_committed():
    p = Problem()
    q = copy.deepcopy(p)
    ours, theirs = wrap(p, Counting()), wrap(q, Counting())

    def closure():
        loss = ours.combine(p.losses())
        ours.zero_grad()
        loss.backward()
        return loss

    ours.step(closure)
    step(theirs, q.losses())
    assert same(p.everything(ours), q.everything(theirs))


def test_a_closure_whose_first_losses_are_not_finite_skips_the_step_before_anything_has_changed():
    p = Problem()
    lbfgs = torch.optim.LBFGS(p.model.parameters(), max_iter=5)
    optimizer = MultiTaskOptimizer(lbfgs, Counting(), on_nonfinite="skip")
    before = p.parameters()
    with_closure(optimizer, p, 0, lambda losses: optimizer.combine({t: x * torch.inf for t, x in losses.items()}))
    assert same(p.parameters(), before)
    assert (optimizer.report.step, optimizer.report.skipped) == (0, 1)


# Value and gradient


WEIGHTINGS = [
    Constant({"left": 1.0, "right": 100.0}),
    UW(),
    DWA(),
    STCH(),
    FAMO(),
    MGDA(),
    IMTLG(),
    PCGrad(),
    UPGrad(),
    SLGrad("left"),
    SLGrad("left", scope="main", learn_reference=True),
    Constant([1.0, 7.0]) >> MGDA(),
]


def small(losses, _view, _environments):
    return sum(x.sum() for x in losses.values()) ** 2 / 10


KINDS = {
    "whole": {},
    "in parts": {"parts": 2},
    "retained": {"retain_graph": True},
    "penalty": {"penalty": small},
}


class Probing(torch.optim.SGD):
    """Evaluates the closure at three points on a line, as a line search does."""

    def step(self, closure=None):
        if closure is None:
            return super().step()
        parameters = self.param_groups[0]["params"]
        start = [w.detach().clone() for w in parameters]
        self.direction = [torch.randn_like(w) for w in parameters]
        for far in (0.0, STEP, -STEP):
            with torch.no_grad():
                for w, at, d in zip(parameters, start, self.direction, strict=True):
                    w.copy_(at + far * d)
            closure()
        return None


STEP = 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=lambda by: repr(by).split("(main")[0])
def test_at_every_evaluation_of_a_step_the_gradient_is_that_of_the_value(weighting, kind):
    options = dict(KINDS[kind])
    parts, retain = options.pop("parts", 1), options.pop("retain_graph", False)
    p = Problem()
    probing = Probing(p.model.parameters(), lr=1e-3)
    optimizer = MultiTaskOptimizer(probing, weighting, shared=p.encoder, model=p.model, **options)
    calls = [lambda k=k: p.samples(k) for k in range(parts)]
    given = calls if parts > 1 else calls[0]
    for _ in range(3):
        step(optimizer, given, reference=p.reference)  # states that are not the first
    seen = []

    def closure():
        optimizer.zero_grad()
        loss = optimizer.combine(given, reference=p.reference, retain_graph=retain)
        loss.backward()
        pairs = zip(p.model.parameters(), probing.direction, strict=True)
        seen.append((float(loss.detach()), float(sum((w.grad * d).sum() for w, d in pairs))))
        return loss

    optimizer.step(closure)
    (here, slope), (ahead, _), (behind, _) = seen
    assert (ahead - behind) / (2 * STEP) == pytest.approx(slope, rel=1e-6, abs=1e-8)
    assert (ahead + behind) / 2 == pytest.approx(here, rel=1e-7)


@pytest.mark.training
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_a_line_search_over_constant_weights_ends_where_it_does_over_the_weighted_sum(scale):
    def rosenbrock(w):
        return {"a": (1 - w[0]).square(), "b": (w[1] - w[0].square()).square()}

    found = []
    for ours in (True, False):
        w = torch.nn.Parameter(torch.tensor([-1.5, 2.0], dtype=torch.float64))
        inner = torch.optim.LBFGS([w], max_iter=20, line_search_fn="strong_wolfe")
        by = Constant({"a": 1.0, "b": scale})
        optimizer = MultiTaskOptimizer(inner, by) if ours else inner

        def closure(optimizer=optimizer, w=w, ours=ours):
            optimizer.zero_grad()
            losses = rosenbrock(w)
            weights = torch.tensor([1.0, scale], dtype=torch.float64)
            loss = optimizer.combine(losses) if ours else torch.dot(weights, torch.stack([*losses.values()]))
            loss.backward()
            return loss

        for _ in range(10):
            optimizer.step(closure)
        found.append(w.detach().clone())
    assert torch.equal(*found)
    assert torch.allclose(found[0], torch.ones(2, dtype=torch.float64), atol=1e-6)


def test_a_closure_returns_the_weighted_objective_and_everything_else_the_plain_sum():
    p = Problem()
    by = Constant({"left": 2.0, "right": 5.0})
    optimizer = wrap(p, by)
    losses = {task: float(loss.detach()) for task, loss in p.losses().items()}
    weighted = 2 * losses["left"] + 5 * losses["right"]
    assert float(step(optimizer, p.losses())) == pytest.approx(sum(losses.values()))
    assert float(optimizer.report.objective) == pytest.approx(weighted)
    q = Problem()
    optimizer = wrap(q, by)
    loss, _ = with_closure(optimizer, q, 0, optimizer.combine)
    assert float(loss.detach()) == pytest.approx(weighted)


def test_weights_that_read_gradients_measure_them_once_a_step():
    p = Problem()
    lbfgs = torch.optim.LBFGS(p.model.parameters(), max_iter=5, line_search_fn="strong_wolfe")
    optimizer = MultiTaskOptimizer(lbfgs, MGDA(), shared=p.encoder)
    backwards = []

    def combine(losses):
        losses["left"].register_hook(lambda _: backwards.append(1))
        return optimizer.combine(losses)

    for _ in range(5):
        backwards.clear()
        _, evaluations = with_closure(optimizer, p, 0, combine)
        assert evaluations > 1
        assert len(backwards) == evaluations  # the first measures, the others go back once
    assert optimizer.report.gramian is not None
    assert optimizer.report.step == 5


@pytest.mark.parametrize(
    ("weighting", "options"),
    [(GradDrop(), {}), (UW(), {"heads": "unweighted"}), (UW(), {"outer": "heads"})],
    ids=["entries", "unweighted heads", "outer"],
)
def test_weights_without_an_objective_are_an_error_once_a_closure_is_evaluated_again(weighting, options):
    p = Problem()
    if "outer" in options:
        options = {"outer": list(p.model.heads.parameters())}
    lbfgs = torch.optim.LBFGS(p.model.parameters(), max_iter=5, line_search_fn="strong_wolfe")
    optimizer = MultiTaskOptimizer(lbfgs, weighting, shared=p.encoder, **options)
    before = p.parameters()

    def combine(losses):
        return optimizer.combine(losses, reference=p.reference if "outer" in options else None)

    with pytest.raises(MTLWeightError, match=r"LBFGS evaluates its closure more than once.*have an objective"):
        with_closure(optimizer, p, 0, combine)
    assert same(p.parameters(), before)
    assert optimizer.report.step == 0
    optimizer = MultiTaskOptimizer(torch.optim.Adam(p.model.parameters()), weighting, shared=p.encoder, **options)
    with_closure(optimizer, p, 0, combine)
    assert optimizer.report.step == 1


def test_an_unknown_optimizer_that_evaluates_again_without_an_objective_is_refused_from_then_on():
    p = Problem()
    optimizer = MultiTaskOptimizer(Probing(p.model.parameters(), lr=0.1), GradDrop(), shared=p.encoder)
    with pytest.raises(MTLWeightError, match=r"Probing evaluates its closure.*Parameters have moved already"):
        with_closure(optimizer, p, 0, optimizer.combine)
    before = p.parameters()
    with pytest.raises(MTLWeightError, match=r"Probing evaluates its closure.*no one objective\. Use"):
        with_closure(optimizer, p, 0, optimizer.combine)
    assert same(p.parameters(), before)


def test_other_losses_in_a_later_evaluation_are_an_error():
    p = Problem()
    optimizer = MultiTaskOptimizer(torch.optim.LBFGS(p.model.parameters(), max_iter=5), UW())
    tasks = iter([("left", "right"), ("left",)])
    with pytest.raises(
        MTLWeightError, match=r"decided once.*left, right.*found others \(left,.*outside of the closure"
    ):
        with_closure(optimizer, p, 0, lambda _: optimizer.combine(p.losses(0, next(tasks))))


def test_a_task_dropped_at_the_first_evaluation_stays_away_for_the_step():
    p = Problem()
    lbfgs = torch.optim.LBFGS(p.model.parameters(), max_iter=5, lr=0.1)
    optimizer = MultiTaskOptimizer(lbfgs, UW(), on_nonfinite="drop")
    factors = iter([torch.nan])

    def combine(losses):
        return optimizer.combine({**losses, "bad": losses["left"] * next(factors, 1.0)})

    with_closure(optimizer, p, 0, combine)
    assert optimizer.report.tasks == ("left", "right")
    assert optimizer.report.dropped == {"bad": 1}


def test_several_combines_in_a_closure_hold_each_its_own_weights():
    p = Problem()
    lbfgs = torch.optim.LBFGS(p.model.parameters(), max_iter=4, lr=0.1)
    optimizer = MultiTaskOptimizer(lbfgs, DWA())
    for k in range(2):
        with_closure(optimizer, p, k, optimizer.combine)
    evaluations = 0

    def closure():
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        with optimizer.accumulate(2, weigh="each"):
            for i, k in enumerate((3, 4)):
                losses = p.losses(k)
                loss = optimizer.combine(losses) / 2
                loss.backward()
                weighted = optimizer._record.closure.decided[i].weights @ torch.stack([*losses.values()])
                torch.testing.assert_close(2 * loss, weighted)
        first, second = (decision.weights for decision in optimizer._record.closure.decided)
        assert not torch.allclose(first, second, rtol=1e-3)
        return loss

    optimizer.step(closure)
    assert evaluations > 2


# Frozen weights


def test_the_weights_that_adam_learned_are_kept_by_lbfgs_after_it():
    p = Problem()
    adam = MultiTaskOptimizer(torch.optim.Adam(p.model.parameters(), lr=0.05), UW(0.5))
    for k in range(5):
        step(adam, p.losses(k))
    kept = adam.frozen()
    assert kept == Constant(adam.report.task_weights)
    lbfgs = MultiTaskOptimizer(torch.optim.LBFGS(p.model.parameters(), max_iter=5), kept)
    with_closure(lbfgs, p, 0, lbfgs.combine)
    assert lbfgs.report.task_weights == adam.report.task_weights


def test_negative_weights_have_no_minimum_and_are_not_frozen():
    p = Problem()
    optimizer = wrap(p, Constant({"left": 1.0, "right": -0.5}))
    step(optimizer, p.losses())
    with pytest.raises(MTLWeightError, match=r"weights >= 0, found \{'right': -0.5\}.*no minimum"):
        optimizer.frozen()


@pytest.mark.parametrize(
    ("by", "found"), [(UW(), "none since the start or the load"), (SLGrad("left"), "weights per sample")]
)
def test_weights_that_there_are_not_or_that_belong_to_their_batch_cannot_be_frozen(by, found):
    p = Problem()
    optimizer = wrap(p, by, shared=p.encoder)
    if isinstance(by, SLGrad):
        step(optimizer, p.samples(), reference=p.reference())
    with pytest.raises(MTLWeightError, match=f"frozen.*one weight a task.*found {found}"):
        optimizer.frozen()
