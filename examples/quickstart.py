"""60% of one task's training labels are wrong. Can 100 clean examples tell a network which labels to trust?

Each image shows two overlapping digits: the main task is to read the left one, the other to read the right one. This
trains the same small network in six ways, prints how well it reads the left digit of unseen images, and draws why.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch
from multi_mnist import MultiMNIST, Pairs, load
from quickstart_picture import draw
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from mtlweight import Equal, MultiTaskOptimizer, SLGrad, Weighting


class Network(nn.Module):
    """An encoder that both tasks share, and a head for each."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Conv2d(1, 8, 5), nn.MaxPool2d(2), nn.ReLU()),
            *(nn.Conv2d(8, 16, 5), nn.MaxPool2d(2), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(16 * 6 * 6, 64), nn.ReLU()),
        )
        self.left = nn.Linear(64, 10)
        self.right = nn.Linear(64, 10)


def both_losses(model: Network, pairs: Pairs) -> dict[str, Tensor]:
    """Each task's loss, one number a sample."""
    features = model.encoder(pairs.images)
    return {
        "left": cross_entropy(model.left(features), pairs.left, reduction="none"),
        "right": cross_entropy(model.right(features), pairs.right, reduction="none"),
    }


def main_loss(model: Network, pairs: Pairs) -> Tensor:
    """The main task's loss alone: on held-out pairs, what samples are judged by."""
    return cross_entropy(model.left(model.encoder(pairs.images)), pairs.left)


def both_and_held_out(model: Network, batch: Pairs, held_out: Pairs) -> dict[str, Tensor]:
    """Three objectives: each task's mean loss, and the main task's on held-out pairs."""
    means = {task: losses.mean() for task, losses in both_losses(model, batch).items()}
    return {**means, "left, held out": main_loss(model, held_out)}


class Method(NamedTuple):
    name: str
    weighting: Weighting
    losses: Callable[[Network, Pairs, Pairs], dict[str, Tensor]] = lambda model, batch, _: both_losses(model, batch)


METHODS = [
    Method("equal weights", Equal()),
    Method("held-out pairs only", Equal(), lambda model, _, held_out: {"left": main_loss(model, held_out)}),
    Method("equal weights + held-out pairs", Equal(), both_and_held_out),
    Method("SLGrad as published", SLGrad("left", scope="shared")),
    Method("SLGrad, scope=main", SLGrad("left", scope="main")),
    Method("SLGrad, scope=main, learn_reference", SLGrad("left", scope="main", learn_reference=True)),
]
PICTURED = "SLGrad, scope=main"
SHOWN = Path(__file__).parents[1] / "docs" / "images" / "quickstart.png"


class Run(NamedTuple):
    """What came of one training."""

    accuracy: float  # in reading the left digit of test images
    seconds: float
    ratio: float  # mean weight of the correct left labels, divided by that of the wrong ones
    samples: Tensor  # [steps, b], the training samples in each batch
    weights: Tensor  # [steps, b], how much each one's left label counted


def train(method: Method, data: MultiMNIST, steps: int, seed: int, bar: tqdm) -> Run:
    torch.manual_seed(seed)
    model = Network()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    optimizer = MultiTaskOptimizer(optimizer, method.weighting, shared=model.encoder, model=model)  # new
    samples, weights = [], []
    start = time.perf_counter()
    for chosen in batches(len(data.train), steps):
        batch = data.train[chosen]
        optimizer.zero_grad()
        loss = optimizer.combine(  # new: instead of summing the losses
            partial(method.losses, model, batch, data.held_out),
            reference=partial(main_loss, model, data.held_out),
        )
        loss.backward()
        optimizer.step()
        samples.append(chosen)
        weights.append(optimizer.report.weights[0].expand(len(chosen)))
        bar.update()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        readings = model.left(model.encoder(data.test.images)).argmax(dim=1)
    samples, weights = torch.stack(samples), torch.stack(weights)
    wrong = data.train.wrong[samples]
    return Run(
        accuracy=(readings == data.test.left).double().mean().item(),
        seconds=seconds,
        ratio=(weights[~wrong].mean() / weights[wrong].mean()).item(),
        samples=samples,
        weights=weights,
    )


def batches(n: int, steps: int, size: int = 128) -> Iterator[Tensor]:
    """Indices of the batches: passes over ``n`` samples, each in a new order."""
    order = torch.randperm(n)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(n)
        yield order[:size]
        order = order[size:]


def table(runs: dict[str, list[Run]]) -> str:
    lines = [f"{'left digit of test images':36}  {'accuracy':>11}  {'seconds':>7}  {'weight, correct : wrong':>23}"]
    for name, repeats in runs.items():
        accuracies = [run.accuracy for run in repeats]
        spread = f" ± {stdev(accuracies):.3f}" if len(repeats) > 1 else ""
        ratio = f"{mean(run.ratio for run in repeats):.1f} : 1" if name != "held-out pairs only" else "-"
        seconds = mean(run.seconds for run in repeats)
        lines.append(f"{name:36}  {mean(accuracies):.3f}{spread:>6}  {seconds:7.1f}  {ratio:>23}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="how often to repeat all of it, for mean and spread")
    parser.add_argument("--steps", type=int, default=600, help="training steps of each method (default: 600)")
    parser.add_argument("--quick", action="store_true", help="a few steps on few images, to see that it runs")
    picture = Path("runs/quickstart.png")
    parser.add_argument("--output", type=Path, default=picture, help="where the picture goes (default: %(default)s)")
    parser.add_argument(
        "--write-docs", action="store_const", dest="output", const=SHOWN, help="put it where README.md shows it"
    )
    options = parser.parse_args()
    steps = 8 if options.quick else options.steps
    sizes = {"train": 1_000, "test": 200} if options.quick else {}

    torch.set_num_threads(1)  # such small images gain nothing from more, and lose much where a core is busy
    data = [load(seed, **sizes) for seed in range(options.seeds)]
    runs: dict[str, list[Run]] = {method.name: [] for method in METHODS}
    with tqdm(total=options.seeds * len(METHODS) * steps, unit="step") as bar:
        for seed in range(options.seeds):
            for method in METHODS:
                bar.set_description(method.name)
                runs[method.name].append(train(method, data[seed], steps, seed, bar))
    print(table(runs))
    pictured = runs[PICTURED][0]
    accuracies = {name: [run.accuracy for run in repeats] for name, repeats in runs.items()}
    draw(options.output, data[0], pictured.samples, pictured.weights, accuracies, of=PICTURED)
    print(f"The picture is {options.output}")


if __name__ == "__main__":
    main()
