"""SLGrad's weights per task and sample: the engines against what else could compute them.

The held-out gradient is given, since all need it alike: as vectors, or to ``combine`` as a linear objective.
"""

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.functional import cross_entropy

import mtlweight
from tests.benchmarks._measure import Ratio, Row, Settings, settled
from tests.benchmarks._models import Problem, problem

TABLE = "weights"
Gradient = tuple[Tensor, ...]
ENGINES = ("forward", "pullback", "samples")
CHUNK = 32


def rows(settings: Settings) -> Iterator[Row]:
    shapes = {"LeNet": (64, 256), "MLP 3x512": (64, 256)}
    if settings.device.type == "cuda":
        shapes["ResNet-18"] = (64, 256, 1024, 4096)
    for model, sizes in shapes.items():
        for samples in (4,) if settings.quick else sizes:
            yield row(problem(model, tasks=2, samples=samples, device=settings.device, seed=settings.seed), model)


def row(p: Problem, model: str) -> Row:
    given = torch.autograd.grad(p.reference(), p.shared)
    few = len(p.x) <= 64
    engines = ENGINES if few else ENGINES[:2]  # with more samples, the oracle takes most of an hour
    contestants = {engine: _ours(p.fresh(), engine, given) for engine in engines}
    contestants |= {engine: settled(contestants[engine]) for engine in ENGINES[:2]}
    if len(p.x) <= 256:  # with more, a row of these takes most of an hour too
        contestants["loop"] = partial(loop, p.fresh(), given)
        contestants["loop, own graphs"] = partial(loop_own_graphs, p.fresh(), given)
    if importlib.util.find_spec("torchjd"):
        contestants["TorchJD autogram"] = torchjd_autogram(p.fresh())
    chunks = (None, CHUNK) if len(p.x) <= 1024 else (CHUNK,)  # all gradients of 4096 samples fit no memory
    for chunk in chunks:
        suffix = "" if chunk is None else f", chunks of {chunk}"
        contestants[f"vmap(grad){suffix}"] = partial(vmap_grad, p.fresh(), given, chunk)
        contestants[f"vmap(jacrev){suffix}"] = partial(vmap_jacrev, p.fresh(), given, chunk)
    ratios = [
        *(
            Ratio(f"{name} / forward", (name,), ("forward",), at_least=limit)
            for name, limit in (("loop", 50), ("loop, own graphs", None), ("TorchJD autogram", None))
            if name in contestants
        ),
        *(
            Ratio(
                f"best {name} / forward",
                tuple(c for c in contestants if c.startswith(name)),
                ("forward",),
                at_least=limit,
            )
            for name, limit in (("vmap(grad)", 3), ("vmap(jacrev)", None))
        ),
    ]
    return Row(TABLE, {"model": model, "b": len(p.x)}, contestants, ratios)


def _ours(p: Problem, engine: str, given: Gradient) -> Callable[[], Tensor]:
    optimizer = mtlweight.MultiTaskOptimizer(
        torch.optim.SGD(p.model.parameters(), lr=0.0),
        mtlweight.SLGrad("0"),
        shared=p.model.encoder,
        model=p.model,
        engine=engine,
    )

    def reference() -> Tensor:
        return torch.stack([(g * q).sum() for g, q in zip(given, p.shared, strict=True)]).sum()

    def run() -> Tensor:
        losses = p.sample_losses if engine == "forward" else p.sample_losses()
        optimizer.combine(losses, reference=reference)
        optimizer.step()  # no gradients: nothing but the commit
        return optimizer.report.weights

    return run


def loop(p: Problem, given: Gradient) -> Tensor:
    """One backward per task and sample through the batch's graph: what SLGrad's published code does."""
    shared = p.shared
    g = _flat(given)
    losses = torch.stack(list(p.sample_losses().values()))
    each = losses.flatten().unbind()
    products = [_flat(torch.autograd.grad(loss, shared, retain_graph=True)) @ g for loss in each]
    return _weights(torch.stack(products).view(losses.shape))


def loop_own_graphs(p: Problem, given: Gradient) -> Tensor:
    """One backward per task and sample, each through a graph of that sample alone. Not possible with BatchNorm."""
    shared = p.shared
    g = _flat(given)
    products = []
    for x, labels in zip(p.x.split(1), p.y.T.unsqueeze(-1), strict=True):
        losses = [cross_entropy(z, label) for z, label in zip(p.model(x), labels, strict=True)]
        rows = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in losses]
        products.append(torch.stack([_flat(row) @ g for row in rows]))
    return _weights(torch.stack(products, dim=1))


def torchjd_autogram(p: Problem) -> Callable[[], Tensor]:
    """The nearest in TorchJD: the inner products of all samples' gradients, those of the held-out batch among them.

    It makes the held-out gradient on its way, which all others are given.
    """
    from torchjd.autogram import Engine

    engine, x, b = Engine(p.model.encoder, batch_dim=0), torch.cat([p.x, p.held_x]), len(p.x)
    y = torch.cat([p.y, p.held_y.expand_as(p.y)], dim=1)

    def run() -> Tensor:
        pairs = zip(p.model(x), y, strict=True)
        losses = torch.stack([cross_entropy(z, labels, reduction="none") for z, labels in pairs], dim=1)
        gramian = engine.compute_gramian(losses).view(*losses.shape, *losses.shape)
        return _weights(gramian[:b, :, b:, 0].mean(dim=-1).T)

    return run


def vmap_grad(p: Problem, given: Gradient, chunk: int | None) -> Tensor:
    """``vmap(grad)`` over the samples, once a task."""
    shared = _parameters(p)
    g = {name: v.flatten() for name, v in zip(shared, given, strict=True)}

    def alignment(t: int) -> Tensor:
        def loss(s: dict[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
            features = functional_call(p.model.encoder, s, (x.unsqueeze(0),))
            return cross_entropy(p.model.heads[t](features), label.unsqueeze(0))

        each = vmap(grad(loss), in_dims=(None, 0, 0), chunk_size=chunk)(shared, p.x, p.y[t])
        return sum(each[name].flatten(1) @ v for name, v in g.items())

    return _weights(torch.stack([alignment(t) for t in range(len(p.y))]))


def vmap_jacrev(p: Problem, given: Gradient, chunk: int | None) -> Tensor:
    """``vmap(jacrev)`` over the samples: one forward for all tasks."""
    shared = _parameters(p)
    g = {name: v.flatten() for name, v in zip(shared, given, strict=True)}

    def losses(s: dict[str, Tensor], x: Tensor, labels: Tensor) -> Tensor:
        features = functional_call(p.model.encoder, s, (x.unsqueeze(0),))
        each = zip(p.model.heads, labels.unsqueeze(-1), strict=True)
        return torch.stack([cross_entropy(head(features), label) for head, label in each])

    each = vmap(jacrev(losses), in_dims=(None, 0, 1), chunk_size=chunk)(shared, p.x, p.y)
    return _weights(sum(each[name].flatten(2) @ v for name, v in g.items()).T)


def _parameters(p: Problem) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in p.model.encoder.named_parameters()}


def _flat(gradients: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients])


def _weights(alignment: Tensor) -> Tensor:
    helpful = alignment.clamp(min=0)
    return helpful / helpful.sum()
