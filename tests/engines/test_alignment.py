"""The alignment engines, against one ordinary backward a task and sample."""

import pytest
import torch

import mtlweight
from mtlweight import MTLWeightError, MultiTaskOptimizer, Needs, SLGrad
from tests.engines.zoo import NETWORKS, SEED, TwoTasks, alignment, close, gradient, jacobian, problem

# Some operators' backward has no batching rule: torch loops over it and says so, once in a process.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet:UserWarning")

ENGINES = ("forward", "pullback", "samples", "rows")
FORMS = {
    "mapping": lambda losses: losses(),
    "tensor": lambda losses: torch.stack([*losses().values()]),
    "callable": lambda losses: losses,
}
# Flash attention has no second derivative on the CPU; the forward engine runs its math kernel. Tested under fallbacks.
NO_PULLBACK = ("attention", "scaled dot product", "transformer layer with dropout")

networks = pytest.mark.parametrize("network", NETWORKS)
engines = pytest.mark.parametrize("engine", ENGINES)


@mtlweight.weighting(Needs.ALIGNMENT)
def on_tasks(view):
    return torch.full_like(view.alignment, 0.5)


@mtlweight.weighting(Needs.ALIGNMENT | Needs.SAMPLES, writes="sample")
def on_samples(view):
    a = view.sample_alignment
    return torch.linspace(-1, 1, a.numel(), dtype=a.dtype, device=a.device).reshape(a.shape)


def optimizer_for(p, weighting, **options):
    parameters = torch.optim.SGD(p.model.parameters(), lr=0.0)
    return MultiTaskOptimizer(parameters, weighting, **{"shared": p.model.encoder, "model": p.model, **options})


def combined(p, optimizer, losses, form="callable", main=None):
    """The report of one step. Reference first, then losses, so that dropout draws the masks of the oracle's."""
    torch.manual_seed(SEED)
    reference = p.reference if form == "callable" else p.reference()
    optimizer.combine(FORMS[form](losses), reference=reference if main is None else {main: reference}).backward()
    optimizer.step()
    return optimizer.report


def oracle(p, losses, parameters=None):
    torch.manual_seed(SEED)
    reference = p.reference()
    return alignment(getattr(p, losses)(), reference, p.shared if parameters is None else parameters)


def written(parameters):
    return torch.cat([torch.zeros_like(q).flatten() if q.grad is None else q.grad.flatten() for q in parameters])


def skip_where_pullback_cannot(network, engine):
    if engine == "pullback" and network in NO_PULLBACK:
        pytest.skip("flash attention has no second derivative: see test_fallbacks.py")


@networks
@engines
@pytest.mark.parametrize(
    ("losses", "weighting"), [("task_losses", on_tasks), ("sample_losses", on_samples)], ids=["[m]", "[m, b]"]
)
def test_alignment_is_that_of_one_backward_a_loss(network, engine, losses, weighting, device):
    skip_where_pullback_cannot(network, engine)
    p, other = (problem(NETWORKS[network], device=device) for _ in range(2))
    report = combined(p, optimizer_for(p, weighting, engine=engine), getattr(p, losses))
    assert report.engine == engine
    assert not report.fallbacks
    assert close(report.alignment, oracle(other, losses))


@networks
@engines
def test_backward_writes_the_gradient_of_the_weighted_losses(network, engine, device):
    skip_where_pullback_cannot(network, engine)
    p, other = (problem(NETWORKS[network], device=device) for _ in range(2))
    weights = combined(p, optimizer_for(p, on_samples, engine=engine), p.sample_losses).weights
    torch.manual_seed(SEED)
    other.reference()
    (weights * torch.stack([*other.sample_losses().values()])).sum().backward()
    assert close(written(p.shared), written(other.shared))
    assert close(written(p.heads), written(other.heads))


@networks
@pytest.mark.parametrize("engine", ["pullback", "samples", "rows"])
@pytest.mark.parametrize("form", ["mapping", "tensor"])
def test_computed_losses_give_the_same_alignment(network, engine, form):
    skip_where_pullback_cannot(network, engine)
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


def scope_of(p, scope):
    left = dict.fromkeys([*p.shared, *p.model.heads["left"].parameters()])
    return {"shared": p.shared, "main": [*left], "all": [*p.model.parameters()]}[scope]


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
