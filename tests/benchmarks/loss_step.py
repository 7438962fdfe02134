"""A whole step with weights from the losses alone against a plain one."""

from collections.abc import Callable, Iterator

import torch

import mtlweight
from tests.benchmarks._measure import Ratio, Row, Settings
from tests.benchmarks._models import Problem, problem
from tests.benchmarks.sample_step import plain, sgd

TABLE = "loss step"
WEIGHTINGS = (mtlweight.UW(), mtlweight.DWA(), mtlweight.RLW())


def rows(settings: Settings) -> Iterator[Row]:
    for samples in (4,) if settings.quick else (64, 256):
        yield row(problem("LeNet", tasks=2, samples=samples, device=settings.device, seed=settings.seed), "LeNet")


def row(p: Problem, model: str) -> Row:
    contestants = {"plain": plain(p.fresh())}
    contestants |= {type(weighting).__name__: ours(p.fresh(), weighting) for weighting in WEIGHTINGS}
    ratios = [Ratio(f"{name} / plain", (name,), ("plain",), at_most=1.05) for name in contestants if name != "plain"]
    contestants["UW by hand"] = by_hand(p.fresh())
    ratios.append(Ratio("UW by hand / plain", ("UW by hand",), ("plain",)))
    return Row(TABLE, {"model": model, "b": len(p.x)}, contestants, ratios)


def by_hand(p: Problem) -> Callable[[], None]:
    """Uncertainty weighting as its paper's readers write it: log-variances as parameters; no checks, no state."""
    log_variances = torch.zeros(len(p.y), device=p.x.device, requires_grad=True)
    optimizer = torch.optim.SGD([{"params": p.model.parameters()}, {"params": [log_variances]}], lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        losses = torch.stack(list(p.losses().values()))
        (torch.exp(-log_variances) * losses + log_variances).sum().backward()
        optimizer.step()

    return step


def ours(p: Problem, weighting: mtlweight.Weighting) -> Callable[[], None]:
    optimizer = mtlweight.MultiTaskOptimizer(sgd(p), weighting)

    def step() -> None:
        optimizer.zero_grad()
        optimizer.combine(p.losses()).backward()
        optimizer.step()

    return step
