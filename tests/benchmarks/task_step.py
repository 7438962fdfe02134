"""A whole MGDA step against TorchJD's, in each of its settings."""

import importlib.util
from collections.abc import Callable, Iterator

import torch

import mtlweight
from tests.benchmarks._measure import Ratio, Row, Settings
from tests.benchmarks._models import Problem, problem
from tests.benchmarks.sample_step import plain, sgd

TABLE = "task step"
EXACT = ("rows", "batched")
ENGINES = ("auto", *EXACT, "features")
CHUNK = 8


def rows(settings: Settings) -> Iterator[Row]:
    for model in ("LeNet", "MLP 3x512", "conv + BatchNorm"):
        for tasks in (3,) if settings.quick else (2, 10, 40):
            samples = 4 if settings.quick else 64
            yield row(problem(model, tasks=tasks, samples=samples, device=settings.device, seed=settings.seed), model)


def row(p: Problem, model: str) -> Row:
    tasks = len(p.y)
    contestants = {"plain": plain(p.fresh())}
    contestants |= {f"mtlweight {engine}": ours(p.fresh(), engine) for engine in ENGINES}
    exact = tuple(f"mtlweight {engine}" for engine in EXACT)
    ratios = [
        Ratio("auto / plain", ("mtlweight auto",), ("plain",)),
        Ratio("auto / best exact engine", ("mtlweight auto",), exact, at_most=1.1),
    ]
    if importlib.util.find_spec("torchjd"):
        for chunk in (None, 1, *((CHUNK,) if tasks > CHUNK else ())):
            for per_parameter in (False, True):
                words = ["chunk " + ("all" if chunk is None else str(chunk))] + ["optimized Gramian"] * per_parameter
                contestants[f"TorchJD {', '.join(words)}"] = torchjd_autojac(p.fresh(), chunk, per_parameter)
        contestants["TorchJD autogram"] = torchjd_autogram(p.fresh())
        peers = tuple(name for name in contestants if name.startswith("TorchJD"))
        ratios += [
            Ratio("auto / TorchJD default", ("mtlweight auto",), ("TorchJD chunk all",), at_most=1.0),
            Ratio("auto / TorchJD best", ("mtlweight auto",), peers, at_most=1.1),
        ]
    return Row(TABLE, {"model": model, "m": tasks}, contestants, ratios)


def ours(p: Problem, engine: str) -> Callable[[], None]:
    optimizer = mtlweight.MultiTaskOptimizer(sgd(p), mtlweight.MGDA(), shared=p.model.encoder, engine=engine)

    def step() -> None:
        optimizer.zero_grad()
        optimizer.combine(p.losses()).backward()
        optimizer.step()

    return step


def torchjd_autojac(p: Problem, chunk: int | None, per_parameter: bool) -> Callable[[], None]:
    """Jacobians by ``mtl_backward``, in chunks of rows; the Gramian of all parameters at once, or one by one."""
    from torchjd.aggregation import MGDA
    from torchjd.autojac import jac_to_grad, mtl_backward

    optimizer, aggregator, shared = sgd(p), MGDA(), p.shared

    def step() -> None:
        optimizer.zero_grad()
        features = p.model.encoder(p.x)
        losses = list(p.losses(p.model.on(features)).values())
        mtl_backward(losses, features=features, parallel_chunk_size=chunk)
        jac_to_grad(shared, aggregator, optimize_gramian_computation=per_parameter)
        optimizer.step()

    return step


def torchjd_autogram(p: Problem) -> Callable[[], None]:
    """The Gramian without a Jacobian, then one ordinary backward."""
    from torchjd.aggregation import MGDAWeighting
    from torchjd.autogram import Engine

    optimizer, weighting, engine = sgd(p), MGDAWeighting(), Engine(p.model.encoder, batch_dim=None)

    def step() -> None:
        optimizer.zero_grad()
        losses = torch.stack(list(p.losses().values()))
        losses.backward(weighting(engine.compute_gramian(losses)))
        optimizer.step()

    return step
