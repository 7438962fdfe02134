"""When do SLGrad's weights tell wrong labels from right ones? The set-up at the top of docs/slgrad.md, over many seeds.

Half of the main task's 400 training labels have the wrong sign. Weights, and the held-out gradient that they are made
of, are averaged over parts of the training: while the main task is learned, and after that, when little of that
gradient is left. Prints the least, the middle and the largest value over the seeds: `python -m
examples.slgrad.wrong_signs`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from tqdm import trange

from examples.slgrad.study import auroc
from mtlweight import Equal, MultiTaskOptimizer, SLGrad, Weighting

PARTS = {"1 to 20": slice(0, 20), "21 to 60": slice(20, 60), "from 61": slice(60, None)}
ROWS = (
    "mean weight, right : wrong",
    "single steps that have it below 1",
    "AUROC of a low mean weight",
    "share of right labels with a weight",
    "share of wrong labels with a weight",
    "error of wrong labels : right labels",
    "length of the held-out gradient",
    "its cosine with another held-out set's",
)


class Problem:
    """A network, the data of a seed, and losses per sample."""

    def __init__(self, seed: int, held_out: int) -> None:
        torch.manual_seed(seed)
        self.encoder = nn.Linear(5, 8)
        self.heads = nn.ModuleDict({task: nn.Linear(8, 1) for task in ("main", "other")})
        self.model = nn.ModuleDict({"encoder": self.encoder, "heads": self.heads})
        self.x, self.held_out, self.another = torch.randn(400, 5), torch.randn(held_out, 5), torch.randn(held_out, 5)
        self.wrong = torch.arange(400) < 200
        self.labels = {
            "main": self.x[:, 0] * torch.where(self.wrong, -1.0, 1.0),
            "other": self.x[:, 0] + self.x[:, 1],
        }

    def losses(self, x: Tensor, labels: dict[str, Tensor]) -> dict[str, Tensor]:
        features = torch.tanh(self.encoder(x))
        return {task: (self.heads[task](features).squeeze(1) - labels[task]).square() for task in labels}

    def right(self, x: Tensor) -> Tensor:
        """The main task's loss on data whose labels are right."""
        return self.losses(x, {"main": x[:, 0]})["main"].mean()

    def gradient(self, x: Tensor) -> Tensor:
        parameters = [*self.encoder.parameters(), *self.heads["main"].parameters()]
        return torch.cat([g.flatten() for g in torch.autograd.grad(self.right(x), parameters)])

    def both(self) -> dict[str, Tensor]:
        return self.losses(self.x, self.labels)

    def held_out_alone(self) -> dict[str, Tensor]:
        return {"main": self.right(self.held_out)}

    def train(self, weighting: Weighting, losses: Callable[[], dict[str, Tensor]], steps: int) -> Run:
        optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        optimizer = MultiTaskOptimizer(optimizer, weighting, shared=self.encoder, model=self.model)
        run = Run([], [], [], [])
        for _ in range(steps):
            run.gradients.append(self.gradient(self.held_out))
            run.others.append(self.gradient(self.another))
            optimizer.zero_grad()
            optimizer.combine(losses, reference=lambda: self.right(self.held_out)).backward()
            optimizer.step()
            run.weights.append(optimizer.report.weights[0])
            run.errors.append(optimizer.report.losses[0].sqrt())
        with torch.no_grad():
            return run._replace(test=self.right(torch.randn(5_000, 5)).item())


class Run(NamedTuple):
    """What was seen in each step, and the error on test data after them."""

    weights: list[Tensor]
    errors: list[Tensor]
    gradients: list[Tensor]
    others: list[Tensor]
    test: float = math.nan


METHODS = {
    "SLGrad": (SLGrad("main", scope="main"), Problem.both),
    "equal weights": (Equal(), Problem.both),
    "held-out samples alone": (Equal(), Problem.held_out_alone),
}


def summary(run: Run, part: slice, wrong: Tensor) -> list[float]:
    """A number for each of ``ROWS``, of some steps in a row."""
    weights, errors, gradients, others = (torch.stack(seen[part]) for seen in run[:4])
    mean, right = weights.mean(dim=0), ~wrong
    below = weights[:, right].mean(dim=1) < weights[:, wrong].mean(dim=1)
    return [
        (mean[right].mean() / mean[wrong].mean()).item(),
        below.double().mean().item(),
        auroc(mean[wrong], mean[right]),
        (weights[:, right] > 0).double().mean().item(),
        (weights[:, wrong] > 0).double().mean().item(),
        (errors[:, wrong].mean() / errors[:, right].mean()).item(),
        gradients.norm(dim=1).mean().item(),
        cosine_similarity(gradients, others).mean().item(),
    ]


def spread(values: list[float]) -> str:
    return f"{min(values):10.2f} {median(values):6.2f} {max(values):7.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=30, help="how many (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="of each training (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=40, help="samples in the held-out set (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # such small networks gain nothing from more

    parts: dict[str, list[list[float]]] = {part: [] for part in PARTS}
    tests: dict[str, list[float]] = {method: [] for method in METHODS}
    for seed in trange(options.seeds, unit="seed", disable=None):
        for method, (weighting, losses) in METHODS.items():
            problem = Problem(seed, options.held_out)
            run = problem.train(weighting, partial(losses, problem), options.steps)
            tests[method].append(run.test)
            if method == "SLGrad":
                for part, steps in PARTS.items():
                    parts[part].append(summary(run, steps, problem.wrong))

    print(f"Least, middle and largest of {options.seeds} seeds, {options.held_out} held-out samples\n")
    print(f"{'SLGrad, in steps':40}" + "".join(f"{part:>25}" for part in PARTS))
    for row, name in enumerate(ROWS):
        print(f"{name:40}" + "".join(spread([each[row] for each in parts[part]]) for part in PARTS))
    print(f"\ntest error after {options.steps} steps")
    for method, values in tests.items():
        print(f"{method:40}{spread(values)}")


if __name__ == "__main__":
    main()
