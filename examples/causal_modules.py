"""Two tasks whose labels mostly agree while training, and do not later. Who is still right?

Task a has causes of its own, F_a, and so has the easier task b. While the labels agree, F_b is a tempting shortcut for
task a. This trains four small modules and a graph that says which task reads which, once in the ordinary way and once
with the penalties of causal modules, and draws how right task a stays as the agreement moves, and the graph.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch
from causal_modules_picture import draw
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm

from mtlweight import Equal, MultiTaskOptimizer
from mtlweight.causal import (
    Balance,
    Decorrelation,
    Graph,
    Invariance,
    ModuleSelector,
    Penalty,
    RiskVariance,
    Sparsity,
    warmup,
)
from mtlweight.testing import confounded_tasks

TRAIN = [0.95, 0.75]  # how often the labels agree, in two environments
TEST = [0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95]
SHOWN = Path(__file__).parents[1] / "docs" / "images" / "causal_modules.png"
PENALTIES: dict[str, Penalty | None] = {
    "ordinary training": None,
    "causal modules": warmup(300, 200 * Invariance("norm") + 300 * RiskVariance(), start=200)
    + 1.0 * Decorrelation()
    + 0.05 * Sparsity()
    + 0.3 * Balance(),
}


class Network(nn.Module):
    """Four small modules, a graph, and a linear head a task."""

    def __init__(self) -> None:
        super().__init__()
        bank = [nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 4), nn.ReLU()) for _ in range(4)]
        self.selector = ModuleSelector(bank, ["a", "b"])
        self.heads = nn.ModuleDict({task: nn.Linear(4, 1) for task in self.selector.tasks})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {task: self.heads[task](h)[:, 0] for task, h in self.selector(x).items()}


class Run(NamedTuple):
    """What came of one training."""

    accuracy: list[float]  # of task a, at each agreement of TEST
    causal: list[float]  # of the best predictor that knows F_a and nothing of F_b
    graphs: tuple[Graph, Graph]  # before and after
    owners: list[float]  # of each module: 1 if its features have to do with F_a alone, 0 with F_b alone
    seconds: float


def train(penalty: Penalty | None, seed: int, steps: int, bar: tqdm) -> Run:
    torch.manual_seed(seed)
    data = confounded_tasks(20_000, TRAIN, seed=seed)
    model = Network()
    selector = model.selector
    before, start = selector.graph, time.perf_counter()
    optimizer = MultiTaskOptimizer(
        torch.optim.Adam(
            [
                {"params": [*selector.bank.parameters(), *model.heads.parameters()], "lr": 3e-3},
                {"params": selector.logits, "lr": 1e-2},  # the graph's own learning rate
            ]
        ),
        Equal(),
        shared=selector.bank,
        penalty=None if penalty is None else penalty.on(selector),
    )
    for _ in range(steps):
        batch = torch.randint(len(data.x), (512,))
        losses = {
            task: binary_cross_entropy_with_logits(z, (data.labels[task][batch] + 1) / 2, reduction="none")
            for task, z in model(data.x[batch]).items()
        }
        optimizer.zero_grad()
        environments = None if penalty is None else data.environments[batch]
        optimizer.combine(losses, environments=environments).backward()
        optimizer.step()
        bar.update()
    seconds = time.perf_counter() - start
    model.eval()
    accuracy, causal = [], []
    for agreement in TEST:
        test = confounded_tasks(10_000, [agreement], seed=seed, draw=1)
        with torch.no_grad():
            accuracy.append(test.accuracy("a", model(test.x)["a"]))
        causal.append(test.accuracy("a", test.log_odds("a")))
    return Run(accuracy, causal, (before, selector.graph), owners(selector, seed), seconds)


@torch.no_grad()
def owners(selector: ModuleSelector, seed: int) -> list[float]:
    """How much of what each module says is about ``F_a``, where the labels are independent: squared correlations."""
    data = confounded_tasks(20_000, [0.5], seed=seed, draw=2)
    shares = []
    for module in selector.bank.values():
        z = module(data.x)
        z = (z - z.mean(dim=0)) / z.std(dim=0).clamp(min=1e-6)
        about = []
        for task in ("a", "b"):
            cause = data.factors[task] @ data.means[task]
            about.append(((z * ((cause - cause.mean()) / cause.std())[:, None]).mean(dim=0)).square().mean())
        shares.append((about[0] / (about[0] + about[1])).item())
    return shares


def table(runs: dict[str, list[Run]]) -> str:
    shown = [TEST[0], 0.5, TEST[-1]]
    lines = [f"{'task a, right where labels agree':34}" + "".join(f"{f'with p = {m:.2f}':>18}" for m in shown)]
    rows = {"knows its causes alone": [run.causal for run in runs["ordinary training"]]}
    rows |= {name: [run.accuracy for run in repeats] for name, repeats in runs.items()}
    for name, values in rows.items():
        cells = []
        for m in shown:
            each = [value[TEST.index(m)] for value in values]
            cells.append(f"{mean(each):.3f}" + (f" ± {stdev(each):.3f}" if len(each) > 1 else ""))
        lines.append(f"{name:34}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="how often to repeat all of it, for mean and spread")
    parser.add_argument("--steps", type=int, default=1_500, help="training steps of each method (default: 1500)")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    picture = Path("runs/causal_modules.png")
    parser.add_argument("--output", type=Path, default=picture, help="where the picture goes (default: %(default)s)")
    parser.add_argument(
        "--write-docs", action="store_const", dest="output", const=SHOWN, help="put it where docs/causal.md shows it"
    )
    options = parser.parse_args()
    steps = 20 if options.quick else options.steps

    torch.set_num_threads(1)  # such small modules gain nothing from more
    runs: dict[str, list[Run]] = {name: [] for name in PENALTIES}
    with tqdm(total=options.seeds * len(PENALTIES) * steps, unit="step") as bar:
        for seed in range(options.seeds):
            for name, penalty in PENALTIES.items():
                bar.set_description(name)
                runs[name].append(train(penalty, seed, steps, bar))
    print(table(runs))
    print(f"\nThe graph of the last run with causal modules:\n{runs['causal modules'][-1].graphs[1]}")
    draw(options.output, runs, TEST, TRAIN)
    print(f"The picture is {options.output}")


if __name__ == "__main__":
    main()
