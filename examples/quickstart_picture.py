"""The quickstart's picture: which labels SLGrad trusted, how that came about during training, and what it was worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from multi_mnist import MultiMNIST, Pairs
from torch import Tensor

CORRECT, WRONG, GREY, PALE = "#1b6ca8", "#c8402f", "#a9afb6", "#e4e6e9"
STYLE = {
    "font.size": 11,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
}


@mpl.rc_context(STYLE)
def draw(
    path: Path, data: MultiMNIST, samples: Tensor, weights: Tensor, accuracies: Mapping[str, Sequence[float]], of: str
) -> None:
    """Saves the picture.

    Args:
        path: where to.
        data: what was trained on.
        samples: ``[steps, b]``, the training samples in each batch.
        weights: ``[steps, b]``, how much the left label of each counted.
        accuracies: each method's, one a seed.
        of: the method that the weights are of.
    """
    figure = Figure(figsize=(13, 8), layout="constrained")
    title, walls, charts = figure.subfigures(3, height_ratios=[0.5, 1.9, 1.9])
    wrong = data.train.wrong
    headline = f"{wrong.float().mean():.0%} of the labels are wrong. {_verdict(weights, wrong[samples])}"
    title.text(0.01, 0.62, headline, size=22, weight="bold")
    title.text(
        0.01,
        0.12,
        f"Labels name the framed digit. {len(data.held_out)} images with checked labels are all that SLGrad has to "
        f"judge the other {len(data.train):,} by.",
        size=12,
    )

    order = _by_weight(samples[len(samples) // 2 :], weights[len(samples) // 2 :], len(data.train))
    left, right = walls.subfigures(1, 2, wspace=0.04)
    _wall(left, "Counts most", data.train[order[:12]])
    _wall(right, "Ignored", data.train[order[-12:]])

    left, right = charts.subfigures(1, 2, wspace=0.04)
    first, second = left.subplots(1, 2, sharey=True)
    _areas(first, "Correct labels", CORRECT, weights, ~wrong[samples])
    _areas(second, "Wrong labels", WRONG, weights, wrong[samples])
    _bars(right.subplots(), accuracies, of)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _verdict(weights: Tensor, wrong: Tensor) -> str:
    told = weights[~wrong].mean() > 2 * weights[wrong].mean()
    return "SLGrad learns which ones to ignore." if told else "Here SLGrad does not learn which ones to ignore."


def _by_weight(samples: Tensor, weights: Tensor, n: int) -> Tensor:
    """The samples that were used, the one with the largest mean weight first."""
    times = torch.zeros(n).index_add(0, samples.flatten(), torch.ones(samples.numel()))
    total = torch.zeros(n).index_add(0, samples.flatten(), weights.flatten().float())
    order = (total / times).nan_to_num(-1).argsort(descending=True)
    return order[: int((times > 0).sum())]


def _wall(figure: SubFigure, title: str, pairs: Pairs) -> None:
    figure.suptitle(title, x=0.01, ha="left", size=15, weight="bold")
    for k, axes in enumerate(figure.subplots(2, 6).flat):
        label, truth = int(pairs.left[k]), int(pairs.truth[k])
        colour = CORRECT if label == truth else WRONG
        axes.imshow(pairs.images[k, 0], cmap="gray_r", vmin=0, vmax=1)
        axes.add_patch(Rectangle((0, 0), 27, 27, fill=False, edgecolor=colour, linewidth=2, clip_on=False))
        caption = f"✓ “{label}”" if label == truth else f"✗ “{label}”, is {truth}"
        axes.set_title(caption, color=colour, size=11, loc="left", weight="normal")
        axes.set(xticks=[], yticks=[])


def _areas(axes: Axes, title: str, colour: str, weights: Tensor, chosen: Tensor) -> None:
    """Over training, which share of the labels got a large, a small, or no weight."""
    shares = []
    for part, these in zip(weights.chunk(25), chosen.chunk(25), strict=True):
        values = part[these]
        large = (values > weights.mean()).float().mean()
        none = (values == 0).float().mean()
        shares.append([large, 1 - large - none, none])
    large, small, none = 100 * torch.tensor(shares).T
    steps = torch.linspace(0, len(weights), len(shares))
    axes.stackplot(steps, large, small, none, colors=[colour, colour + "80", PALE])
    axes.set(xlim=(0, len(weights)), ylim=(0, 100), xlabel="training step", ylabel="% of labels")
    axes.label_outer()
    axes.set_title(title, color=colour)
    for word, low, high, ink in (
        ("large weight", 0, large[-1], "white"),
        ("small weight", large[-1], 100 - none[-1], "white"),
        ("ignored", 100 - none[-1], 100, "black"),
    ):
        if high - low > 10:  # there is room for the word
            axes.text(0.97 * len(weights), (low + high) / 2, word, ha="right", va="center", color=ink)


def _bars(axes: Axes, accuracies: Mapping[str, Sequence[float]], of: str) -> None:
    axes.set_title("New images read correctly", loc="left")
    for y, (name, values) in enumerate(accuracies.items()):
        mean = sum(values) / len(values)
        axes.barh(y, mean, color=CORRECT if name == of else CORRECT + "80" if "SLGrad" in name else GREY)
        axes.text(max(values) + 0.02, y, f"{mean:.0%}", va="center", weight="bold")
        if len(values) > 1:
            axes.plot(values, [y] * len(values), "k|", markersize=12)
    axes.set_yticks(range(len(accuracies)), accuracies)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.set(xlim=(0, 1.1), xticks=[])
