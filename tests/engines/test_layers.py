"""Layers whose gradients the rows engine takes by products of its own, against autograd's."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from mtlweight import MGDA, MultiTaskOptimizer, Needs, NonFiniteError, PCGrad, SLGrad
from mtlweight.engines import _layers
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
    monkeypatch.setattr(_layers, "LONG", 0)
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
    found = Product(0, x, [*deltas]).gramian
    assert torch.equal(found, found.T)
    assert torch.allclose(found, rows @ rows.T, rtol=1e-9, atol=1e-15 * float((deltas.norm() * x.norm()) ** 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4,), (2, 3), (1, 2, 2)])
def test_a_wide_layer_may_come_with_or_without_a_bias_and_with_data_of_any_rank(shape, bias, dtype, device):
    model, x = square(2, bias, dtype).to(device), torch.randn(*shape, WIDE, dtype=dtype, device=device)
    agree(model, lambda: means(model(x).tanh()))


def test_a_wide_layer_alone_has_no_gradient_in_memory_but_the_step(device):
    model, x, m = square(dtype=torch.float32, width=1024).to(device), torch.randn(8, 1024, device=device), 16
    optimizer = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), MGDA(), shared=model)

    def step():
        optimizer.zero_grad()
        optimizer.combine(means(model(x), m)).backward()
        optimizer.step()

    step()
    assert peak_memory(step, x.device) * MIB < 3 * 4 * 1024**2  # one gradient, and less than as much around it


def unequal(model, x):
    """Of this model and data nothing may be taken for a layer with one weight."""
    found = _layers.linear(Backward([*means(model(x))]), list(model.parameters()), lambda _: True)
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
    assert not _layers.linear(Backward([*losses]), list(model.parameters()), lambda _: True)
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


def gray(**options):
    torch.manual_seed(0)
    return nn.Conv2d(**{"in_channels": 1, "out_channels": 3, "kernel_size": 3, **options})


CONVOLUTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "stride": {"stride": (2, 3)},
    "padding": {"padding": (2, 1)},
    "same padding": {"padding": "same"},
    "a kernel that is no square": {"kernel_size": (2, 5)},
}
OTHERS = {
    "dilation": {"dilation": 2},
    "several channels": {"in_channels": 2},
    "depthwise": {"in_channels": 3, "groups": 3},
}


@pytest.mark.parametrize("options", CONVOLUTIONS | OTHERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_convolution_has_the_gradients_of_one_backward_a_task(options, dtype, device):
    options = (CONVOLUTIONS | OTHERS)[options]
    model = gray(**options).to(device, dtype)
    x = torch.randn(4, options.get("in_channels", 1), 9, 8, dtype=dtype, device=device)
    agree(model, lambda: means(model(x).tanh(), 2))
    x.requires_grad_()
    agree(model, lambda: means(model(x).tanh(), 2))


@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_gray_images_are_told_from_others_on_the_cpu(options, monkeypatch):
    x = torch.randn(4, 1, 9, 8)

    def found(model, x):
        return {*_layers.gray_convolutions(Backward([model(x).sum()]), list(model.parameters()))}

    model = gray(**CONVOLUTIONS[options])
    assert found(model, x) == {*range(len(list(model.parameters())))}
    monkeypatch.setattr(_layers, "PATCHES", 4 * 7)
    assert not found(model, x)  # the patches are too many
    assert not any(found(gray(**o), torch.randn(4, o.get("in_channels", 1), 9, 8)) for o in OTHERS.values())


CONVOLVED = {
    "called twice": lambda layer, x: layer(x) + layer(x.sin()),
    "its bias is data as well": lambda layer, x: layer(x) * layer.bias.sum(),
    "its weight is data as well": lambda layer, x: layer(x) * layer.weight.sum(),
}


@pytest.mark.parametrize("use", CONVOLVED)
def test_a_convolution_whose_weight_or_bias_is_used_twice_is_left_to_autograd(use):
    use = CONVOLVED[use]
    model, x = gray().double(), torch.randn(4, 1, 9, 8, dtype=torch.float64)
    assert not _layers.gray_convolutions(Backward([use(model, x).sum()]), list(model.parameters()))
    agree(model, lambda: means(use(model, x).tanh(), 2))


def test_a_frozen_bias_is_no_hindrance():
    model, x = gray().double(), torch.randn(4, 1, 9, 8, dtype=torch.float64)
    model.bias.requires_grad_(False)
    report, gradients = measured(model, means(model(x).tanh(), 2))
    row = jacobian(dict(enumerate(means(model(x).tanh(), 2))), [model.weight])
    assert close(report.gramian, row @ row.T)
    assert close(gradients["weight"].flatten(), report.weights @ row)


@pytest.fixture
def followed(monkeypatch):
    """No gradient of a linear layer's weight is made for the forward engine; counts those that are made after all."""
    made, dense = [], _layers.Factors.dense.func
    monkeypatch.setattr(_layers, "LONG", 0)
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
    if use == "out of sight":
        with pytest.warns(UserWarning, match=r"a parameter of shape \[8, 8\] is used past torch's function modes"):
            report = model.report()
        assert report.engine == "pullback"
    else:
        report = model.report()
        assert report.engine == "forward"
    expected = alignment(model.losses(), model.reference(), list(model.layers.parameters()))
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
    x, weight = torch.empty(64, 784, device="meta"), torch.empty(512, 784, device="meta")
    layer = _layers.Linear(None, x, weight)
    assert layer.leads()
    assert layer.compares(2)
    assert not layer.compares(1)
    for n in (256, 4096):
        more = _layers.Linear(None, torch.empty(n, 784, device="meta"), weight)
        assert not more.leads()
        assert not more.compares(2)
    assert not _layers.Linear(None, x.bfloat16(), weight).leads()
