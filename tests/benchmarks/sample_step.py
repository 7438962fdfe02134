"""A whole SLGrad step against a plain one on the same batch."""

from collections.abc import Callable, Iterator

import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import functional_call

import mtlweight
from tests.benchmarks._measure import Ratio, Row, Settings, settled
from tests.benchmarks._models import Problem, problem

TABLE = "sample step"
LIMITS = {"LeNet": 2.8, "MLP 3x512": 3.2, "conv + BatchNorm": 2.8}
"""How many plain steps an SLGrad step may take."""


def rows(settings: Settings) -> Iterator[Row]:
    for model in LIMITS:
        for samples in (4,) if settings.quick else (64, 256):
            yield row(problem(model, tasks=2, samples=samples, device=settings.device, seed=settings.seed), model)


def row(p: Problem, model: str) -> Row:
    contestants = {
        "plain": plain(p.fresh()),
        "SLGrad": settled(slgrad(p.fresh(), callables=True)),
        "SLGrad, given tensors": settled(slgrad(p.fresh(), callables=False)),
        "by hand": by_hand(p.fresh()),
        "floor": floor(p.fresh()),
    }
    ratios = [
        Ratio("SLGrad / plain", ("SLGrad",), ("plain",), at_most=LIMITS[model]),
        Ratio("SLGrad / plain, memory", ("SLGrad",), ("plain",), at_most=2.2, of="mib"),
        Ratio("SLGrad, given tensors / plain", ("SLGrad, given tensors",), ("plain",)),
        Ratio("by hand / plain", ("by hand",), ("plain",)),
        Ratio("floor / plain", ("floor",), ("plain",)),
    ]
    return Row(TABLE, {"model": model, "b": len(p.x)}, contestants, ratios)


def plain(p: Problem) -> Callable[[], None]:
    """The sum of the tasks' losses, one backward, one step."""
    optimizer = sgd(p)

    def step() -> None:
        optimizer.zero_grad()
        torch.stack(list(p.losses().values())).sum().backward()
        optimizer.step()

    return step


def slgrad(p: Problem, *, callables: bool) -> Callable[[], None]:
    optimizer = mtlweight.MultiTaskOptimizer(sgd(p), mtlweight.SLGrad("0"), shared=p.model.encoder, model=p.model)

    def step() -> None:
        optimizer.zero_grad()
        optimizer.combine(p.sample_losses if callables else p.sample_losses(), reference=p.reference).backward()
        optimizer.step()

    return step


def by_hand(p: Problem) -> Callable[[], None]:
    """The same step with torch's dual numbers and nothing else: no checks, no state, this model alone."""
    optimizer, shared = sgd(p), p.shared
    names = [f"encoder.{name}" for name, _ in p.model.encoder.named_parameters()]

    def step() -> None:
        optimizer.zero_grad()
        gradient = torch.autograd.grad(p.reference(), shared)
        with forward_ad.dual_level():
            duals = {n: forward_ad.make_dual(s, g) for n, s, g in zip(names, shared, gradient, strict=True)}
            logits = functional_call(p.model, duals, (p.x,))
            parts = [forward_ad.unpack_dual(loss) for loss in p.sample_losses(logits).values()]
            alignment = torch.stack([part.tangent for part in parts]).detach()
        helpful = alignment.clamp(min=0)
        weights = helpful / helpful.sum()
        (weights * torch.stack([part.primal for part in parts])).sum().backward()
        optimizer.step()

    return step


def floor(p: Problem) -> Callable[[], None]:
    """The parts of the step, with the tangents as cheap as one more forward without a graph.

    That is generous: through a layer that shares its parameters and is not the first, tangents take two products, not
    one. But it makes the gradient of each weight on the held-out batch.
    """
    optimizer, shared = sgd(p), p.shared
    weights = torch.full(p.y.shape, 1 / p.y.numel(), device=p.y.device)

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.grad(p.reference(), shared)
        with torch.no_grad():
            p.sample_losses()
        (weights * torch.stack(list(p.sample_losses().values()))).sum().backward()
        optimizer.step()

    return step


def sgd(p: Problem) -> torch.optim.Optimizer:
    return torch.optim.SGD(p.model.parameters(), lr=1e-3)
