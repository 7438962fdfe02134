"""A whole step with weights from the losses alone against a plain one."""

from collections.abc import Callable, Iterator

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
    return Row(TABLE, {"model": model, "b": len(p.x)}, contestants, ratios)


def ours(p: Problem, weighting: mtlweight.Weighting) -> Callable[[], None]:
    optimizer = mtlweight.MultiTaskOptimizer(sgd(p), weighting)

    def step() -> None:
        optimizer.zero_grad()
        optimizer.combine(p.losses()).backward()
        optimizer.step()

    return step
