"""Measuring leaves gradients and buffers as they were."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mtlweight import FAMO, MGDA, UW, Equal, GradDrop, MTLWeightError, MultiTaskOptimizer, SLGrad
from tests.zoo import close, on_samples


class Reversible(torch.autograd.Function):
    """Additive coupling that keeps no activations: its backward computes them again, and calls backward itself."""

    @staticmethod
    def forward(ctx, x, first, second):
        ctx.first, ctx.second = first, second
        a, b = x.chunk(2, dim=1)
        a = a + first(b)
        b = b + second(a)
        ctx.save_for_backward(a.detach(), b.detach())
        return torch.cat([a, b], dim=1)

    @staticmethod
    def backward(ctx, incoming):
        a, b = ctx.saved_tensors
        with torch.no_grad():
            b = b - ctx.second(a)
            a = a - ctx.first(b)
        x = torch.cat([a, b], dim=1).requires_grad_()
        with torch.enable_grad():
            a, b = x.chunk(2, dim=1)
            a = a + ctx.first(b)
            b = b + ctx.second(a)
            torch.cat([a, b], dim=1).backward(incoming)
        return x.grad, None, None


class Coupled(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return Reversible.apply(x, self.first.forward, self.second.forward)


class Plain(Coupled):
    """The same, as torch differentiates it."""

    def forward(self, x):
        a, b = x.chunk(2, dim=1)
        a = a + self.first(b)
        return torch.cat([a, b + self.second(a)], dim=1)


def network(coupling, stem=True):
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.Linear(6, 6) if stem else nn.Identity(), coupling()),
            "heads": nn.ModuleDict({"main": nn.Linear(6, 1), "other": nn.Linear(6, 1)}),
        }
    )
    x = torch.randn(2, 8, 6)

    def losses(x):
        z = model["encoder"](x if stem else x.requires_grad_())
        return {task: (head(z) - 1).square().mean(dim=1) for task, head in model["heads"].items()}

    def reference():
        return losses(x[1])["main"].mean()

    return model, lambda: losses(x[0]), reference


CASES = {
    "MGDA": (MGDA(), {}),
    "MGDA, batched": (MGDA(), {"engine": "batched"}),
    "GradDrop": (GradDrop(), {}),
    "SLGrad": (SLGrad("main"), {}),
    "SLGrad, pullback": (SLGrad("main"), {"engine": "pullback"}),
    "SLGrad, one step ahead": (SLGrad("main", lookahead="both"), {}),
    "SLGrad, in parts": (SLGrad("main"), {"parts": True}),
    "UW, with heads unweighted": (UW(), {"heads": "unweighted"}),
    "UW, in parts": (UW(), {"parts": True}),
}


@pytest.mark.parametrize("stem", [True, False], ids=["after a layer", "on data"])
@pytest.mark.parametrize("case", CASES)
def test_a_function_whose_backward_calls_backward_is_an_error_where_something_is_measured(case, stem):
    weighting, options = CASES[case]
    model, losses, reference = network(Coupled, stem)
    optimizer = MultiTaskOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        weighting,
        shared=model["encoder"],
        model=model,
        **{name: value for name, value in options.items() if name != "parts"},
    )
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    before = {name: (p.detach().clone(), p.grad, p.grad.clone()) for name, p in model.named_parameters()}
    found = "one that writes to it" if "batched" in case else r"that it wrote to that of 'encoder\.1\.\w+\.\w+'"
    message = rf"hides its parameters.* \.grad alone, found {found}.*use_reentrant=False.*reads losses alone"
    with pytest.raises(MTLWeightError, match=message):
        optimizer.combine([losses] if options.get("parts") else losses, reference=reference)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0])
        assert p.grad is before[name][1]
        assert torch.equal(p.grad, before[name][2])


def test_a_parameter_of_another_optimizer_is_left_alone_too():
    model, losses, _ = network(Coupled)
    own = [*model["encoder"][0].parameters(), *model["heads"].parameters()]
    optimizer = MultiTaskOptimizer(torch.optim.SGD(own, lr=0.1), MGDA(), shared=model["encoder"][0], model=model)
    with pytest.raises(MTLWeightError, match=r"hides its parameters.*'encoder\.1\.\w+\.\w+'"):
        optimizer.combine(losses())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("weighting", [Equal(), UW(), FAMO()], ids=repr)
def test_weightings_that_read_losses_alone_train_such_functions_as_plain_ones(weighting):
    found = []
    for coupling in (Coupled, Plain):
        model, losses, _ = network(coupling)
        optimizer = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), weighting, shared=model["encoder"])
        for _ in range(3):
            optimizer.zero_grad()
            optimizer.combine(losses).backward()
            optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert close(*found, 1e-5)


class Again(nn.Sequential):
    """Keeps none of its activations: every backward runs it once more."""

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class Mean(nn.Module):
    """Keeps a buffer by putting another tensor in its place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(dim=0)
        return x


def checkpointed(container, dropout=0.0):
    torch.manual_seed(0)
    layers = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(dropout), nn.Linear(4, 4), Mean(), nn.Tanh()
    heads = nn.ModuleDict({task: nn.Linear(4, 1) for task in "abcd"})
    model = nn.ModuleDict({"encoder": container(*layers), "heads": heads})
    x = torch.randn(2, 8, 5)

    def losses(x):
        z = model["encoder"](x)
        return {task: (head(z) - 1).square().mean(dim=1) for task, head in model["heads"].items()}

    def reference():
        return losses(x[1])["a"].mean()

    return model, lambda: losses(x[0]), reference


MEASURED = {
    "MGDA": (MGDA(), {}, 0),
    "MGDA, batched": (MGDA(), {"engine": "batched"}, 0),
    "MGDA, samples": (MGDA(), {"engine": "samples"}, 0),
    "MGDA, features": (MGDA(), {"engine": "features"}, 1),
    "MGDA, in parts": (MGDA(), {"parts": True}, 0),
    "GradDrop": (GradDrop(), {}, 0),
    "SLGrad": (SLGrad("a"), {}, 1),
    "SLGrad, samples": (SLGrad("a"), {"engine": "samples"}, 1),
    "SLGrad, rows": (SLGrad("a"), {"engine": "rows"}, 1),
    "SLGrad, one step ahead": (SLGrad("a", lookahead="both"), {}, 1),
    "SLGrad, heads unweighted": (SLGrad("a"), {"heads": "unweighted"}, 0),
    "on samples": (on_samples, {"engine": "rows"}, 1),
    "UW, heads unweighted": (UW(), {"heads": "unweighted"}, 0),
    "UW": (UW(), {}, 1),
    "FAMO": (FAMO(), {}, 1),
}


@pytest.mark.filterwarnings(
    "ignore:mtlweight. the (forward|pullback) engine cannot run here",
    "ignore:There is a performance drop because we have not yet:UserWarning",
)
@pytest.mark.parametrize("case", MEASURED)
def test_under_activation_checkpointing_buffers_advance_by_forward_passes_and_not_by_measuring(case):
    """The backward of the step advances them once more, where it is the ordinary one: that is torch's own doing."""
    weighting, options, backwards = MEASURED[case]
    options = dict(options)
    parts = options.pop("parts", False)
    states = []
    for container in (Again, nn.Sequential):
        model, losses, reference = checkpointed(container)
        optimizer = MultiTaskOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.0), weighting, shared=model["encoder"], model=model, **options
        )
        scalar = optimizer.combine([losses] if parts else losses, reference=reference)
        states.append({name: buffer.clone() for name, buffer in model["encoder"].named_buffers()})
        before = model["encoder"][1].num_batches_tracked.clone()
        scalar.backward()
        optimizer.step()
        again = int(model["encoder"][1].num_batches_tracked - before)
        assert again == (backwards if container is Again else 0)
    for name, buffer in states[1].items():
        assert close(states[0][name], buffer, 1e-6), name


@pytest.mark.filterwarnings("ignore:mtlweight. the (forward|pullback) engine cannot run here")
@pytest.mark.parametrize("weighting", [MGDA(), SLGrad("a"), FAMO()], ids=repr)
def test_under_activation_checkpointing_the_step_is_that_without_it_and_dropout_draws_the_same_masks(weighting):
    found = []
    for container in (Again, nn.Sequential):
        model, losses, reference = checkpointed(container, dropout=0.5)
        optimizer = MultiTaskOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), weighting, shared=model["encoder"], model=model
        )
        for step in range(2):
            optimizer.zero_grad()
            torch.manual_seed(step)
            optimizer.combine(losses, reference=reference).backward()
            optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert close(*found, 1e-4)


@pytest.mark.parametrize("engine", ["rows", "batched"])
def test_buffers_are_left_alone_though_nobody_has_named_their_module(engine):
    model, losses, _ = checkpointed(Again)
    optimizer = MultiTaskOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), MGDA(), shared=list(model["encoder"].parameters()), engine=engine
    )
    optimizer.combine(losses).backward()
    assert int(model["encoder"][1].num_batches_tracked) == 1
