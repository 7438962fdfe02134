"""The picture of causal_modules.py: accuracy where the labels stop agreeing, and which task reads which module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

CAUSAL, ORDINARY, GREY, PALE = "#1b6ca8", "#c8402f", "#8a9098", "#e4e6e9"
STYLE = {
    "font.size": 11,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
}
BLUES = LinearSegmentedColormap.from_list("gates", ["white", CAUSAL])


@mpl.rc_context(STYLE)
def draw(path: Path, runs: Mapping[str, Sequence[Any]], test: Sequence[float], train: Sequence[float]) -> None:
    """Saves the picture.

    Args:
        path: where to.
        runs: of ordinary training and of causal modules, one a seed.
        test: agreements of the tests.
        train: agreements of the training environments.
    """
    figure = Figure(figsize=(13, 5.8), layout="constrained")
    head, body = figure.subfigures(2, height_ratios=[0.16, 1])
    head.text(
        0.01,
        0.2,
        _headline(runs),
        size=18,
        weight="bold",
    )
    left, right = body.subfigures(1, 2, width_ratios=[1.25, 1], wspace=0.04)
    _curves(left.subplots(), runs, test, train)
    last = runs["causal modules"][-1]
    order = sorted(range(len(last.owners)), key=lambda k: -last.owners[k])
    top, bottom = right.subplots(2, 1)
    _graph(top, "Who reads which module, before training", last.graphs[0].values[:, order])
    _graph(bottom, "… and after", last.graphs[1].values[:, order])
    _owners(bottom, [last.owners[k] for k in order])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _headline(runs: Mapping[str, Sequence[Any]]) -> str:
    """Fooled is who loses a tenth to the best without the shortcut, where the labels agree least."""
    fooled = {name: [run.causal[0] - run.accuracy[0] > 0.1 for run in repeats] for name, repeats in runs.items()}
    if all(fooled["ordinary training"]) and not any(fooled["causal modules"]):
        return "When two labels stop agreeing, ordinary training is fooled. Causal modules are not."
    return "When two labels stop agreeing, who is fooled depends on the seed and the steps."


def _curves(axes: Axes, runs: Mapping[str, Sequence[Any]], test: Sequence[float], train: Sequence[float]) -> None:
    axes.axvspan(min(train), max(train), color=PALE)
    axes.text(sum(train) / 2, 1.0, "trained here", ha="center", va="bottom", color=GREY)
    causal = torch.tensor([run.causal for run in runs["ordinary training"]]).mean(dim=0)
    axes.plot(test, causal.numpy(), "--", color=GREY)
    axes.text(0.5, causal[3].item() + 0.012, "best without the shortcut", ha="center", color=GREY)
    for name, colour in (("ordinary training", ORDINARY), ("causal modules", CAUSAL)):
        values = torch.tensor([run.accuracy for run in runs[name]])
        axes.plot(test, values.mean(dim=0).numpy(), color=colour, linewidth=3)
        if len(values) > 1:
            low, high = values.amin(dim=0).numpy(), values.amax(dim=0).numpy()
            axes.fill_between(test, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.text(test[0] + 0.01, values[:, 0].mean().item() - 0.035, name, color=colour, weight="bold", ha="left")
    axes.set(
        xlim=(0, 1),
        ylim=(0.5, 1.03),
        xlabel="how often the labels of the two tasks agree",
        yticks=[0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
    )
    axes.set_yticklabels([f"{100 * tick:.0f}%" for tick in axes.get_yticks()])
    axes.grid(axis="y", color=PALE)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.set_title("Task a read correctly", loc="left")


def _graph(axes: Axes, title: str, values: torch.Tensor) -> None:
    axes.imshow(values.numpy(), cmap=BLUES, vmin=0, vmax=1, aspect="auto")
    for t, row in enumerate(values.tolist()):
        for k, value in enumerate(row):
            axes.text(k, t, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.6 else "black")
    axes.set_yticks([0, 1], ["task a", "task b"])
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.set_title(title, loc="left")


def _owners(axes: Axes, owners: Sequence[float]) -> None:
    words = [("knows a's causes" if share > 0.5 else "knows b's causes") for share in owners]
    axes.set_xticks(
        range(len(words)), [f"{word}\n({max(s, 1 - s):.0%})" for word, s in zip(words, owners, strict=True)]
    )
    for label, share in zip(axes.get_xticklabels(), owners, strict=True):
        label.set(size=9, color=CAUSAL if share > 0.5 else GREY)
