"""Where an engine cannot run: the next one does, with one warning, and as if the attempt had not been made."""

import copy
import re
import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from mtlweight import MGDA, MTLWeightError, MultiTaskOptimizer
from tests.zoo import (
    BAG,
    NETWORKS,
    SEED,
    Halve,
    Halving,
    Recipe,
    TwoTasks,
    alignment,
    close,
    combined,
    numbers,
    on_samples,
    optimizer_for,
    oracle,
    problem,
)


class HalveOnce(torch.autograd.Function):
    """Has neither."""

    @staticmethod
    def forward(_ctx, x):
        return x / 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(_ctx, incoming):
        return incoming / 2


def halve_with(jvp):
    """The same with this forward derivative, which fails."""
    return type("HalveBadly", (Halve,), {"jvp": staticmethod(jvp)})


class RunningMean(nn.Module):
    """Keeps a buffer by putting a new tensor in its place, which restoring the old tensor's values would not undo."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(dim=0)
        return x - self.mean


def stateful(function):
    """Buffers advance and random numbers are drawn before the operator that fails, and after it."""

    def model():
        before = [nn.Linear(5, 4), nn.BatchNorm1d(4), RunningMean(), nn.Dropout(0.5)]
        return TwoTasks(nn.Sequential(*before, Halving(function), nn.Dropout(0.5), nn.BatchNorm1d(4)), 4)

    return Recipe(model, numbers(5))


ONCE, TWICE = stateful(HalveOnce), stateful(Halve)
JVP = r"the forward engine .*Halving: Halve(Once)?: You must implement the jvp function for custom autograd.Function"
BADLY = {  # what a `jvp` does, and what the warning says
    "takes too few arguments": (lambda _ctx: None, "TypeError .*takes 1 positional argument but 2 were given"),
    "adds a string": (lambda _ctx, x: x + "a", "TypeError unsupported operand"),
    "reads what was not saved": (lambda ctx, x: ctx.scale * x, "AttributeError .* has no attribute 'scale'"),
    "looks up what is not there": (lambda _ctx, x: x * {}["scale"], "KeyError 'scale'"),
    "returns two": (lambda _ctx, x: (x, x), r"an invalid number of forward gradients"),
    "returns another shape": (lambda _ctx, x: x[:1], "forward gradient that has a different size"),
}
AGAIN = r"the pullback engine .*differentiate twice a function that was marked with @once_differentiable"
FLASH = r"the pullback engine .*_scaled_dot_product_flash_attention_for_cpu_backward"
CASES = {
    # recipe, dtype, engine, the engine that runs in the end, what each warning says
    "no jvp": (TWICE, torch.float64, "auto", "pullback", [JVP]),
    "no jvp, forward on request": (TWICE, torch.float64, "forward", "pullback", [JVP]),
    "neither jvp nor second derivative": (ONCE, torch.float64, "auto", "rows", [JVP, AGAIN]),
    "no second derivative, pullback on request": (ONCE, torch.float64, "pullback", "rows", [AGAIN]),
    **{
        f"a jvp that {does}": (
            stateful(halve_with(jvp)),
            torch.float64,
            "auto",
            "pullback",
            [f"the forward engine .*Halving: HalveBadly: .*{says}"],
        )
        for does, (jvp, says) in BADLY.items()
    },
    "fused LSTM": (
        NETWORKS["LSTM"],
        torch.float32,
        "auto",
        "pullback",
        [r"the forward engine .*LSTM: Trying to use forward AD with mkldnn_rnn_layer"],
    ),
    "EmbeddingBag": (
        BAG,
        torch.float32,
        "auto",
        "rows",
        [
            r"the forward engine .*EmbeddingBag: Trying to use forward AD with _embedding_bag",
            r"the pullback engine .*derivative for '_embedding_bag_backward' is not implemented",
        ],
    ),
    "attention, flash kernel": (NETWORKS["attention"], torch.float32, "pullback", "rows", [FLASH]),
    "scaled dot product, flash kernel": (NETWORKS["scaled dot product"], torch.float32, "pullback", "rows", [FLASH]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_next_engine_runs_after_one_warning_that_names_the_cause_and_every_step_is_counted(case):
    recipe, dtype, engine, ran, messages = CASES[case]
    p, other = problem(recipe, dtype=dtype), problem(recipe, dtype=dtype)
    optimizer = optimizer_for(p, on_samples, engine=engine)
    with pytest.warns(UserWarning, match="^mtlweight: ") as record:
        reports = [combined(p, optimizer, p.sample_losses) for _ in range(3)]
    caught = [warning for warning in record if str(warning.message).startswith("mtlweight: ")]
    assert len(caught) == len(messages)
    for warning, message in zip(caught, messages, strict=True):
        assert re.search(message, str(warning.message))
    assert [[*report.fallbacks.values()] for report in reports] == [[n] * len(messages) for n in (1, 2, 3)]
    for text, message in zip(reports[-1].fallbacks, messages, strict=True):
        assert re.search(message, text)
    assert {report.engine for report in reports} == {ran}
    assert close(reports[0].alignment, oracle(other, "sample_losses"), 1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("network", ["attention", "scaled dot product", "transformer layer with dropout"])
def test_forward_runs_attention_through_its_math_kernel_without_a_fallback(network):
    p = problem(NETWORKS[network], dtype=torch.float32)
    report = combined(p, optimizer_for(p, on_samples), p.sample_losses)
    assert (report.engine, dict(report.fallbacks)) == ("forward", {})


@pytest.mark.parametrize(("recipe", "then"), [(TWICE, "pullback"), (ONCE, "rows")], ids=["to pullback", "to rows"])
def test_buffers_random_state_and_gradients_are_those_of_a_step_without_the_attempt(recipe, then):
    states = []
    for engine in ("auto", then):
        p = problem(recipe)
        optimizer = optimizer_for(p, on_samples, engine=engine)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="mtlweight: ")
            for _ in range(2):
                optimizer.zero_grad()
                combined(p, optimizer, p.sample_losses)
        gradients = {name: q.grad for name, q in p.model.named_parameters()}
        states.append({"random": torch.get_rng_state(), **p.model.state_dict(), **gradients})
    names = [name for name in states[0] if "running_" in name or "num_batches" in name or name.endswith(".mean")]
    assert len(names) == 7
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.filterwarnings(
    "ignore:Using backward.. with create_graph=True will create a reference cycle",
    # Newer versions of torch have no third derivative of a batch norm.
    "ignore:mtlweight. the pullback engine cannot run here .trying to differentiate twice",
)
@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm1d(4), nn.Tanh()], ids=str)
@pytest.mark.parametrize("how", ["torch.autograd.grad", "torch.autograd.backward", "Tensor.backward"])
def test_a_gradient_that_the_losses_take_makes_forward_fall_back_since_it_would_miss_its_derivative(layer, how):
    recipe = Recipe(lambda: TwoTasks(nn.Sequential(nn.Linear(5, 4), copy.deepcopy(layer), nn.Tanh()), 4), numbers(5))
    p, other = problem(recipe), problem(recipe)

    def losses(p):
        x = p.x.clone().requires_grad_()
        outputs = p.run(x)
        total = outputs["left"].sum()
        if how == "torch.autograd.grad":
            (slope,) = torch.autograd.grad(total, x, create_graph=True)
        else:
            backward = torch.autograd.backward if how == "torch.autograd.backward" else torch.Tensor.backward
            backward(total, inputs=[x], create_graph=True)
            slope = x.grad
        return {task: loss + slope.square().sum(dim=1) for task, loss in p.score(outputs).items()}

    with pytest.warns(UserWarning, match="a gradient inside the losses has no forward derivative"):
        report = combined(p, optimizer_for(p, on_samples), lambda: losses(p))
    third = not isinstance(layer, nn.BatchNorm1d) or len(report.fallbacks) == 1  # whether torch has that derivative
    assert report.engine == ("pullback" if third else "rows")
    assert close(report.alignment, alignment(losses(other), other.reference(), other.shared))


def test_a_loss_whose_forward_derivative_is_lost_on_the_way_makes_forward_fall_back():
    p, other = problem(NETWORKS["linear"]), problem(NETWORKS["linear"])

    def losses():
        found = p.sample_losses()
        with forward_ad._set_fwd_grad_enabled(False):  # as compiled code may do
            return {**p.sample_losses(), "left": found["left"]}

    with pytest.warns(UserWarning, match="its derivatives are not those of a backward"):
        report = combined(p, optimizer_for(p, on_samples), losses)
    assert report.engine == "pullback"
    assert close(report.alignment, oracle(other, "sample_losses"))


class WrongForward(torch.autograd.Function):
    """A square whose forward derivative leaves out a half, as code that a compiler has replaced may do."""

    @staticmethod
    def forward(x):
        return x.square()

    @staticmethod
    def setup_context(ctx, inputs, _output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, incoming):
        return 2 * ctx.saved_tensors[0] * incoming

    @staticmethod
    def jvp(ctx, tangent):
        return ctx.saved_tensors[0] * tangent


class WrongTwice(WrongForward):
    """And whose second derivative does so too."""

    @staticmethod
    def backward(ctx, incoming):
        slope = 2 * ctx.saved_tensors[0]
        return slope * incoming / 2 + (slope * incoming).detach() / 2


def wrong(function):
    return Recipe(lambda: TwoTasks(nn.Sequential(nn.Linear(5, 4), Halving(function)), 4), numbers(5))


@pytest.mark.parametrize(("function", "engine"), [(WrongForward, "pullback"), (WrongTwice, "rows")])
def test_derivatives_that_are_not_those_of_a_backward_are_not_taken(function, engine):
    p, other = problem(wrong(function)), problem(wrong(function))
    with pytest.warns(UserWarning, match="its derivatives are not those of a backward") as caught:
        report = combined(p, optimizer_for(p, on_samples), p.sample_losses)
    assert len(caught) == len(report.fallbacks) == {"pullback": 1, "rows": 2}[engine]
    assert report.engine == engine
    assert close(report.alignment, oracle(other, "sample_losses"))


@pytest.mark.parametrize("new", [True, False])
def test_derivatives_that_go_wrong_later_are_noticed(new):
    """At once if it is a new operator that does so; else at the next comparison: after the 4th, the 8th use."""
    p = problem(wrong(torch.autograd.Function))
    p.model.encoder[1].function = Square
    optimizer = optimizer_for(p, on_samples)
    engines = []
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.filterwarnings("ignore", message="mtlweight: ")
        for step in range(1, 10):
            if step == 5 and new:
                p.model.encoder[1].function = WrongForward
            if step == 5 and not new:
                patch.setattr(Square, "slope", 1)
            engines.append(combined(p, optimizer, p.sample_losses).engine)
    right = 4 if new else 7
    assert engines == right * ["forward"] + (9 - right) * ["pullback"]


class Square(WrongForward):
    """The right derivative."""

    slope = 2

    @staticmethod
    def jvp(ctx, tangent):
        return Square.slope * ctx.saved_tensors[0] * tangent


@pytest.mark.filterwarnings("ignore:mtlweight. the forward engine cannot run here")
@pytest.mark.parametrize("engine", ["auto", "pullback"])
def test_control_flow_of_torchs_own_is_refused_with_what_helps(engine):
    def losses():
        outputs = p.run(p.x)
        left = torch.cond(p.x.sum() > 0, torch.sin, torch.cos, (outputs["left"],))
        return p.score({**outputs, "left": left})

    p = problem(NETWORKS["linear"])
    with pytest.raises(MTLWeightError, match=r"torch\.cond has neither .* Use engine='rows'"):
        combined(p, optimizer_for(p, on_samples, engine=engine), losses)


class Checkpointed(nn.Sequential):
    """Keeps none of its activations for the backward."""

    reentrant = False
    context_fn = staticmethod(noop_context_fn)

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=self.reentrant, context_fn=self.context_fn)


CHECKPOINTED = Recipe(
    lambda: TwoTasks(Checkpointed(nn.Linear(5, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 4)), 4), numbers(5)
)


def test_activation_checkpointing_makes_forward_fall_back_to_pullback():
    p, other = problem(CHECKPOINTED), problem(CHECKPOINTED)
    optimizer = optimizer_for(p, on_samples)
    with pytest.warns(UserWarning, match=r"the forward engine .*activation checkpointing recomputes"):
        report = combined(p, optimizer, p.sample_losses)
    assert report.engine == "pullback"
    assert close(report.alignment, oracle(other, "sample_losses"))


def test_reentrant_checkpointing_is_an_error_that_says_what_to_change(monkeypatch):
    monkeypatch.setattr(Checkpointed, "reentrant", True)
    p = problem(CHECKPOINTED)
    p.x.requires_grad_()  # or torch itself warns
    p.held_out.requires_grad_()
    with pytest.raises(MTLWeightError, match=r"Expected checkpoint.*use_reentrant=False.*found use_reentrant=True"):
        combined(p, optimizer_for(p, on_samples), p.sample_losses)


@pytest.mark.parametrize("engine", ["auto", "pullback", "rows", "samples"])
@pytest.mark.parametrize("reads", ["alignments", "gradients"])
def test_selective_checkpointing_is_an_error_that_says_what_to_change(monkeypatch, reads, engine):
    selective = partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
    monkeypatch.setattr(Checkpointed, "context_fn", selective)
    p = problem(CHECKPOINTED)
    by, losses = (on_samples, p.sample_losses()) if reads == "alignments" else (MGDA(), p.task_losses())
    optimizer = optimizer_for(p, by, engine=engine)
    with pytest.raises(
        MTLWeightError, match=r"Selective activation checkpointing .* without context_fn, found .*Leave"
    ):
        optimizer.combine(losses, reference=p.reference)


@pytest.mark.parametrize("network", ["linear", "convolutions and BatchNorm", "dropout", "LayerNorm"])
@pytest.mark.parametrize("engine", ["forward", "pullback", "rows"])
def test_under_autocast_the_alignment_is_that_of_full_precision_within_its_rounding(network, engine):
    p, other = (problem(NETWORKS[network], dtype=torch.float32) for _ in range(2))
    run = p.run

    def autocast(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return {task: output.float() for task, output in run(x).items()}

    p.run = autocast
    report = combined(p, optimizer_for(p, on_samples, engine=engine), p.sample_losses)
    assert report.engine == engine
    assert not report.fallbacks
    assert close(report.alignment, oracle(other, "sample_losses"), 0.1)


@pytest.mark.parametrize("engine", ["forward", "pullback", "samples", "rows"])
def test_what_is_computed_under_no_grad_is_a_constant_to_every_engine(engine):
    p, other = problem(NETWORKS["dropout"]), problem(NETWORKS["dropout"])

    def losses(p):
        with torch.no_grad():
            teacher = p.run(p.x)["left"]
        assert torch.is_grad_enabled()
        return {task: loss + teacher.square().sum(dim=1) * loss for task, loss in p.sample_losses().items()}

    report = combined(p, optimizer_for(p, on_samples, engine=engine), lambda: losses(p))
    torch.manual_seed(SEED)
    reference = other.reference()
    assert report.engine == engine
    assert close(report.alignment, alignment(losses(other), reference, other.shared))


def test_a_parameter_that_the_closure_holds_itself_makes_forward_fall_back_instead_of_missing_its_derivative():
    p, other = problem(NETWORKS["linear"]), problem(NETWORKS["linear"])
    weight = p.model.encoder[0].weight

    def losses():
        return {task: loss + (p.x @ weight.T).square().sum(dim=1) for task, loss in p.sample_losses().items()}

    with pytest.warns(UserWarning, match=r"parameter of shape \[4, 5\] is used outside model= and shared="):
        report = combined(p, optimizer_for(p, on_samples), losses)
    assert report.engine == "pullback"
    added = (other.x @ other.model.encoder[0].weight.T).square().sum(dim=1)
    assert close(
        report.alignment, oracle(other, "sample_losses") + alignment({"": added}, other.reference(), other.shared)
    )


def test_a_head_that_ties_a_shared_parameter_makes_forward_fall_back_unless_the_model_is_named():
    p, other = problem(NETWORKS["tied parameters"]), problem(NETWORKS["tied parameters"])
    with pytest.warns(UserWarning, match=r"parameter of shape \[7, 4\] is used outside model= and shared="):
        report = combined(p, optimizer_for(p, on_samples, model=None), p.sample_losses)
    assert report.engine == "pullback"
    assert close(report.alignment, oracle(other, "sample_losses"))


@pytest.mark.parametrize("engine", ["auto", "forward", "pullback"])
@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, KeyError, ValueError, StopIteration])
@pytest.mark.parametrize("where", ["losses", "reference"])
def test_the_users_own_error_is_raised_as_it_is_and_is_no_fallback(where, error, engine):
    p = problem(NETWORKS["dropout"])
    optimizer = optimizer_for(p, on_samples, engine=engine)

    def fails():
        p.sample_losses()
        raise error("the user's own")

    calls = {"losses": p.sample_losses, "reference": p.reference, where: fails}
    with pytest.raises(error) as caught:  # and no warning, since warnings are errors
        optimizer.combine(calls["losses"], reference=calls["reference"])
    assert type(caught.value) is error
    assert caught.value.args == ("the user's own",)
    combined(p, optimizer, p.sample_losses)
    assert optimizer.report.engine == ("pullback" if engine == "pullback" else "forward")
    assert not optimizer.report.fallbacks


@pytest.mark.parametrize("engine", ["rows", "batched", "samples", "pullback"])
def test_losses_whose_graph_is_gone_are_an_error_and_no_fallback(engine):
    p = problem(NETWORKS["linear"])
    optimizer = optimizer_for(p, on_samples if engine == "pullback" else MGDA(), engine=engine)
    losses, reference = p.sample_losses(), p.reference()
    sum(loss.sum() for loss in losses.values()).backward()
    with pytest.raises(MTLWeightError, match="graph was freed by an earlier backward or combine"):
        optimizer.combine(losses, reference=reference)


def test_a_reference_whose_graph_is_gone_is_an_error_and_no_fallback():
    p = problem(NETWORKS["linear"])
    reference = p.reference()
    reference.backward()
    with pytest.raises(MTLWeightError, match="graph was freed by an earlier backward or combine"):
        optimizer_for(p, on_samples).combine(p.sample_losses, reference=reference)


@pytest.mark.parametrize("calls", [1, 3])
def test_what_checkpointing_packs_is_unpacked_once_for_each_task(calls):
    """Not more often for a look at it: checkpointing would run the layers once more."""
    weight, ran = torch.ones(3, requires_grad=True), []

    def layer(x):
        ran.append(1)
        return (x * weight).tanh()

    z = checkpoint(layer, torch.ones(4, 3, requires_grad=True), use_reentrant=False)
    optimizer = MultiTaskOptimizer(torch.optim.SGD([weight], lr=0.0), MGDA(), shared=weight, engine="rows")
    optimizer.combine({str(k): (k + z).square().mean() for k in range(calls)}).backward()
    assert len(ran) == 1 + calls


@pytest.mark.parametrize("engine", ["auto", "pullback"])
def test_the_warning_points_to_the_line_that_called_combine(engine):
    p = problem(ONCE)
    optimizer = optimizer_for(p, on_samples, engine=engine)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.combine(p.sample_losses, reference=p.reference)
    assert caught
    assert {warning.filename for warning in caught} == {__file__}


FIRST_STEP = """
import torch, mtlweight
model = torch.nn.Linear(3, 2)
optimizer = mtlweight.MultiTaskOptimizer(torch.optim.SGD(model.parameters()), mtlweight.SLGrad("0"), shared=model)
x, labels = torch.randn(5, 3), torch.arange(5) % 2
losses = lambda: torch.nn.functional.cross_entropy(model(x), labels, reduction="none")[None]
optimizer.combine(losses, reference=lambda: losses().mean()).backward()
optimizer.step()
assert optimizer.report.engine == "forward", optimizer.report
"""


def test_the_first_forward_derivative_of_a_process_warns_of_nothing():
    subprocess.run([sys.executable, "-W", "error", "-c", FIRST_STEP], check=True)
