"""Trains the same network under several weightings and compares them honestly; examples on tables give it their data.

For every weighting the same: the network, its first parameters, the batches, the optimizer, and the epoch that counts,
which is the one with the best score on the validation split. Only then is the test split looked at. Equal weights,
constants tuned on the validation split and one network a task are always among the compared.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Literal, NamedTuple

import torch
from comparison_picture import draw
from named_weighting import parse
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss
from tqdm import tqdm

from mtlweight import Constant, Equal, MTLWeightError, MultiTaskOptimizer, Weighting

BLIND, SINGLE, EQUAL, TUNED = "no look at the inputs", "one network a task", "equal weights", "tuned constants"
BASELINES = (BLIND, SINGLE, EQUAL, TUNED)


class Task(NamedTuple):
    name: str
    metric: Literal["RMSE", "AUC"]  # of a number, learned by its squared error; of a yes or no, by cross entropy

    @property
    def sign(self) -> int:
        """1 if more is better, -1 if less is."""
        return 1 if self.metric == "AUC" else -1


@dataclass(frozen=True)
class Table:
    """Some rows of a data set."""

    inputs: dict[str, Tensor]  # [n] or [n, k]
    labels: Tensor  # [n, m]; NaN where a row has no label for a task

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> Table:
        return Table({name: values[rows] for name, values in self.inputs.items()}, self.labels[rows])


class Problem(NamedTuple):
    """What to learn from what. ``encoder`` builds the shared part, from a table's inputs to ``[n, width]``."""

    tasks: tuple[Task, ...]
    train: Table
    validation: Table
    test: Table
    encoder: Callable[[], nn.Module]
    width: int


class Network(nn.Module):
    """An encoder that all tasks share, and a head for each, which first answers about the mean label."""

    def __init__(self, problem: Problem, tasks: Sequence[Task]) -> None:
        super().__init__()
        self.encoder = problem.encoder()
        self.heads = nn.ModuleDict({task.name: nn.Linear(problem.width, 1) for task in tasks})
        answers = constant_answers(problem)
        with torch.no_grad():
            for task in tasks:
                self.heads[task.name].bias.fill_(answers[problem.tasks.index(task)])

    def forward(self, table: Table) -> dict[str, Tensor]:
        features = self.encoder(table.inputs)
        return {name: head(features).squeeze(1) for name, head in self.heads.items()}


def constant_answers(problem: Problem) -> Tensor:
    """The best answers ``[m]`` that do not look at the inputs: mean labels, as logits where the label is yes or no."""
    means = problem.train.labels.nanmean(dim=0)
    yes_or_no = torch.tensor([task.metric == "AUC" for task in problem.tasks])
    chances = means.nan_to_num(0.5).clamp(1e-3, 1 - 1e-3)  # few rows may have no label, or all the same
    return torch.where(yes_or_no, chances.logit(), means)


def losses(problem: Problem, answers: dict[str, Tensor], table: Table) -> dict[str, Tensor | None]:
    """Each task's loss, one number a row, whose mean is that over the labelled rows; None where no row has a label."""
    return {
        task.name: _loss(task, answers[task.name], table.labels[:, column])
        for column, task in enumerate(problem.tasks)
        if task.name in answers
    }


def _loss(task: Task, answers: Tensor, labels: Tensor) -> Tensor | None:
    known = ~labels.isnan()
    if not known.any():
        return None
    error = binary_cross_entropy_with_logits if task.metric == "AUC" else mse_loss
    each = error(answers, labels.where(known, 0.0), reduction="none")
    return each.where(known, 0.0) * (len(known) / known.sum())


class Trained(NamedTuple):
    metrics: dict[str, float]  # each task's, on the test split
    score: float  # on the validation split
    seconds: float  # of CPU time: other programs on the machine do not count


def train(
    problem: Problem, weighting: Weighting, tasks: Sequence[Task], options: argparse.Namespace, seed: int, bar: tqdm
) -> Trained:
    torch.manual_seed(seed)
    model = Network(problem, tasks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, weight_decay=options.decay)
    optimizer = MultiTaskOptimizer(optimizer, weighting, shared=model.encoder, model=model, seed=seed)
    best, parameters = -float("inf"), model.state_dict()
    start = time.process_time()
    for batch, last in batches(len(problem.train), options.batch, options.epochs, seed):
        table = problem.train[batch]
        optimizer.zero_grad()
        loss = optimizer.combine(
            lambda table=table: losses(problem, model(table), table),
            reference=_reference(problem, model, weighting, options.batch),
        )
        loss.backward()
        optimizer.step()
        bar.update()
        if last and (score := _score(problem, model)) > best:
            best, parameters = score, copy.deepcopy(model.state_dict())
    seconds = time.process_time() - start
    model.load_state_dict(parameters)
    return Trained(metrics(problem, answers(model, problem.test), problem.test), best, seconds)


def batches(n: int, size: int, epochs: int, seed: int) -> Iterator[tuple[Tensor, bool]]:
    """Rows of each batch, and whether it is the epoch's last."""
    generator = torch.Generator().manual_seed(seed)  # of its own: the same batches whatever a method draws
    for _ in range(epochs):
        parts = torch.randperm(n, generator=generator).split(size)
        yield from ((part, part is parts[-1]) for part in parts)


def _reference(problem: Problem, model: Network, weighting: Weighting, size: int) -> Callable[[], Tensor] | None:
    """For weightings that read it: the main task's loss on some rows of the validation split."""
    if weighting.reference is None:
        return None
    held_out = problem.validation[torch.randint(len(problem.validation), (size,))]

    def loss() -> Tensor:
        each = losses(problem, model(held_out), held_out)
        main = weighting.reference.main
        return sum(loss.mean() for name, loss in each.items() if loss is not None and (not main or name in main))

    return loss


@torch.no_grad()
def answers(model: Network, table: Table) -> dict[str, Tensor]:
    model.eval()
    parts = [model(table[rows]) for rows in torch.arange(len(table)).split(8192)]
    model.train()
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _score(problem: Problem, model: Network) -> float:
    """How much of the loss without a look at the inputs is gone on the validation split; the mean over the tasks.

    0 where no row of it has a label.
    """
    table = problem.validation
    now, blind = (losses(problem, each, table) for each in (answers(model, table), blind_answers(problem, table)))
    gone = [1 - (loss.mean() / blind[name].mean()).item() for name, loss in now.items() if loss is not None]
    return mean(gone) if gone else 0.0


def blind_answers(problem: Problem, table: Table) -> dict[str, Tensor]:
    fixed = constant_answers(problem).expand(len(table), -1).unbind(dim=1)
    return {task.name: answer for task, answer in zip(problem.tasks, fixed, strict=True)}


def metrics(problem: Problem, answers: dict[str, Tensor], table: Table) -> dict[str, float]:
    found = {}
    for column, task in enumerate(problem.tasks):
        if task.name in answers:
            labels = table.labels[:, column]
            known = ~labels.isnan()
            measure = auc if task.metric == "AUC" else rmse
            found[task.name] = measure(answers[task.name][known], labels[known])
    return found


def rmse(answers: Tensor, labels: Tensor) -> float:
    return (answers - labels).double().square().mean().sqrt().item()


def auc(answers: Tensor, labels: Tensor) -> float:
    """How often a random yes gets a larger answer than a random no, a tie being half: 0.5 is chance."""
    _, value, count = answers.unique(return_inverse=True, return_counts=True)
    ranks = (count.cumsum(0) - (count - 1) / 2).double()[value]  # of equal answers: the middle one
    yes = labels == 1
    n = yes.sum().double()
    return ((ranks[yes].sum() - n * (n + 1) / 2) / (n * (len(labels) - n))).item()


class Run(NamedTuple):
    """What one method came to with one seed."""

    metrics: dict[str, float]
    seconds: float
    trainings: int  # how many networks were trained for it


@dataclass(frozen=True)
class Comparison:
    title: str
    tasks: tuple[Task, ...]
    runs: dict[str, list[Run]]  # each method's, one a seed; the baselines first
    chosen: list[tuple[float, ...]]  # the tuned constants, one choice a seed

    @property
    def seeds(self) -> int:
        return len(self.chosen)

    def metric(self, method: str, task: Task) -> list[float]:
        return [run.metrics[task.name] for run in self.runs[method]]

    def beats(self, method: str, other: str, task: Task) -> bool:
        """Whether the method is better than the other with each of the seeds. One seed tells nothing."""
        pairs = zip(self.metric(method, task), self.metric(other, task), strict=True)
        return self.seeds > 1 and all(task.sign * (mine - theirs) > 0 for mine, theirs in pairs)

    def __str__(self) -> str:
        rows = [[self.title, *(task.name for task in self.tasks), "networks", "seconds"]]
        rows.append(
            ["", *(task.metric + (" ↑" if task.sign > 0 else " ↓") for task in self.tasks), "trained", "of CPU"]
        )
        for method, runs in self.runs.items():
            cells = [_with_spread(self.metric(method, task)) + self._mark(method, task) for task in self.tasks]
            rows.append([method, *cells, f"{runs[0].trainings}", f"{mean(run.seconds for run in runs):.1f}"])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                f"{cell:{'>' if i else '<'}{width}}" for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return "\n".join([*lines, "", *self._verdict()])

    def _mark(self, method: str, task: Task) -> str:
        return " +" if self.beats(method, TUNED, task) else " -" if self.beats(TUNED, method, task) else "  "

    def _verdict(self) -> list[str]:
        """What was tuned, and what won and lost in all tasks."""
        lines = [
            f"Tuned constants, seed by seed: {', '.join(':'.join(f'{c:g}' for c in each) for each in self.chosen)}."
        ]
        if self.seeds == 1:
            return [*lines, "One seed does not tell better from worse. Repeat with --seeds 5."]
        lines.append(f"+ better, - worse than tuned constants with each of the {self.seeds} seeds.")
        weightings = [method for method in self.runs if method not in BASELINES]
        for baseline in (EQUAL, TUNED):
            better = [method for method in weightings if all(self.beats(method, baseline, t) for t in self.tasks)]
            worse = [method for method in weightings if all(self.beats(baseline, method, t) for t in self.tasks)]
            lines.append(f"Better than {baseline} in every task: {', '.join(better) or 'no weighting'}.")
            lines.append(f"Worse than {baseline} in every task: {', '.join(worse) or 'no weighting'}.")
        return lines


def _with_spread(values: Sequence[float]) -> str:
    numbers = torch.tensor(values, dtype=torch.float64)  # NaN where no row of the test split has a label
    return f"{numbers.mean():.4f}" + (f" ± {numbers.std():.4f}" if len(values) > 1 else "")


def compare(title: str, problem_of: Callable[[int], Problem], options: argparse.Namespace) -> Comparison:
    """Trains with all the methods, with each of the seeds."""
    problems = [problem_of(seed) for seed in range(options.seeds)]
    tasks = problems[0].tasks
    methods = {text: parse(text) for text in options.weighting}
    runs: dict[str, list[Run]] = {name: [] for name in (*BASELINES, *methods)}
    chosen = []
    steps = sum(-(-len(problem.train) // options.batch) for problem in problems) * options.epochs
    with tqdm(total=steps * (len(tasks) + len(constants(len(tasks))) + len(methods)), unit="step") as bar:
        for seed, problem in enumerate(problems):
            weights, results = _once(problem, methods, options, seed, bar)
            chosen.append(weights)
            for name, result in results.items():
                runs[name].append(result)
    return Comparison(title, tasks, runs, chosen)


def _once(
    problem: Problem, methods: dict[str, Weighting], options: argparse.Namespace, seed: int, bar: tqdm
) -> tuple[tuple[float, ...], dict[str, Run]]:
    """With one seed: the constants that the validation split chose, and what each method came to."""

    def trained(name: str, weighting: Weighting, tasks: Sequence[Task] = problem.tasks) -> Trained:
        bar.set_description(f"seed {seed}, {name}")
        return train(problem, weighting, tasks, options, seed, bar)

    single = [trained(SINGLE, Equal(), [task]) for task in problem.tasks]
    names = [task.name for task in problem.tasks]  # by name, since a task may be absent from a batch
    tried = {
        weights: trained(TUNED, Constant(dict(zip(names, weights, strict=True)))) for weights in constants(len(names))
    }
    equal, *_ = tried.values()
    chosen = max(tried, key=lambda weights: tried[weights].score)
    results = {
        BLIND: _together([], metrics(problem, blind_answers(problem, problem.test), problem.test)),
        SINGLE: _together(single, {name: value for one in single for name, value in one.metrics.items()}),
        EQUAL: _together([equal], equal.metrics),
        TUNED: _together(tried.values(), tried[chosen].metrics),
    }
    for name, weighting in methods.items():
        one = trained(name, weighting)
        results[name] = _together([one], one.metrics)
    return chosen, results


def _together(trained: Collection[Trained], metrics: dict[str, float]) -> Run:
    return Run(metrics, sum(one.seconds for one in trained), len(trained))


def constants(m: int) -> list[tuple[float, ...]]:
    """Weights to try: 1 or 4 for each task, equal ones first. Adam does not see their common scale."""
    return [weights for weights in itertools.product((1.0, 4.0), repeat=m) if weights != (4.0,) * m]


def parser(description: str, weightings: Sequence[str], picture: str) -> argparse.ArgumentParser:
    """The options that examples on tables share."""
    output = Path(__file__).parents[1] / "runs" / picture
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--weighting",
        action="append",
        type=_checked,
        metavar="TEXT",
        help=f"a weighting to compare; may be given several times (default: {', '.join(weightings)})",
    )
    parser.add_argument("--seeds", type=int, default=1, help="how often to repeat all of it, for mean and spread")
    parser.add_argument("--epochs", type=int, default=6, help="passes over the training split (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1024, help="rows in a batch (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=3e-3, help="AdamW's learning rate (default: %(default)s)")
    parser.add_argument("--decay", type=float, default=0.3, help="AdamW's weight decay (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one pass over few rows, to see that it runs")
    parser.add_argument("--output", type=Path, default=output, help=f"where the picture goes (default: runs/{picture})")
    parser.set_defaults(default_weightings=list(weightings))
    return parser


def _checked(text: str) -> str:
    try:
        parse(text)
    except MTLWeightError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def run(title: str, problem_of: Callable[[int], Problem], options: argparse.Namespace) -> None:
    """Compares, prints the table and saves the picture."""
    torch.set_num_threads(1)  # such small layers gain nothing from more, and lose much where a core is busy
    options.weighting = options.weighting or options.default_weightings
    options.epochs = 1 if options.quick else options.epochs
    comparison = compare(title, problem_of, options)
    print(comparison)
    draw(options.output, comparison, against=TUNED, hidden=BLIND, baselines=BASELINES)
    print(f"The picture is {options.output}")
