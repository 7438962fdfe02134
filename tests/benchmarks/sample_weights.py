"""SLGrad's weights per task and sample: the engines against what else could compute them."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.functional import cross_entropy

import mtlweight
from tests.benchmarks._measure import Ratio, Row, Settings
from tests.benchmarks._models import Problem, problem

TABLE = "weights"
ENGINES = ("forward", "pullback", "samples")
CHUNK = 32


def rows(settings: Settings) -> Iterator[Row]:
    for model in ("LeNet", "MLP 3x512"):
        for samples in (8,) if settings.quick else (64, 256):
            yield row(problem(model, tasks=2, samples=samples, device=settings.device, seed=settings.seed), model)


def row(p: Problem, model: str) -> Row:
    contestants = {engine: _ours(p.fresh(), engine) for engine in ENGINES}
    contestants["loop"] = lambda q=p.fresh(): loop(q)
    contestants["loop, own graphs"] = lambda q=p.fresh(): loop_own_graphs(q)
    for chunk in (None, CHUNK):
        suffix = "" if chunk is None else f", chunks of {chunk}"
        contestants[f"vmap(grad){suffix}"] = lambda q=p.fresh(), c=chunk: vmap_grad(q, c)
        contestants[f"vmap(jacrev){suffix}"] = lambda q=p.fresh(), c=chunk: vmap_jacrev(q, c)
    vmaps = tuple(name for name in contestants if name.startswith("vmap"))
    ratios = [
        Ratio("loop / forward", ("loop",), ("forward",), at_least=50),
        Ratio("loop, own graphs / forward", ("loop, own graphs",), ("forward",)),
        Ratio("best vmap / forward", vmaps, ("forward",), at_least=3),
    ]
    return Row(TABLE, {"model": model, "b": len(p.x)}, contestants, ratios)


def _ours(p: Problem, engine: str) -> Callable[[], Tensor]:
    optimizer = mtlweight.MultiTaskOptimizer(
        torch.optim.SGD(p.model.parameters(), lr=0.0),
        mtlweight.SLGrad("0"),
        shared=p.model.encoder,
        model=p.model,
        engine=engine,
    )

    def run() -> Tensor:
        losses = p.sample_losses if engine == "forward" else p.sample_losses()
        optimizer.combine(losses, reference=p.reference)
        return optimizer._record.pending.report.weights

    return run


def loop(p: Problem) -> Tensor:
    """One backward per task and sample through the batch's graph: what SLGrad's published code does."""
    shared = p.shared
    g = _flat(torch.autograd.grad(p.reference(), shared))
    losses = torch.stack(list(p.sample_losses().values()))
    products = [
        _flat(torch.autograd.grad(loss, shared, retain_graph=True)) @ g for row in losses.unbind() for loss in row.unbind()
    ]
    return _weights(torch.stack(products).view(losses.shape))


def loop_own_graphs(p: Problem) -> Tensor:
    """One backward per task and sample, each through a graph of that sample alone. Not possible with BatchNorm."""
    shared = p.shared
    g = _flat(torch.autograd.grad(p.reference(), shared))
    products = []
    for x, labels in zip(p.x.split(1), p.y.T.unsqueeze(-1)):
        losses = [cross_entropy(z, y) for z, y in zip(p.model(x), labels)]
        products.append(torch.stack([_flat(torch.autograd.grad(l, shared, retain_graph=True)) @ g for l in losses]))
    return _weights(torch.stack(products, dim=1))


def vmap_grad(p: Problem, chunk: int | None) -> Tensor:
    """``vmap(grad)`` over the samples, once a task."""
    shared, loss, g = _functional(p)

    def product(t: int) -> Tensor:
        each = vmap(grad(lambda s, x, y: loss(s, x, y, t)), in_dims=(None, 0, 0), chunk_size=chunk)(shared, p.x, p.y[t])
        return sum(each[name].flatten(1) @ v.flatten() for name, v in g.items())

    return _weights(torch.stack([product(t) for t in range(len(p.y))]))


def vmap_jacrev(p: Problem, chunk: int | None) -> Tensor:
    """``vmap(jacrev)`` over the samples: one forward for all tasks."""
    shared, loss, g = _functional(p)

    def losses(s: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([cross_entropy(z, label) for z, label in zip(loss(s, x), y.unsqueeze(-1))])

    each = vmap(jacrev(losses), in_dims=(None, 0, 1), chunk_size=chunk)(shared, p.x, p.y)
    return _weights(sum(each[name].flatten(2) @ v.flatten() for name, v in g.items()).T)


def _functional(p: Problem) -> tuple[dict[str, Tensor], Callable[..., Tensor], dict[str, Tensor]]:
    gradient = torch.autograd.grad(p.reference(), p.shared)
    encoder = {name: value.detach() for name, value in p.model.encoder.named_parameters()}
    heads = [{name: value.detach() for name, value in head.named_parameters()} for head in p.model.heads]

    def loss(s: dict[str, Tensor], x: Tensor, y: Tensor | None = None, t: int | None = None):
        features = functional_call(p.model.encoder, s, (x.unsqueeze(0),))
        if t is None:
            return [functional_call(head, h, (features,)) for head, h in zip(p.model.heads, heads)]
        return cross_entropy(functional_call(p.model.heads[t], heads[t], (features,)), y.unsqueeze(0))

    return encoder, loss, dict(zip(encoder, gradient, strict=True))


def _flat(gradients: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients])


def _weights(alignment: Tensor) -> Tensor:
    helpful = alignment.clamp(min=0)
    return helpful / helpful.sum()
