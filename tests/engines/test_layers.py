"""Gradients of layers that are not made, or by products of our own, against those that autograd makes."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from mtlweight import MGDA, GradVac, MTLWeightError, MultiTaskOptimizer, Needs, NonFiniteError, PCGrad, SLGrad
from mtlweight._statistics import gramian_of
from mtlweight.engines import _layers, _rows
from mtlweight.engines._graph import Backward
from mtlweight.engines._rows import Product
from tests.benchmarks._measure import MIB, peak_memory
from tests.engines.test_alignment import combined, optimizer_for
from tests.engines.test_gradients import WEIGHTS, Reader, of_equal, written
from tests.engines.zoo import NETWORKS, alignment, close, jacobian, problem

WIDE = 256
"""Of square layers that are long enough to count."""


@pytest.fixture
def eager(monkeypatch):
    """All linear layers count, whatever it saves; the list says of which ones gradients were not made."""
    seen = []
    monkeypatch.setattr(_layers, "WIDE", 0)
    monkeypatch.setattr(_layers.Linear, "compares", lambda layer, _: seen.append(layer.weight) or True)
    return seen


def measured(model, losses, weighting=None, **options):
    """The Gramian, and the gradients that the backward wrote."""
    options = {"shared": model, **options}
    optimizer = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), weighting or MGDA(), **options)
    optimizer.zero_grad()
    optimizer.combine(losses).backward()
    optimizer.step()
    return optimizer.report, {name: p.grad for name, p in model.named_parameters()}


def agree(model, losses, **options):
    """Gramian and gradients are those of one ordinary backward a task. Losses are a function, called twice."""
    rows = jacobian(dict(enumerate(losses().unbind())), list(model.parameters()))
    report, gradients = measured(model, losses(), **options)
    assert close(report.gramian, (rows.double() @ rows.double().T), 1e-5 if rows.dtype == torch.float32 else 1e-12)
    found = torch.cat(
        [(torch.zeros_like(p) if (g := gradients[n]) is None else g).flatten() for n, p in model.named_parameters()]
    )
    assert close(found, report.weights @ rows.double(), 1e-5 if rows.dtype == torch.float32 else 1e-12)


def square(layers=1, bias=True, dtype=torch.float64, width=WIDE):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width, bias=bias) for _ in range(layers))).to(dtype)


def means(outputs, m=3):
    return torch.stack([part.square().mean() for part in outputs.chunk(m, dim=-1)])


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("heads", ["weighted", "unweighted"])
def test_gramian_and_step_are_those_of_one_backward_a_task(network, heads, device):
    p = problem(NETWORKS[network], device=device)
    reader = Reader(Needs.GRAMIAN)
    view = reader.read(p, p.task_losses, heads=heads)
    shared, others = of_equal(network, "task_losses", device)
    weights = torch.tensor(WEIGHTS, dtype=torch.float64, device=device)
    assert close(view["GRAMIAN"], shared @ shared.T)
    assert close(written(p.shared), weights @ shared)
    assert close(written(p.heads), (weights if heads == "weighted" else torch.ones_like(weights)) @ others)


def test_the_networks_have_layers_of_which_no_gradient_is_made(eager):
    for network in ("linear", "dropout", "transformer layer with dropout", "a parameter that one task does not touch"):
        eager.clear()
        p = problem(NETWORKS[network])
        Reader(Needs.GRAMIAN).read(p, p.task_losses)
        assert eager


@given(
    st.integers(1, 6), st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.floats(-1e3, 1e3), st.integers(0, 99)
)
def test_inner_products_are_exact_however_much_of_the_gradients_cancels_between_samples(n, i, o, m, mean, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, i, generator=generator) + mean
    deltas = torch.randn(m, n, o, generator=generator)
    deltas = deltas - deltas.mean(dim=1, keepdim=True) if n > 1 else deltas
    rows = torch.einsum("mno,ni->moi", deltas.double(), x.double()).flatten(1)
    found = Product(0, x, [*deltas]).gramian()
    assert torch.equal(found, found.T)
    assert torch.allclose(found, rows @ rows.T, rtol=1e-9, atol=1e-15 * float((deltas.norm() * x.norm()) ** 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4,), (2, 3), (1, 2, 2)])
def test_a_wide_layer_may_come_with_or_without_a_bias_and_with_data_of_any_rank(shape, bias, dtype, device):
    model, x = square(2, bias, dtype).to(device), torch.randn(*shape, WIDE, dtype=dtype, device=device)
    agree(model, lambda: means(model(x).tanh()))


def peak_of_a_step(model, x, m):
    """The most memory of a step, in MiB."""
    optimizer = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), MGDA(), shared=model)

    def step():
        optimizer.zero_grad()
        optimizer.combine(means(model(x), m)).backward()
        optimizer.step()

    step()
    return peak_memory(step, x.device)


def test_a_wide_layer_alone_has_no_gradient_in_memory_but_the_step(device):
    model, x = square(dtype=torch.float32, width=1024).to(device), torch.randn(8, 1024, device=device)
    assert peak_of_a_step(model, x, 16) * MIB < 3 * 4 * 1024**2  # one gradient, and less than as much around it


def test_no_samples_have_inner_products_of_zero():
    found = Product(0, torch.empty(0, 3), [torch.empty(0, 2)] * 2).gramian()
    assert torch.equal(found, torch.zeros(2, 2, dtype=torch.float64))


def test_a_weighting_per_entry_may_read_the_gramian_alone(monkeypatch):
    monkeypatch.setattr(_rows, "LONG", 0)  # else all gradients are one vector anyway
    p, other = problem(NETWORKS["linear"]), problem(NETWORKS["linear"])
    rows = jacobian(other.task_losses(), other.shared)
    weights = torch.linspace(-1, 1, rows.numel(), dtype=torch.float64).reshape(rows.shape)
    Reader(Needs.GRAMIAN, weights, "entry").read(p, p.task_losses)
    assert close(written(p.shared), (weights * rows).sum(dim=0))


def unequal(model, x):
    """Of this model and data nothing may be taken for a layer with one weight."""
    found = _layers.linear_layers(Backward([*means(model(x))]), list(model.parameters()), lambda _: True)
    assert not found
    agree(model, lambda: means(model(x).tanh()))


class Twice(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.layer, self.how = square()[0], how

    def forward(self, x):
        return self.how(self.layer, x)


USES = {
    "called twice": lambda layer, x: layer(layer(x).tanh()),
    "its weight is data as well": lambda layer, x: layer(x) * layer.weight.sum(dim=0),
    "its transposed weight is used twice": lambda layer, x: (lambda w: x.tanh() @ w + (x @ w).tanh())(layer.weight.t()),
    "scaled": lambda layer, x: torch.addmm(layer.bias, x, layer.weight.t(), alpha=0.5),
    "not transposed": lambda layer, x: x @ layer.weight,
    "a weight made of it": lambda layer, x: nn.functional.linear(x, layer.weight * 2),
}


@pytest.mark.parametrize("how", USES)
def test_what_is_no_linear_layer_with_a_weight_of_its_own_is_left_to_autograd(how):
    unequal(Twice(USES[how]), torch.randn(4, WIDE, dtype=torch.float64))


def test_a_hook_of_the_output_changes_the_gradient_as_in_any_backward():
    model, x = square(2), torch.randn(4, WIDE, dtype=torch.float64)

    def losses():
        z = model[0](x)
        z.register_hook(lambda g: 2 * g)
        return means(model[1](z.tanh()))

    agree(model, losses)


def test_what_checkpointing_or_offloading_packs_is_not_unpacked_for_a_look():
    model, x, calls = square(2), torch.randn(4, WIDE, dtype=torch.float64, requires_grad=True), []

    def counted(x):
        calls.append(1)
        return model[1](model[0](x).tanh())

    losses = means(checkpoint(counted, x, use_reentrant=False))
    assert not _layers.linear_layers(Backward([*losses]), list(model.parameters()), lambda _: True)
    measured(model, losses)
    assert len(calls) == 1 + 3  # once for each task


def test_a_task_that_does_not_reach_the_layer_has_inner_products_of_zero():
    model, x = square(2), torch.randn(4, WIDE, dtype=torch.float64)
    agree(model, lambda: torch.stack([model(x).square().mean(), model[0](x).square().mean(), model[1](x).cos().mean()]))


def test_a_gradient_that_is_not_finite_is_named_and_the_task_can_be_dropped():
    model, x = square(), torch.randn(4, WIDE, dtype=torch.float64)

    def losses():
        a, b, c = means(model(x)).unbind()
        return {"a": a, "b": b + 0 * (b - b.detach()).sqrt(), "c": c}

    with pytest.raises(NonFiniteError, match=r"gradient of task b .*'0.weight' of shape \[256, 256\]"):
        measured(model, losses())
    report, gradients = measured(model, losses(), on_nonfinite="drop")
    assert report.tasks == ("a", "c")
    twin = copy.deepcopy(model)
    outputs = means(twin(x))
    _, expected = measured(twin, {"a": outputs[0], "c": outputs[2]})
    assert all(close(gradients[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_of_low_precision_have_inner_products_in_high(dtype):
    model, x = square(2, dtype=dtype), torch.randn(4, WIDE).to(dtype)
    report, gradients = measured(model, means(model(x)).float())
    exact = copy.deepcopy(model).double()
    expected, right = measured(exact, means(exact(x.double())))
    assert close(report.gramian, expected.gramian, 0.05)
    assert gradients["0.weight"].dtype == dtype
    assert close(gradients["0.weight"], right["0.weight"], 0.1)


def test_samples_with_one_weight_each_still_add_up_in_parts():
    model, x = square(), torch.randn(8, WIDE)
    model.float()

    def losses(x):
        return lambda: {str(t): part.square().mean(dim=1) for t, part in enumerate(model(x).chunk(3, dim=1))}

    whole, expected = measured(model, losses(x), PCGrad())
    parts, found = measured(model, [losses(x[:3]), losses(x[3:])], PCGrad())
    assert close(parts.gramian, whole.gramian, 1e-5)
    assert all(close(found[name], expected[name], 1e-5) for name in expected)


@pytest.fixture
def followed(monkeypatch):
    """No gradient of a linear layer's weight is made for the forward engine; counts those that are made after all."""
    made, dense = [], _layers.Factors.dense.func
    monkeypatch.setattr(_layers, "WIDE", 0)
    monkeypatch.setattr(_layers.Linear, "leads", lambda _: True)
    monkeypatch.setattr(_layers.Factors, "dense", property(lambda factors: made.append(factors) or dense(factors)))
    return made


@pytest.mark.usefixtures("followed")
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    "options",
    [{}, {"scope": "all"}, {"scope": "main"}, {"learn_reference": True}, {"ema": 0.5}, {"lookahead": True}],
    ids=str,
)
def test_alignments_are_those_along_a_gradient_that_is_made(network, options, device, monkeypatch):
    def aligned():
        p = problem(NETWORKS[network], device=device)
        optimizer = optimizer_for(p, SLGrad("left", **options))
        return combined(p, optimizer, p.sample_losses), written(p.model.parameters())

    report, gradients = aligned()
    monkeypatch.setattr(_layers.Linear, "leads", lambda _: False)
    expected, right = aligned()
    assert report.engine == expected.engine
    assert close(report.alignment, expected.alignment)
    assert close(gradients, right)


class Along(nn.Module):
    """Two wide layers, with two tasks and a reference."""

    def __init__(self, use=None, dtype=torch.float64):
        super().__init__()
        self.layers, self.use = square(2, dtype=dtype, width=8), use
        generator = torch.Generator().manual_seed(1)
        self.x, self.held_out = torch.randn(2, 5, 8, generator=generator).to(dtype)

    def forward(self, x):
        return self.layers[1](self.layers[0](x).tanh())

    def losses(self):
        outputs = self.forward(self.x)
        extra = self.use(self.layers[0], self.x) if self.use is not None else 0
        return {"a": outputs.square().mean(dim=1) + extra, "b": outputs.sin().mean(dim=1) + extra}

    def reference(self):
        return self.forward(self.held_out).square().mean()

    def report(self, reference=None, steps=1, **options):
        options = {"shared": self.layers, **options}
        optimizer = MultiTaskOptimizer(torch.optim.SGD(self.parameters(), lr=0.0), SLGrad("a"), **options)
        for _ in range(steps):
            optimizer.combine(self.losses, reference=reference or self.reference).backward()
            optimizer.step()
        return optimizer.report


def test_no_gradient_is_made_where_only_linear_layers_use_their_weights(followed):
    Along().report(steps=3)
    once = len(followed)
    Along().report(steps=2)
    assert once == len(followed) - once == 2 * 2  # both layers, for each of two comparisons with a backward


def out_of_sight(layer, x):
    with torch._C.DisableTorchFunction():
        return (x @ layer.weight.t()).sum(dim=1)


ELSEWHERE = {
    "its norm": lambda layer, _: layer.weight.square().sum(),
    "in a list": lambda layer, _: torch.stack([layer.weight, layer.weight.sin()]).sum(),
    "as a product": lambda layer, x: (x @ layer.weight.t()).sum(dim=1),
    "by an attribute": lambda layer, _: (layer.weight @ layer.weight.T - torch.eye(8)).square().sum(),
    "by name": lambda layer, x: nn.functional.linear(input=x, weight=layer.weight).sum(dim=1),
    "as data": lambda layer, _: nn.functional.linear(layer.weight, layer.weight).sum(),
    "in a second call": lambda layer, x: layer(x.sin()).sum(dim=1),
    "without a gradient": lambda layer, x: (layer(x) * layer.weight.sum()).detach().sum(dim=1) * layer.bias.sum(),
    "under no_grad, then with": lambda layer, x: no_grad(layer, x) * layer.weight.square().sum(),
    "under vmap": lambda layer, x: torch.func.vmap(layer)(x).sum(dim=1),
    "out of sight": out_of_sight,
}


@torch.no_grad()
def no_grad(layer, x):
    return layer(x).sum(dim=1) + layer.weight.sin().sum()


@pytest.mark.usefixtures("followed")
@pytest.mark.parametrize("use", ELSEWHERE)
def test_a_weight_may_be_used_in_any_other_way_as_well(use):
    model = Along(ELSEWHERE[use])
    calls, plain = [], model.losses
    model.losses = lambda: calls.append(1) or plain()
    report = model.report()
    assert report.engine == "forward"
    assert len(calls) == 1 + (use == "out of sight")
    expected = alignment(plain(), model.reference(), list(model.layers.parameters()))
    assert close(report.alignment, expected)


@pytest.mark.usefixtures("followed")
def test_several_references_that_use_one_layer_add_up():
    model = Along()
    references = [model.reference, lambda: model.layers(model.x).cos().mean()]
    report = model.report(references)
    mean = sum(reference() for reference in references) / 2
    assert close(report.alignment, alignment(model.losses(), mean, list(model.layers.parameters())))


@pytest.mark.usefixtures("followed")
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_alignments_in_float32_are_as_exact_as_along_a_gradient_that_is_made(mean, monkeypatch):
    def error():
        model = Along(dtype=torch.float32)
        model.x, model.held_out = model.x + mean, model.held_out + mean
        found = model.report().alignment
        model.double()
        model.x, model.held_out = model.x.double(), model.held_out.double()
        expected = alignment(model.losses(), model.reference(), list(model.layers.parameters()))
        return float((found - expected).abs().max() / expected.abs().max())

    factored = error()
    monkeypatch.setattr(_layers.Linear, "leads", lambda _: False)
    assert factored < 1e-6 + 10 * error()


def test_layers_count_where_they_have_many_more_weights_than_samples():
    x, weight = torch.empty(64, 784), torch.empty(512, 784)
    layer = _layers.Linear(None, x, weight)
    assert layer.leads()
    assert layer.compares(2)
    assert not layer.compares(1)
    for n in (256, 4096):
        more = _layers.Linear(None, torch.empty(n, 784), weight)
        assert not more.leads()
        assert not more.compares(2)
    assert not _layers.Linear(None, x.bfloat16(), weight).leads()


def test_a_buffer_that_every_batch_is_copied_to_may_hold_the_data_of_the_reference():
    model, buffer = square(dtype=torch.float32), torch.zeros(5, WIDE)
    x, held_out = torch.randn(2, 5, WIDE)

    def aligned(enter):
        optimizer = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), SLGrad("a"), shared=model)
        losses = {"a": lambda: model(enter(x)).tanh().mean(dim=1)}
        optimizer.combine(
            lambda: {task: loss() for task, loss in losses.items()},
            reference=lambda: model(enter(held_out)).tanh().square().mean(),
        ).backward()
        optimizer.step()
        assert optimizer.report.engine == "forward"
        return optimizer.report.alignment

    assert close(aligned(buffer.copy_), aligned(torch.clone), 1e-5)


def test_the_next_batch_may_be_copied_in_before_the_backward():
    model, buffer = square(dtype=torch.float32), torch.zeros(5, WIDE)
    x = torch.randn(5, WIDE)
    _, expected = measured(model, means(model(x)))
    expected = {name: gradient.clone() for name, gradient in expected.items()}
    optimizer = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), MGDA(), shared=model)
    model.zero_grad()
    scalar = optimizer.combine(means(model(buffer.copy_(x))))
    buffer.zero_()
    scalar.backward()
    assert all(close(p.grad, expected[name], 1e-5) for name, p in model.named_parameters())


def test_what_enters_a_layer_may_be_a_parameter_that_a_look_ahead_moves(monkeypatch):
    def aligned():
        model = square(dtype=torch.float32)
        queries = nn.Parameter(torch.linspace(-1, 1, 3 * WIDE).reshape(3, WIDE).sin())
        parameters = torch.optim.SGD([*model.parameters(), queries], lr=1e3)
        optimizer = MultiTaskOptimizer(parameters, SLGrad("a", lookahead=True), shared=[model, queries], model=model)
        optimizer.combine(
            lambda: {"a": model(queries).tanh().mean(dim=1)}, reference=lambda: model(queries).tanh().square().mean()
        )
        return optimizer._record.pending.report.alignment

    factored = aligned()
    monkeypatch.setattr(_layers.Linear, "leads", lambda _: False)
    assert close(factored, aligned(), 1e-4)


@pytest.mark.usefixtures("followed")
def test_a_hook_that_the_losses_register_runs():
    fired = []
    model = Along(lambda layer, _: layer.weight.register_hook(fired.append) and 0)
    expected = Along().report(steps=3).alignment
    assert close(model.report(steps=3).alignment, expected)
    assert len(fired) == 3 + 2  # backwards of three steps, two of which were compared with another


@given(st.integers(0, 999))
def test_inner_products_are_exact_where_all_of_a_gradient_cancels(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 7, generator=generator, dtype=torch.float64).expand(5, 7)
    deltas = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    deltas[0] -= deltas[0].mean(dim=0)
    found = Product(0, x, [*deltas]).gramian()
    assert 0 <= found[0, 0] <= 1e-28 * x.square().sum() * deltas[0].square().sum()
    assert found[0, 1].square() <= (1 + 1e-9) * found[0, 0] * found[1, 1]


def test_a_weighting_that_divides_by_lengths_takes_a_gradient_that_all_but_vanishes():
    torch.manual_seed(0)
    model, query = square(dtype=torch.float32, bias=False), torch.randn(WIDE)
    contrast = torch.randn(6, WIDE)
    contrast = contrast - contrast.mean(dim=0)
    other = torch.randn(6, WIDE)

    def losses():
        outputs = model(query.expand(6, WIDE))
        return torch.stack([(outputs * contrast).sum(), (outputs * other).sum()])

    report, _ = measured(model, losses(), GradVac())
    assert report.gramian[0, 0] >= 0
    rows = jacobian(dict(enumerate(losses())), list(model.parameters())).double()
    assert close(report.gramian, rows @ rows.T, 1e-5)


def test_the_last_task_that_reaches_a_layer_may_be_dropped():
    model, heads = square(bias=False), nn.ParameterList([torch.ones(3, dtype=torch.float64) for _ in range(2)])
    x = torch.randn(4, WIDE, dtype=torch.float64)
    loss = model(x).square().mean()
    losses = {"a": loss + 0 * (loss - loss.detach()).sqrt(), "b": heads[0].sum(), "c": heads[1].square().sum()}
    optimizer = MultiTaskOptimizer(
        torch.optim.SGD([*model.parameters(), *heads], lr=0.0), MGDA(), shared=model, on_nonfinite="drop"
    )
    optimizer.combine(losses).backward()
    optimizer.step()
    assert optimizer.report.tasks == ("b", "c")
    assert not optimizer.report.gramian.any()


@pytest.mark.usefixtures("followed")
def test_a_reference_whose_graph_was_freed_gets_the_error_that_says_so():
    model = Along()
    reference = model.reference()
    reference.backward()
    with pytest.raises(MTLWeightError, match="graph was freed by an earlier backward"):
        model.report(reference)


@pytest.mark.usefixtures("followed")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_may_be_autocast_where_the_reference_is_not(dtype):
    """The data's inner products are beyond float16, and the gradient that they stand for is not."""
    model = Along(dtype=torch.float32)
    model.x, model.held_out = 300 * model.x, 300 * model.held_out
    model.layers[0].weight.data.mul_(1e-3)
    exact = model.report(lambda: 1e-4 * model.reference()).alignment
    plain = model.losses

    def losses():
        with torch.autocast("cpu", dtype):
            return {task: loss.float() for task, loss in plain().items()}

    model.losses = losses
    report = model.report(lambda: 1e-4 * model.reference())
    assert report.engine == "forward"
    assert close(report.alignment, exact, 0.1)


def test_sparse_gradients_at_the_output_are_made_dense():
    model, x = square(bias=False), torch.randn(4, WIDE, dtype=torch.float64)
    places = torch.randint(WIDE, (4, 3))

    def losses(sparse):
        y = model(x)
        return {"a": torch.gather(y, 1, places, sparse_grad=sparse).square().sum(), "b": y.sin().mean()}

    report, gradients = measured(model, losses(True))
    found = gradients["0.weight"].clone()
    expected, gradients = measured(model, losses(False))
    assert close(report.gramian, expected.gramian)
    assert close(found, gradients["0.weight"])


def test_the_default_device_is_nothing_to_inner_products():
    rows = [torch.arange(1.0, 4.0).repeat(1 << 16), torch.ones(3 << 16)]
    expected = gramian_of(rows)
    with torch.device("meta"):
        assert torch.equal(gramian_of(rows), expected)
        assert torch.equal(gramian_of(torch.stack(rows)), expected)


def test_a_layer_is_named_where_its_data_is_not_finite():
    model, x = square(dtype=torch.float32, bias=False), torch.randn(4, WIDE)
    x[0] = torch.nan
    mask = torch.tensor([False, True, True, True])[:, None]
    outputs = torch.where(mask, model(x), torch.zeros(()))
    with pytest.raises(NonFiniteError, match=r"'0.weight' of shape \[256, 256\]"):
        measured(model, means(outputs))


@pytest.mark.parametrize("samples", [8, 128, 440])
def test_less_memory_is_taken_for_any_number_of_samples_for_which_gradients_are_not_made(samples, monkeypatch):
    model, m = square(dtype=torch.float32, width=1024), 16
    x = torch.randn(samples, 1024)
    assert _layers.Linear(None, x, model[0].weight).compares(m)
    least = peak_of_a_step(model, x, m)
    monkeypatch.setattr(_layers.Linear, "compares", lambda *_: False)
    assert least < peak_of_a_step(model, x, m)


def test_a_backward_under_autocast_writes_gradients_of_full_precision():
    model, x = square(dtype=torch.float32), torch.randn(4, WIDE)
    _, expected = measured(model, means(model(x)))
    optimizer = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), MGDA(), shared=model)
    model.zero_grad()
    scalar = optimizer.combine(means(model(x)))
    with torch.autocast("cpu", torch.bfloat16):
        scalar.backward()
    assert close(model[0].weight.grad, expected["0.weight"], 1e-6)


def test_a_backward_may_run_twice_where_its_graph_is_kept():
    model, x = square(2), torch.randn(4, WIDE, dtype=torch.float64)
    _, once = measured(model, means(model(x)))
    once = {name: gradient.clone() for name, gradient in once.items()}
    optimizer = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), MGDA(), shared=model)
    model.zero_grad()
    scalar = optimizer.combine(means(model(x)))
    scalar.backward(retain_graph=True)
    scalar.backward()
    assert all(close(p.grad, 2 * once[name]) for name, p in model.named_parameters())
