"""Real tables, and shifts that nobody made: who is still right about later ratings, about women, about older people?

Three problems. Each trains in two or three environments; "in" is the score on other rows from where training was, "out"
that where it was not:

- MovieLens 100K: the first nine tenths of the ratings, in three environments by time; out is the latest tenth.
- Census-Income: men, with the two years of the survey as environments; out are women.
- Census-Income: people up to 50, with men and women as environments; out are the others.

Run all of it with `python -m examples.causal.tables`, or one process a seed with --seed K; then --collect --write-docs.
With the name of a problem ("later ratings", "women", "older people") in front: that one only.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from examples.causal.study import Study
from mtlweight import Equal, MultiTaskOptimizer, PCGrad, Weighting
from mtlweight.causal import Balance, Decorrelation, Invariance, ModuleSelector, Penalty, RiskVariance, Sparsity, warmup

sys.path.append(str(Path(__file__).parents[1]))  # where the examples on tables find each other
census, comparison, movielens = map(importlib.import_module, ("census", "comparison", "movielens"))

BATCH = 512
EQUAL = Equal()
SEX, YEAR = (census.CATEGORIES.index(column) for column in (12, 40))


class Shift(NamedTuple):
    """What to learn where, and in which environment each row for training lies."""

    problem: Any  # comparison.Problem: the validation split is from where training is, the test split is not
    environments: Tensor  # [n]


@cache
def later_ratings(seed: int, quick: bool) -> Shift:
    found = movielens.load(seed, "time", rows=3_000 if quick else 100_000)
    train, validation, test = (
        comparison.Table(table.inputs, table.labels[:, :2]) for table in (found.train, found.validation, found.test)
    )
    early = comparison.Table(
        {name: torch.cat([values, validation.inputs[name]]) for name, values in train.inputs.items()},
        torch.cat([train.labels, validation.labels]),
    )
    when = torch.arange(len(early)) * 3 // len(early)  # the ratings are in order of time
    held_out, kept = _parts(len(early), seed)
    problem = found._replace(tasks=found.tasks[:2], train=early[kept], validation=early[held_out], test=test)
    return Shift(problem, when[kept])


def _parts(n: int, seed: int) -> tuple[Tensor, ...]:
    """A tenth of the rows at random, and the others."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tensor_split([n // 10])


@cache
def women(seed: int, quick: bool) -> Shift:
    return _census(seed, quick, environment=YEAR, inside=lambda table: table.inputs["categories"][:, SEX] == 2)


@cache
def older_people(seed: int, quick: bool) -> Shift:
    def young(table: Any) -> Tensor:
        age = table.inputs["numbers"][:, census.NUMERIC.index(census.AGE)]
        return age <= 0.72  # in standard deviations from the mean: up to 50 years

    return _census(seed, quick, environment=SEX, inside=young)


def _census(seed: int, quick: bool, environment: int, inside: Callable[[Any], Tensor]) -> Shift:
    folder = census.folder_of_the_package()
    found = census.load(seed, folder, *((2_000, 1_000) if quick else (100_000, 30_000)))
    train, validation = (table[inside(table)] for table in (found.train, found.validation))
    test = found.test[~inside(found.test)]
    environments = train.inputs["categories"][:, environment].clone()
    for table in (train, validation, test):
        table.inputs["categories"][:, [SEX, YEAR]] = 0  # what tells environments apart, or is new outside, is no input
    return Shift(found._replace(train=train, validation=validation, test=test), environments)


class Network(nn.Module):
    """Copies of the problem's encoder as modules, a graph, and a head a task, which first answers the mean label."""

    def __init__(self, problem: Any, modules: int) -> None:
        super().__init__()
        names = [task.name for task in problem.tasks]
        self.selector = ModuleSelector([problem.encoder() for _ in range(modules)], names)
        self.heads = nn.ModuleDict({name: nn.Linear(problem.width, 1) for name in names})
        with torch.no_grad():
            for name, answer in zip(names, comparison.constant_answers(problem), strict=True):
                self.heads[name].bias.fill_(answer)

    def forward(self, table: Any) -> dict[str, Tensor]:
        return {name: self.heads[name](h).squeeze(1) for name, h in self.selector(table.inputs).items()}


@dataclass(frozen=True)
class Method:
    """How to train."""

    penalty: Penalty | None = None
    modules: int = 4
    weighting: Weighting = EQUAL
    alone: bool = False  # one network a task

    def __call__(
        self, seed: int, steps: int, quick: bool, bar: tqdm, *, of: Callable[[int, bool], Shift]
    ) -> dict[str, Any]:
        shift = of(seed, quick)
        names = [task.name for task in shift.problem.tasks]
        found = {}
        for learned in [[name] for name in names] if self.alone else [names]:
            model = self._train(shift, learned, seed, steps)
            for where, table in (("in", shift.problem.validation), ("out", shift.problem.test)):
                scores = comparison.metrics(shift.problem, comparison.answers(model, table), table)
                found |= {f"{name}, {where}": scores[name] for name in learned}
        bar.update(steps)
        return found

    def _train(self, shift: Shift, learned: list[str], seed: int, steps: int) -> Network:
        torch.manual_seed(seed)
        problem = shift.problem
        model = Network(problem, self.modules)
        selector = model.selector
        optimizer = MultiTaskOptimizer(
            torch.optim.AdamW(  # rate and decay of the other examples on these tables
                [
                    {"params": [*selector.bank.parameters(), *model.heads.parameters()], "weight_decay": 0.3},
                    {"params": selector.logits, "lr": 1e-2, "weight_decay": 0.0},
                ],
                lr=3e-3,
            ),
            self.weighting,
            shared=selector.bank,
            penalty=None if self.penalty is None else self.penalty.on(selector),
        )
        for _ in range(steps):
            rows = torch.randint(len(problem.train), (BATCH,))
            table = problem.train[rows]
            losses = comparison.losses(problem, model(table), table)
            optimizer.zero_grad()
            optimizer.combine(
                {name: losses[name] for name in learned},
                environments=None if self.penalty is None else shift.environments[rows],
            ).backward()
            optimizer.step()
        return model


def invariance(penalty: Penalty) -> Penalty:
    """Off for 100 steps, then rising over 100."""
    return warmup(100, penalty, start=100)


# Strengths are those of reversed_digits.py and a tenth of them, both shown. Nothing was tuned on these tables.
GRAPH, RISK = 10 * Invariance("norm"), 30 * RiskVariance()
REST = 1.0 * Decorrelation() + 0.05 * Sparsity() + 0.3 * Balance()
METHODS = {
    "single task": Method(modules=1, alone=True),
    "multi-task, one module": Method(modules=1),
    "multi-task, four modules": Method(),
    "PCGrad": Method(weighting=PCGrad()),
    "IRM, one module": Method(invariance(30 * Invariance("norm")), modules=1),
    "IRM, a tenth": Method(invariance(3 * Invariance("norm")), modules=1),
    "V-REx, one module": Method(invariance(RISK), modules=1),
    "V-REx, a tenth": Method(invariance(0.1 * RISK), modules=1),
    "MT-CRL": Method(invariance(GRAPH + RISK) + REST),
    "MT-CRL, invariances a tenth": Method(invariance(0.1 * (GRAPH + RISK)) + REST),
    "- both invariances": Method(REST),
}


def _study(name: str, metrics: dict[str, str]) -> Study:
    return Study(
        name,
        400,
        {method: partial(how, of=SHIFTS[name]) for method, how in METHODS.items()},
        {
            f"{task}, {metric}, {where}": f"{task}, {where}"
            for task, metric in metrics.items()
            for where in ("in", "out")
        },
        first=name,
    )


CENSUS = dict.fromkeys((task.name for task in census.TASKS), "AUC ↑")
SHIFTS = {"later ratings": later_ratings, "women": women, "older people": older_people}
STUDIES = (
    _study("later ratings", {"rating": "RMSE ↓", "liked": "AUC ↑"}),
    _study("women", CENSUS),
    _study("older people", CENSUS),
)

if __name__ == "__main__":
    named = [argument for argument in sys.argv if argument in SHIFTS]
    for study in STUDIES:
        if not named or study.name in named:
            study.main(__doc__, [argument for argument in sys.argv[1:] if argument not in named])
