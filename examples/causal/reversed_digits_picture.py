"""The pictures of reversed_digits.py, from the numbers that its runs left.

One shows the graph over training, one how the reliance on the easy digit and the accuracy under shift go together as
the hard digit gets harder. `python -m examples.causal.reversed_digits_picture` draws both; with
`--write-docs` where docs/causal.md shows them.
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

from examples.causal.reversed_digits import DIFFICULTIES, KNOB, PLAIN, STUDY
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


ROWS = {
    "ordinary training, a module sees one half": "modules see one half each: multi-task",
    "MT-CRL, a module sees one half": "modules see one half each: MT-CRL",
    "MT-CRL, a module sees both halves": "MT-CRL",
}


@mpl.rc_context(STYLE)
def graphs(path: Path, run: Mapping[str, Mapping[str, Any]]) -> None:
    """Saves heat maps of one seed's graph over training, a row a method."""
    figure = Figure(figsize=(13, 7.6), layout="constrained")
    head, *parts = figure.subfigures(1 + len(ROWS), height_ratios=[0.16, *[1] * len(ROWS)])
    title = "Each task finds its modules. With the penalties, task a reads those that see b's digit less."
    head.text(0.01, 0.3, title, size=16, weight="bold")
    for part, (name, method) in zip(parts, ROWS.items(), strict=True):
        _row(part, run[method], name)
    _save(figure, path)


def _row(part: SubFigure, numbers: Mapping[str, Any], name: str) -> None:
    part.suptitle(name, x=0.01, ha="left", size=13, weight="bold")
    looks, snapshots = numbers["modules look right"], numbers["graphs"]
    order = sorted(range(len(looks)), key=looks.__getitem__)
    names = ["sees a" if looks[k] < 0.01 else "sees b" if looks[k] > 0.99 else "both" for k in order]
    for i, (axes, graph) in enumerate(zip(part.subplots(1, len(snapshots)), snapshots, strict=True)):
        values = torch.tensor(graph)[:, order]
        axes.imshow(values.numpy(), cmap=BLUES, vmin=0, vmax=1, aspect="auto")
        for t, row in enumerate(values.tolist()):
            for k, value in enumerate(row):
                axes.text(k, t, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.6 else "black")
        axes.set_yticks([0, 1], ["task a", "task b"] if i == 0 else ["", ""])
        axes.set_xticks(range(len(order)), names, size=10, color=GREY)
        axes.tick_params(length=0)
        axes.set_title(f"step {numbers['steps'] * i // (len(snapshots) - 1)}", loc="left", size=11, color=GREY)


@mpl.rc_context(STYLE)
def difficulty(path: Path, runs: Runs) -> None:
    """Saves accuracy under shift by difficulty, and by reliance on the other digit."""
    figure = Figure(figsize=(13, 5.4), layout="constrained")
    head, body = figure.subfigures(2, height_ratios=[0.13, 1])
    title = "The harder its own digit, the more ordinary training relies on the other one, and the more it loses."
    head.text(0.01, 0.3, title, size=15, weight="bold")
    left, right = body.subplots(1, 2, sharey=True)
    levels = sorted({*DIFFICULTIES, PLAIN.dropped})
    for method, label, colour, side in (
        ("multi-task", "ordinary training", ORDINARY, "left"),
        ("MT-CRL", "MT-CRL", CAUSAL, "right"),
    ):
        rows = [method if level == PLAIN.dropped else f"{method}, {level:.0%} dropped" for level in levels]
        accuracy, says = (
            [mean(run[row][key] for run in runs if row in run) for row in rows]
            for key in ("a, shifted", "a says b's digit, shifted")
        )
        left.plot(levels, accuracy, "o-", color=colour, linewidth=3, label=label)
        right.plot(says, accuracy, "o-", color=colour, linewidth=3)
        for x, y, level in zip(says, accuracy, levels, strict=True):
            offset = (7 if side == "left" else -7, 4)
            right.annotate(f"{level:.0%}", (x, y), offset, textcoords="offset points", color=colour, size=10, ha=side)
    left.legend(frameon=False, loc="lower left")
    left.set(xlabel="pixels of its own digit that are dropped", ylabel="task a right, under shift")
    left.set_xticks(levels, [f"{level:.0%}" for level in levels])
    right.set(xlabel="task a gives b's digit as its answer, under shift (labels: pixels dropped)", xlim=(0, 0.5))
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
    folder = Path("runs/causal")
    parser.add_argument("--output", type=Path, default=folder, help="folder of the pictures (default: %(default)s)")
    parser.add_argument(
        "--write-docs",
        action="store_const",
        dest="output",
        const=PAGE.parent / "images",
        help=f"put them where {PAGE.name} shows them",
    )
    options = parser.parse_args()
    run = json.loads((options.json / f"{STUDY.name}-{options.seed}.json").read_text())
    graphs(options.output / "reversed_digits.png", run)
    files = [path for study in (STUDY, KNOB) for path in options.json.glob(f"{study.name}-*.json")]
    difficulty(options.output / "reversed_digits_difficulty.png", [json.loads(path.read_text()) for path in files])


if __name__ == "__main__":
    main()
