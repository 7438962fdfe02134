"""The alignment engines, against one ordinary backward a task and sample."""

import pytest
import torch

import mtlweight
from mtlweight import MTLWeightError, MultiTaskOptimizer, Needs, SLGrad
from tests.zoo import (
    NETWORKS,
    SEED,
    TwoTasks,
    alignment,
    close,
    combined,
    gradient,
    jacobian,
    on_samples,
    optimizer_for,
    oracle,
    problem,
    scope_of,
    written,
)

# Some operators' backward has no batching rule: torch loops over it and says so, once in a process.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet:UserWarning")

ENGINES = ("forward", "pullback", "samples", "rows")
# Flash attention has no second derivative on the CPU; the forward engine runs its math kernel. Tested under fallbacks.
NO_PULLBACK = ("attention", "scaled dot product", "transformer layer with dropout")


def on_networks(*engines):
    """Each network on each of the engines that can measure it."""
    pairs = [(n, e) for n in NETWORKS for e in engines if not (e == "pullback" and n in NO_PULLBACK)]
    return pytest.mark.parametrize(("network", "engine"), pairs)


engines = pytest.mark.parametrize("engine", ENGINES)


@mtlweight.weighting(Needs.ALIGNMENT)
def on_tasks(view):
    return torch.full_like(view.alignment, 0.5)


@on_networks(*ENGINES)
@pytest.mark.parametrize(
    ("losses", "weighting"), [("task_losses", on_tasks), ("sample_losses", on_samples)], ids=["[m]", "[m, b]"]
)
def test_alignment_is_that_of_one_backward_a_loss(network, engine, losses, weighting, device):
    p, other = (problem(NETWORKS[network], device=device) for _ in range(2))
    report = combined(p, optimizer_for(p, weighting, engine=engine), getattr(p, losses))
    assert report.engine == engine
    assert not report.fallbacks
    assert close(report.alignment, oracle(other, losses))


@on_networks(*ENGINES)
def test_backward_writes_the_gradient_of_the_weighted_losses(network, engine, device):
    p, other = (problem(NETWORKS[network], device=device) for _ in range(2))
    weights = combined(p, optimizer_for(p, on_samples, engine=engine), p.sample_losses).weights
    torch.manual_seed(SEED)
    other.reference()
    (weights * torch.stack([*other.sample_losses().values()])).sum().backward()
    assert close(written(p.shared), written(other.shared))
    assert close(written(p.heads), written(other.heads))


@pytest.mark.parametrize("network", ["convolutions and BatchNorm", "dropout", "tied parameters"])
@pytest.mark.parametrize("engine", ["pullback", "samples", "rows"])
@pytest.mark.parametrize("form", ["mapping", "tensor"])
def test_computed_losses_give_the_same_alignment(network, engine, form):
    p, other = problem(NETWORKS[network]), problem(NETWORKS[network])
    report = combined(p, optimizer_for(p, on_samples, engine=engine), p.sample_losses, form)
    assert close(report.alignment, oracle(other, "sample_losses"))


@engines
def test_heads_of_samplewise_weights_are_unweighted_on_request(engine):
    p, other = problem(NETWORKS["linear"]), problem(NETWORKS["linear"])
    combined(p, optimizer_for(p, on_samples, engine=engine, heads="unweighted"), p.sample_losses)
    assert close(written(p.heads), jacobian(other.task_losses(), other.heads).sum(dim=0))


@engines
@pytest.mark.parametrize("network", ["linear", "dropout", "convolutions and BatchNorm"])
def test_a_learnt_reference_adds_its_own_gradient(network, engine):
    p, other = problem(NETWORKS[network]), problem(NETWORKS[network])
    report = combined(p, optimizer_for(p, SLGrad("left", learn_reference=True), engine=engine), p.sample_losses)
    torch.manual_seed(SEED)
    parameters = list(other.model.parameters())
    expected = gradient(other.reference(), parameters)
    expected += gradient((report.weights * torch.stack([*other.sample_losses().values()])).sum(), parameters)
    assert close(written(list(p.model.parameters())), expected)


class Entangled(TwoTasks):
    """Only the reference reaches the head on the right."""

    held_out = False

    def decode(self, represented):
        outputs = super().decode(represented)
        seen = outputs["left"] + outputs["right"][:, :1]
        return {**outputs, "left": seen} if self.held_out else outputs


@engines
@pytest.mark.parametrize("scope", ["shared", "main", "all"])
@pytest.mark.parametrize("network", ["linear", "dropout", "LSTM", "tied parameters"])
def test_the_scope_says_over_which_parameters_gradients_are_compared(network, scope, engine):
    p, other = problem(NETWORKS[network]), problem(NETWORKS[network])
    optimizer = optimizer_for(p, SLGrad("left", scope=scope), engine=engine)
    report = combined(p, optimizer, p.sample_losses)
    assert report.engine == engine
    assert close(report.alignment, oracle(other, "sample_losses", scope_of(other, scope)))


def entangled(reference_reaches_other_heads):
    p = problem(NETWORKS["linear"])
    p.model.__class__ = Entangled
    reference = p.reference

    def held_out():
        p.model.held_out = reference_reaches_other_heads
        try:
            return reference()
        finally:
            p.model.held_out = False

    p.reference = held_out
    return p


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_scope_main_leaves_out_other_tasks_heads_that_the_reference_reaches(engine):
    p, other = entangled(True), entangled(True)
    optimizer = optimizer_for(p, SLGrad("left", scope="main"), engine=engine)
    if engine in ("auto", "forward"):
        with pytest.warns(UserWarning, match=r"reaches heads of other tasks.*falling back to the pullback engine"):
            report = combined(p, optimizer, p.sample_losses)
        assert report.engine == "pullback"
        assert [*report.fallbacks.values()] == [1]
    else:
        report = combined(p, optimizer, p.sample_losses)
    main, everything = (oracle(other, "sample_losses", scope_of(other, scope)) for scope in ("main", "all"))
    assert close(report.alignment, main)
    assert not close(main, everything, rounding=0.01)


def test_scope_all_keeps_them():
    p, other = entangled(True), entangled(True)
    report = combined(p, optimizer_for(p, SLGrad("left", scope="all")), p.sample_losses)
    assert report.engine == "forward"
    assert close(report.alignment, oracle(other, "sample_losses", list(other.model.parameters())))


def test_scope_main_without_the_main_task_in_the_batch_runs_forward_and_keeps_to_the_shared_parameters():
    p, other = problem(NETWORKS["linear"]), problem(NETWORKS["linear"])
    optimizer = optimizer_for(p, SLGrad("left", scope="main"), engine="forward")
    report = combined(p, optimizer, lambda: {**p.sample_losses(), "left": None}, main="left")
    assert (report.engine, report.tasks) == ("forward", ("right",))
    assert close(report.alignment, oracle(other, "sample_losses")[1:])


@pytest.mark.parametrize(
    ("options", "form", "expected"),
    [
        ({}, "callable", "forward"),
        ({}, "mapping", "pullback"),
        ({"model": None}, "callable", "forward"),
        ({"model": None, "shared": "parameters"}, "callable", "pullback"),
        ({"shared": "parameters"}, "callable", "forward"),
        ({"model": None, "scope": "main"}, "callable", "pullback"),
        ({"scope": "main"}, "callable", "forward"),
        ({"engine": "batched"}, "callable", "forward"),
        ({"engine": "features"}, "callable", "forward"),
        ({"engine": "samples"}, "callable", "samples"),
    ],
)
def test_auto_runs_forward_where_losses_are_callable_and_the_modules_own_the_scope_and_else_pullback(
    options, form, expected
):
    p, other = problem(NETWORKS["linear"]), problem(NETWORKS["linear"])
    scope = options.get("scope", "shared")
    named = {"parameters": p.shared}
    options = {key: named.get(value, value) for key, value in options.items() if key != "scope"}
    report = combined(p, optimizer_for(p, SLGrad("left", scope=scope), **options), p.sample_losses, form)
    assert report.engine == expected
    assert not report.fallbacks
    assert close(report.alignment, oracle(other, "sample_losses", scope_of(other, scope)))


def test_forward_with_computed_losses_says_to_pass_a_callable():
    p = problem(NETWORKS["linear"])
    with pytest.raises(
        MTLWeightError, match=r"expected losses as a callable, found computed ones.*Pass combine\(lambda"
    ):
        combined(p, optimizer_for(p, on_samples, engine="forward"), p.sample_losses, "mapping")


@pytest.mark.parametrize("options", [{"shared": "parameters"}, {"scope": "main"}], ids=["shared", "main"])
def test_forward_over_parameters_that_no_module_owns_says_to_pass_the_model(options):
    p = problem(NETWORKS["linear"])
    weighting = SLGrad("left", scope=options.get("scope", "shared"))
    shared = p.shared if "shared" in options else p.model.encoder
    with pytest.raises(MTLWeightError, match=r"found some elsewhere\. Pass model=\.\.\. to MultiTaskOptimizer"):
        combined(p, optimizer_for(p, weighting, engine="forward", shared=shared, model=None), p.sample_losses)


def test_a_reference_that_reaches_no_parameter_of_the_optimizer_is_an_error():
    p, stranger = problem(NETWORKS["linear"]), problem(NETWORKS["linear"])
    p.reference = stranger.reference
    with pytest.raises(MTLWeightError, match="No parameter of the optimizer is in the reference's graph"):
        combined(p, optimizer_for(p, SLGrad("left", scope="all")), p.sample_losses)


@engines
def test_modules_that_share_parameters_or_contain_each_other_may_both_be_named(engine):
    p, other = problem(NETWORKS["tied parameters"]), problem(NETWORKS["tied parameters"])
    shared = [p.model.encoder, p.model.encoder[0], p.model.heads["left"]]
    report = combined(p, optimizer_for(p, on_samples, engine=engine, shared=shared, model=None), p.sample_losses)
    assert report.engine == engine
    assert close(report.alignment, oracle(other, "sample_losses"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@engines
def test_of_low_precision_parameters_the_alignment_is_that_of_float32_within_the_dtypes_rounding(engine, dtype):
    low, high = problem(NETWORKS["linear"], dtype=dtype), problem(NETWORKS["linear"], dtype=dtype)
    report = combined(low, optimizer_for(low, on_samples, engine=engine), low.sample_losses)
    high.model.float()
    high.x, high.held_out = high.x.float(), high.held_out.float()
    high.y["left"] = high.y["left"].float()
    assert report.engine == engine
    assert close(report.alignment, oracle(high, "sample_losses"), rounding=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("network", ["convolutions and BatchNorm", "tied parameters", "a layer that is used twice"])
def test_forward_swaps_the_parameters_for_the_call_alone(network):
    p = problem(NETWORKS[network])
    before = {name: value.clone() for name, value in p.model.state_dict().items()}
    names = [name for name, _ in p.model.named_parameters()]
    ids = [id(q) for q in p.model.parameters()]
    combined(p, optimizer_for(p, on_samples, engine="forward"), p.sample_losses)
    assert [id(q) for q in p.model.parameters()] == ids
    assert all(torch.equal(before[name], p.model.state_dict()[name]) for name in names)


# However the model uses its weights and its data.


class Along(torch.nn.Module):
    """Two layers, two tasks and a reference; the first layer's weight may be used in another way as well."""

    def __init__(self, use=None):
        super().__init__()
        torch.manual_seed(SEED)
        self.layers, self.use = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(2))).double(), use
        self.x, self.held_out = torch.randn(2, 5, 8, dtype=torch.float64)

    def forward(self, x):
        return self.layers[1](self.layers[0](x).tanh())

    def losses(self):
        outputs = self(self.x)
        extra = self.use(self.layers[0], self.x) if self.use is not None else 0
        return {"a": outputs.square().mean(dim=1) + extra, "b": outputs.sin().mean(dim=1) + extra}

    def reference(self):
        return self(self.held_out).square().mean()

    def report(self, reference=None, steps=1):
        optimizer = MultiTaskOptimizer(torch.optim.SGD(self.parameters(), lr=0.0), SLGrad("a"), shared=self.layers)
        for _ in range(steps):
            optimizer.combine(self.losses, reference=reference or self.reference).backward()
            optimizer.step()
        return optimizer.report


def out_of_sight(layer, x):
    with torch._C.DisableTorchFunction():
        return (x @ layer.weight.t()).sum(dim=1)


@torch.no_grad()
def no_grad(layer, x):
    return layer(x).sum(dim=1) + layer.weight.sin().sum()


USES = {
    "its norm": lambda layer, _: layer.weight.square().sum(),
    "in a list": lambda layer, _: torch.stack([layer.weight, layer.weight.sin()]).sum(),
    "as a product": lambda layer, x: (x @ layer.weight.t()).sum(dim=1),
    "by an attribute": lambda layer, _: (layer.weight @ layer.weight.T - torch.eye(8)).square().sum(),
    "by name": lambda layer, x: torch.nn.functional.linear(input=x, weight=layer.weight).sum(dim=1),
    "as data": lambda layer, _: torch.nn.functional.linear(layer.weight, layer.weight).sum(),
    "in a second call": lambda layer, x: layer(x.sin()).sum(dim=1),
    "without a gradient": lambda layer, x: (layer(x) * layer.weight.sum()).detach().sum(dim=1) * layer.bias.sum(),
    "under no_grad, then with": lambda layer, x: no_grad(layer, x) * layer.weight.square().sum(),
    "under vmap": lambda layer, x: torch.func.vmap(layer)(x).sum(dim=1),
    "out of sight": out_of_sight,
}


@pytest.mark.parametrize("use", USES)
def test_a_weight_may_be_used_in_any_other_way_as_well(use):
    model = Along(USES[use])
    report = model.report()
    assert report.engine == "forward"
    assert close(report.alignment, alignment(model.losses(), model.reference(), list(model.layers.parameters())))


def test_a_buffer_that_every_batch_is_copied_to_may_hold_the_data_of_the_reference():
    model = Along()
    expected, (x, held_out), buffer = model.report().alignment, (model.x, model.held_out), torch.zeros(5, 8).double()

    def enters(batch, then):
        model.x = model.held_out = buffer.copy_(batch)
        return then()

    losses, reference = model.losses, model.reference
    model.losses = lambda: enters(x, losses)
    report = model.report(lambda: enters(held_out, reference))
    assert report.engine == "forward"
    assert close(report.alignment, expected)
