"""Each penalty against a slow literal transcription of its formula, and what it claims: zeros, invariances, bounds."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mtlweight import Equal, MultiTaskOptimizer, View
from mtlweight._statistics import Given
from mtlweight.causal import Balance, Decorrelation, Invariance, ModuleSelector, RiskVariance, Sparsity, warmup
from mtlweight.causal._penalty import means
from mtlweight.causal.decorrelation import correlation
from tests.causal.problems import Problem, labels, value, view

KINDS = ("variance", "norm")
sizes = st.integers(2, 12)
seeds = st.integers(0, 2**31)


def graph_gradients(problem, environments, n=12):
    """``∇_A R_t^e`` by one backward an environment and task, through a graph that is a leaf, ``[e, T, K]``."""
    (x, y), selector = problem.data(n), problem.selector
    gates = selector.gates().detach().requires_grad_()
    outputs = torch.stack([module(x) for module in selector.bank.values()])
    found = []
    for e in environments.unique():
        rows = []
        for t, task in enumerate(selector.tasks):
            features = torch.tensordot(gates[t], outputs, dims=1)
            loss = (problem.heads[task](features)[:, 0] - y[task]).square()
            rows.append(torch.autograd.grad(loss[environments == e].mean(), gates, create_graph=True)[0][t])
        found.append(torch.stack(rows))
    return torch.stack(found)


@given(
    environments=st.lists(st.integers(0, 4), min_size=12, max_size=12),
    modules=st.integers(1, 4),
    kind=st.sampled_from(KINDS),
    gate=st.sampled_from(["sigmoid", "softmax"]),
)
@example(environments=[0] * 11 + [3], modules=3, kind="variance", gate="sigmoid")  # unbalanced, one with one sample
def test_invariance_is_its_formula_by_one_backward_an_environment_and_task(environments, modules, kind, gate):
    problem, environments = Problem(modules=modules, gate=gate), torch.tensor(environments)
    by_hand = graph_gradients(problem, environments)
    if kind == "variance":
        expected = by_hand.var(dim=0, correction=0).sum()
    else:
        expected = torch.stack([g.norm(dim=1).square().sum() for g in by_hand]).mean()
    torch.testing.assert_close(value(Invariance(kind), problem, environments), expected)


@given(environments=st.lists(st.integers(0, 4), min_size=12, max_size=12))
def test_risk_variance_is_its_formula_by_one_mean_an_environment_and_task(environments):
    problem, environments = Problem(), torch.tensor(environments)
    losses = problem.losses()
    risks = [[losses[t][environments == e].mean() for e in environments.unique()] for t in problem.tasks]
    expected = sum(torch.stack(each).var(correction=0) for each in risks)
    torch.testing.assert_close(value(RiskVariance(), problem, environments), expected)


@given(
    environments=st.lists(st.integers(0, 3), min_size=12, max_size=12),
    masks=st.lists(st.booleans(), min_size=24, max_size=24).filter(lambda each: any(each[:12]) and any(each[12:])),
)
@example(environments=[0] * 4 + [1] * 4 + [2] * 4, masks=[True] * 4 + [False] * 4 + [True] * 16)  # one has none of a
@pytest.mark.parametrize("penalty", [RiskVariance(), Invariance("variance"), Invariance("norm")], ids=repr)
def test_a_sample_without_a_label_is_in_no_environment_of_its_task(penalty, environments, masks):
    """One task after the other, over its labelled samples alone."""
    problem, environments = Problem(), torch.tensor(environments)
    mask = dict(zip(problem.tasks, torch.tensor(masks).reshape(2, 12), strict=True))

    def combined(tasks, keep=None):
        bound, found = penalty.on(problem.selector), []
        optimizer = MultiTaskOptimizer(
            torch.optim.SGD(problem.model.parameters(), lr=0.0),
            Equal(),
            penalty=lambda *given: found.append(bound(*given)) or found[0],
        )
        losses = {t: loss for t, loss in problem.losses(order=keep).items() if t in tasks}
        chosen = None if keep is not None else mask
        optimizer.combine(losses, mask=chosen, environments=environments if keep is None else environments[keep])
        return found[0]

    expected = sum(combined([t], mask[t].nonzero()[:, 0]) for t in problem.tasks)
    torch.testing.assert_close(combined(problem.tasks), expected)


@pytest.mark.parametrize("penalty", [RiskVariance(), Invariance("variance"), Invariance("norm")], ids=repr)
def test_labels_go_by_the_tasks_names_and_a_task_without_any_adds_nothing(penalty):
    """As in a process that has none of a task that others have."""
    problem, bare = Problem(), Problem()
    bound, alone = penalty.on(problem.selector), penalty.on(bare.selector)
    losses, expected = problem.losses(), bare.losses()
    losses["a"] = 0 * losses["a"]
    stacked = torch.stack([loss.detach() for loss in losses.values()])
    seen = View(Given(losses=stacked, tasks=("a", "b"), shares=torch.tensor([[0.0] * 12, [1 / 12] * 12])))
    found = bound({task: losses[task] for task in ("b", "a")}, seen, labels())
    only = {"b": expected["b"]}
    torch.testing.assert_close(found, alone(only, View(Given(losses=stacked[1:], tasks=("b",))), labels()))
    torch.testing.assert_close(bound({"b": problem.losses()["b"]}, seen, labels()), found)


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_order_gradient_of_invariance_is_that_of_the_formula(kind):
    problem, environments = Problem(), labels()
    value(Invariance(kind), problem, environments).backward()
    ours = problem.gradients()
    problem.model.zero_grad()
    by_hand = graph_gradients(problem, environments)
    # The oracle's graph is a leaf, so it has no gradient for the logits: those are left to the test below.
    (
        by_hand.var(dim=0, correction=0).sum() if kind == "variance" else by_hand.square().sum(dim=(1, 2)).mean()
    ).backward()
    theirs = problem.gradients()
    assert {*ours} == {*theirs, "selector.logits"}
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient)


@pytest.mark.parametrize(
    "penalty", [Invariance("variance"), Invariance("norm"), RiskVariance(), Decorrelation(), Sparsity(), Balance()]
)
def test_gradients_of_the_penalty_agree_with_finite_differences_in_every_parameter(penalty):
    problem, environments = Problem(), labels()
    names = [name for name, _ in problem.model.named_parameters()]

    def function(*parameters):
        twin = problem.copy()
        # Parameters that are swapped in by name keep their graph, which `copy_` would cut.
        for name, parameter in zip(names, parameters, strict=True):
            module, _, leaf = name.rpartition(".")
            owner = twin.model.get_submodule(module)
            del owner._parameters[leaf]
            setattr(owner, leaf, parameter)
        return value(penalty, twin, environments)

    given_ = [p.detach().clone().requires_grad_() for p in problem.model.parameters()]
    assert torch.autograd.gradcheck(function, given_, atol=1e-5)


@given(seed=seeds, kind=st.sampled_from([*KINDS, "risk"]))
def test_environments_of_the_same_samples_are_invariant(seed, kind):
    problem, environments = Problem(seed=seed % 1000), labels(12, 3)
    penalty = RiskVariance() if kind == "risk" else Invariance(kind)
    order = torch.arange(4).repeat_interleave(3)  # each of four samples once in each environment
    got = value(penalty, problem, environments, order=order)
    if kind == "norm":
        assert got > 0  # no environment differs, but the graph is not optimal in any
    else:
        assert got.item() == pytest.approx(0, abs=1e-25)


def test_the_norm_is_zero_where_no_loss_depends_on_the_graph():
    problem = Problem()
    for head in problem.heads.values():
        nn.init.zeros_(head.weight)
    assert value(Invariance("norm"), problem, labels()) == 0


@given(seed=seeds)
def test_no_penalty_depends_on_the_order_of_modules_samples_or_on_what_environments_are_called(seed):
    problem, random = Problem(modules=4), torch.Generator().manual_seed(seed)
    environments = torch.randint(4, (12,), generator=random)
    order, columns = torch.randperm(12, generator=random), torch.randperm(4, generator=random)
    names = torch.randperm(10, generator=random)[:4]
    twin = problem.copy()
    twin.selector.bank = nn.ModuleDict({str(k): list(problem.selector.bank.values())[k] for k in columns.tolist()})
    twin.selector.logits = nn.Parameter(problem.selector.logits.detach()[:, columns])
    for penalty in (*map(Invariance, KINDS), RiskVariance(), Decorrelation(), Sparsity(), Balance()):
        expected = value(penalty, problem, environments)
        got = value(penalty, twin, names[environments[order]], order=order)
        torch.testing.assert_close(got, expected, msg=lambda text, p=penalty: f"{p}: {text}")


def test_no_penalty_depends_on_the_order_of_tasks():
    problem, environments = Problem(tasks=("a", "b", "c")), labels()
    x, y = problem.data()
    for penalty in (*map(Invariance, KINDS), RiskVariance(), Decorrelation(), Sparsity(), Balance()):
        bound = penalty.on(problem.selector)
        results = []
        for tasks in (("a", "b", "c"), ("c", "a", "b")):
            features = problem.selector(x)
            losses = {t: (problem.heads[t](features[t])[:, 0] - y[t]).square() for t in tasks}
            results.append(bound(losses, view(losses=losses), environments))
        torch.testing.assert_close(*results)


@given(factor=st.floats(1e-3, 1e3), kind=st.sampled_from(KINDS))
def test_invariance_does_not_change_if_features_are_rescaled_and_the_heads_undo_it(factor, kind):
    problem, environments = Problem(), labels()
    expected = value(Invariance(kind), problem, environments)

    class Scaled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return factor * self.inner(x)

    twin = problem.copy()
    twin.selector.bank = nn.ModuleDict({name: Scaled(module) for name, module in twin.selector.bank.items()})
    with torch.no_grad():
        for head in twin.heads.values():
            head.weight.div_(factor)
    torch.testing.assert_close(value(Invariance(kind), twin, environments), expected)


@given(environments=st.lists(st.integers(0, 3), min_size=12, max_size=12), seed=seeds)
def test_what_is_claimed_to_be_non_negative_is(environments, seed):
    problem = Problem(seed=seed % 1000)
    for penalty in (*map(Invariance, KINDS), RiskVariance(), Decorrelation(), Sparsity(), Balance()):
        assert value(penalty, problem, torch.tensor(environments)) >= -1e-12


@pytest.mark.parametrize("penalty", [Invariance("variance"), RiskVariance()])
def test_one_environment_in_a_batch_is_neutral_and_the_report_says_so(penalty):
    problem = Problem()
    seen = view(losses=problem.losses())
    got = penalty.on(problem.selector)(problem.losses(), seen, torch.full((12,), 7))
    got.backward()
    assert got == 0
    assert all(g.isfinite().all() for g in problem.gradients().values())
    if isinstance(penalty, Invariance):
        assert seen.notes["environments"] == 1


def test_a_random_split_has_parts_of_equal_size_and_is_the_same_at_the_same_step():
    problem = Problem()
    results = [value(Invariance(), problem, 3, step=step) for step in (0, 0, 1)]
    assert results[0] == results[1]
    assert results[0] != results[2]


def test_labels_may_be_strings():
    problem = Problem()
    names = ["paris", "rome", "oslo"] * 4
    assert value(Invariance(), problem, names) == value(Invariance(), problem, labels())


@given(k=st.integers(2, 5), b=st.integers(2, 9), d=st.integers(1, 3), seed=seeds)
def test_decorrelation_is_the_mean_squared_pearson_correlation_between_modules(k, b, d, seed):
    z = torch.randn(k, b, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    squares = [
        torch.corrcoef(torch.stack([z[i, :, p], z[j, :, q]]))[0, 1].square()
        for i in range(k)
        for j in range(i + 1, k)
        for p in range(d)
        for q in range(d)
    ]
    torch.testing.assert_close(correlation(z), torch.stack(squares).mean())


def test_decorrelation_of_feature_maps_counts_positions_as_samples():
    z = torch.randn(3, 4, 2, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(correlation(z), correlation(z.movedim(2, -1).reshape(3, -1, 2)))


@given(seed=seeds, factor=st.floats(1e-3, 1e3), shift=st.floats(-10, 10))
def test_decorrelation_is_not_changed_by_shifting_and_rescaling_a_feature(seed, factor, shift):
    z = torch.randn(3, 8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    changed = z.clone()
    changed[1, :, 0] = factor * z[1, :, 0] + shift
    torch.testing.assert_close(correlation(changed), correlation(z))


def test_decorrelation_is_zero_for_uncorrelated_modules_and_one_for_copies():
    signs = torch.tensor([[1.0, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]], dtype=torch.float64)
    assert correlation(signs[:, :, None]).item() == pytest.approx(0, abs=1e-30)
    assert correlation(signs[[0, 0, 0]][:, :, None]).item() == pytest.approx(1)
    within = signs[:2].T.expand(1, 4, 2)
    assert correlation(torch.cat([within, signs[2].expand(2, 4).T[None]])).item() == pytest.approx(0, abs=1e-30)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e30, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_feature_correlates_with_nothing_and_its_gradient_is_finite(constant, dtype):
    z = torch.randn(2, 7, 1, dtype=dtype)
    z[0] = constant
    z.requires_grad_()
    got = correlation(z)
    got.backward()
    assert got == 0
    assert z.grad.isfinite().all()


def test_one_module_has_nothing_to_decorrelate_and_is_balanced():
    problem = Problem(modules=1)
    assert value(Decorrelation(), problem) == 0
    assert value(Balance(), problem) == 0


def test_one_sample_gives_no_correlation_and_no_nan():
    problem = Problem()
    total = value(
        Decorrelation() + Invariance() + Invariance("norm") + Balance(), problem, torch.zeros(1, dtype=torch.long), n=1
    )
    total.backward()
    assert total.isfinite()
    assert all(g.isfinite().all() for g in problem.gradients().values())


@given(logits=st.lists(st.floats(-1000, 1000, width=32), min_size=6, max_size=6))
@example(logits=[0.0] * 6)
@example(logits=[1000.0, -1000.0, -1000.0] * 2)
@example(logits=[-1000.0] * 6)
def test_sparsity_and_balance_are_their_formulas_and_their_gradients_are_finite(logits):
    problem = Problem()
    with torch.no_grad():
        problem.selector.logits.copy_(torch.tensor(logits).reshape(2, 3))
    gates = problem.selector.gates().detach()
    share = (gates.sum(dim=0) / gates.sum()).tolist() if gates.sum() > 0 else [0.0] * 3
    entropy = -sum(p * math.log(p) for p in share if p > 0)
    sparsity, balance = value(Sparsity(), problem), value(Balance(), problem)
    assert sparsity.item() == pytest.approx(gates.sum().item())
    assert balance.item() == pytest.approx(math.log(3) - entropy, abs=1e-9)
    (sparsity + balance).backward()
    assert problem.selector.logits.grad.isfinite().all()


def test_balance_is_zero_if_all_modules_are_used_alike():
    problem = Problem()
    with torch.no_grad():
        problem.selector.logits.copy_(torch.tensor([[1.0, -1.0, 0.5], [1.0, -1.0, 0.5]]))
    assert value(Balance(), problem) > 0.01
    with torch.no_grad():
        problem.selector.logits.fill_(-3.0)
    assert value(Balance(), problem).item() == pytest.approx(0, abs=1e-12)


def test_a_sum_notes_each_part_as_it_counts():
    problem = Problem()
    seen = view(losses=problem.losses())
    penalty = 2.0 * Invariance() + 0.5 * (Decorrelation() + Sparsity() * 3)
    total = penalty.on(problem.selector)(problem.losses(), seen, labels())
    single = {p: value(p, problem, labels()) for p in (Invariance(), Decorrelation(), Sparsity())}
    expected = {"invariance (variance)": 2.0, "decorrelation": 0.5, "sparsity": 1.5}
    for (name, factor), part in zip(expected.items(), single.values(), strict=True):
        torch.testing.assert_close(seen.notes[name], factor * part.detach())
    torch.testing.assert_close(total.detach(), sum(seen.notes[name] for name in expected))


def test_equal_parts_of_a_sum_add_up_and_a_sum_is_associative():
    problem = Problem()
    a, b, c = Sparsity(), Decorrelation(), Balance()
    torch.testing.assert_close(value(a + a, problem), 2 * value(a, problem))
    assert (a + b) + c == a + (b + c)
    assert repr(2 * a + warmup(5, b + c)) == "2 * Sparsity() + warmup(5, Decorrelation() + Balance())"


def test_a_warmup_rises_with_the_committed_steps_and_costs_nothing_before():
    problem = Problem()
    full = value(Sparsity(), problem).item()
    ramp = warmup(4, Sparsity(), start=2)
    got = [value(ramp, problem, step=step).item() for step in (0, 2, 3, 4, 6, 100)]
    assert got == pytest.approx([0, 0, full / 4, full / 2, full, full])
    assert value(warmup(4, Invariance()), problem, None, step=0) == 0  # not even environments are read


@given(counts=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=seeds)
def test_means_are_those_of_each_environments_samples(counts, seed):
    environments = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    values = torch.randn(2, len(environments), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = torch.stack([values[:, environments == e].mean(dim=1) for e in range(len(counts))])
    found, share = means(values, environments, torch.ones(values.shape[:2]))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(share, torch.full((len(counts), 2, 1), 1 / len(counts), dtype=torch.float64))


@pytest.mark.parametrize("environments", [2, 64])
def test_invariance_takes_one_backward_through_the_heads_whatever_the_number_of_environments(environments):
    problem, passes = Problem(), []
    problem.heads["a"].register_full_backward_hook(lambda *_: passes.append(1))
    value(Invariance(), problem, labels(128, environments), n=128)
    assert len(passes) == 1


def flops(penalty, modules, n):
    problem = Problem(modules=modules)
    losses, bound = problem.losses(n=n), penalty.on(problem.selector)
    losses = problem.losses(n=n)
    with FlopCounterMode(display=False) as counter:
        bound(losses, view(losses=losses), labels(n))
    return counter.get_total_flops()


def test_the_cost_is_linear_in_the_samples_and_at_most_quadratic_in_the_modules():
    for penalty, power in ((Invariance(), 1), (Decorrelation(), 2)):
        once = flops(penalty, 4, 100)
        assert flops(penalty, 4, 400) == pytest.approx(4 * once, rel=0.01)
        assert flops(penalty, 16, 100) <= 4**power * once


def test_losses_in_half_precision_are_compared_in_float32():
    problem = Problem(dtype=torch.bfloat16)
    assert value(Invariance(), problem, labels()).dtype == torch.float32
    assert value(Decorrelation(), problem).dtype == torch.float32


def test_per_task_forward_passes_and_several_batches_are_joined():
    problem = Problem()
    expected = value(Invariance(), problem, labels())
    (x, y), bound = problem.data(), Invariance().on(problem.selector)

    def loss(task, features, rows):
        return (problem.heads[task](features)[:, 0] - y[task][rows]).square()

    by_task = {t: loss(t, problem.selector(x, tasks=[t])[t], slice(None)) for t in ("a", "b")}
    torch.testing.assert_close(bound(by_task, view(losses=by_task), labels()), expected)
    halves = [(problem.selector(x[rows]), rows) for rows in (slice(0, 6), slice(6, 12))]
    joined = {t: torch.cat([loss(t, features[t], rows) for features, rows in halves]) for t in ("a", "b")}
    torch.testing.assert_close(bound(joined, view(losses=joined), labels()), expected)


def test_a_pruned_selector_is_penalised_over_the_modules_that_are_left():
    problem = Problem(modules=3)
    with torch.no_grad():
        problem.selector.logits.copy_(torch.tensor([[2.0, -40.0, -40.0], [-40.0, 2.0, -40.0]]))
    expected = graph_gradients(problem, labels())
    pruned = problem.copy()
    pruned.selector = problem.selector.prune()
    twin = value(Invariance("norm"), pruned, labels())
    torch.testing.assert_close(twin, expected[:, :, :2].square().sum(dim=(1, 2)).mean())


def test_a_selector_of_modules_with_batch_normalised_heads_is_fine():
    selector = ModuleSelector([nn.Linear(4, 3), nn.Linear(4, 3)], ["a"])
    head = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    bound = Invariance().on(selector)
    losses = {"a": head(selector(torch.randn(8, 4))["a"])[:, 0].square()}
    got = bound(losses, view(losses=losses), labels(8, 2))
    got.backward()
    assert got.isfinite()
    assert selector.logits.grad.isfinite().all()
