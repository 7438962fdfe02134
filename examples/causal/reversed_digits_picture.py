"""The pictures of reversed_digits.py, from the numbers that its runs left.

One shows the graph over training, one how the reliance on the easy digit and the accuracy under shift go together as
the hard digit gets harder. `python -m examples.causal.reversed_digits_picture` draws both.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure, SubFigure

from examples.causal.reversed_digits import CEILING, DIFFICULTIES, KNOB, PLAIN, STUDY
from examples.causal.study import PAGE

CAUSAL, ORDINARY, GREY, PALE = "#1b6ca8", "#c8402f", "#6f757c", "#e4e6e9"
STYLE = {
    "font.size": 12,
    "axes.titlesize": 13,
    **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
}
BLUES = LinearSegmentedColormap.from_list("gates", ["white", CAUSAL])
Runs = list[dict[str, Any]]
"""Named numbers of each method, one mapping a seed."""


@mpl.rc_context(STYLE)
def graphs(path: Path, run: Mapping[str, Mapping[str, Any]]) -> None:
    """Saves heat maps of one seed's graph over training, ordinary training above MT-CRL."""
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    head, *rows = figure.subfigures(3, height_ratios=[0.14, 1, 1])
    title = "Which task reads which module. With the penalties, task a turns away from the modules that see b's digit."
    head.text(0.01, 0.3, title, size=15, weight="bold")
    for part, method, name in zip(rows, ("multi-task", "MT-CRL"), ("ordinary training", "MT-CRL"), strict=True):
        _row(part, run[method], name)
    _save(figure, path)


def _row(part: SubFigure, numbers: Mapping[str, Any], name: str) -> None:
    looks = numbers["modules look right"]
    order = sorted(range(len(looks)), key=looks.__getitem__)
    snapshots = numbers["graphs"]
    for i, (axes, graph) in enumerate(zip(part.subplots(1, len(snapshots)), snapshots, strict=True)):
        values = torch.tensor(graph)[:, order]
        axes.imshow(values.numpy(), cmap=BLUES, vmin=0, vmax=1, aspect="auto")
        for t, row in enumerate(values.tolist()):
            for k, value in enumerate(row):
                axes.text(k, t, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.6 else "black")
        axes.set_yticks([0, 1], ["task a", "task b"] if i == 0 else ["", ""])
        axes.set_xticks(range(len(order)), [f"{looks[k]:.0%}" for k in order])
        axes.tick_params(length=0)
        step = numbers["steps"] * i // (len(snapshots) - 1)
        axes.set_title(f"{name}, step {step}" if i == 0 else f"step {step}", loc="left")
    part.supxlabel("modules, by how much of what they look at, in the end, is on b's side", size=11, color=GREY)


@mpl.rc_context(STYLE)
def difficulty(path: Path, runs: Runs) -> None:
    """Saves accuracy under shift by difficulty, and by reliance on the other digit."""
    figure = Figure(figsize=(13, 5.4), layout="constrained")
    head, body = figure.subfigures(2, height_ratios=[0.13, 1])
    title = "The harder its own digit, the more ordinary training relies on the other one, and the more it loses."
    head.text(0.01, 0.3, title, size=15, weight="bold")
    left, right = body.subplots(1, 2, sharey=True)
    levels = sorted({*DIFFICULTIES, PLAIN.dropped})
    for method, label, colour in (
        (CEILING, "labels that never agreed more", GREY),
        ("multi-task", "ordinary training", ORDINARY),
        ("MT-CRL", "MT-CRL", CAUSAL),
    ):
        rows = [method if level == PLAIN.dropped else f"{method}, {level:.0%} dropped" for level in levels]
        accuracy, says = (
            [mean(run[row][key] for run in runs if row in run) for row in rows]
            for key in ("a, shifted", "a says b's digit, shifted")
        )
        left.plot(levels, accuracy, "o-", color=colour, linewidth=3, label=label)
        right.plot(says, accuracy, "o-", color=colour, linewidth=3)
        for x, y, level in zip(says, accuracy, levels, strict=True):
            right.annotate(f"{level:.0%}", (x, y), (7, 5), textcoords="offset points", color=colour, size=10)
    left.legend(frameon=False, loc="lower left")
    left.set(xlabel="pixels of its own digit that are dropped", ylabel="task a right, under shift")
    left.set_xticks(levels, [f"{level:.0%}" for level in levels])
    right.set(xlabel="task a gives b's digit as its answer, under shift (labels: pixels dropped)")
    right.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1, decimals=0))
    left.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1, decimals=0))
    for axes in (left, right):
        _grid(axes)
    _save(figure, path)


def _grid(axes: Axes) -> None:
    axes.grid(color=PALE)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"The picture is {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("runs/causal"), help="folder of the numbers")
    parser.add_argument("--seed", type=int, default=0, help="whose graph (default: 0)")
    parser.add_argument("--output", type=Path, default=PAGE.parent / "images", help="folder of the pictures")
    options = parser.parse_args()
    run = json.loads((options.json / f"{STUDY.name}-{options.seed}.json").read_text())
    graphs(options.output / "reversed_digits.png", run)
    files = [path for study in (STUDY, KNOB) for path in options.json.glob(f"{study.name}-*.json")]
    difficulty(options.output / "reversed_digits_difficulty.png", [json.loads(path.read_text()) for path in files])


if __name__ == "__main__":
    main()
