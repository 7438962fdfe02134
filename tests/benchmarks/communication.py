"""``python -m tests.benchmarks.communication``: what exchanges between processes cost, on paper.

A model, not a measurement: a ring in which each process sends and receives at ``BANDWIDTH`` and each of its turns takes
``LATENCY``, nothing overlaps with computation, and nothing else is on the wire. ``--write-docs`` puts the table into
docs/optimizer.md; tests compare what is sent with what processes really send.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks._render import write

LEVELS = ("loss", "Gramian", "features", "Jacobian", "reference")
RANKS = (2, 4, 8, 16, 32, 64)
TASKS = (2, 10, 40)
SAMPLES = 64
PARAMETERS = 25_000_000
BANDWIDTH = 12.5e9
LATENCY = 20e-6
NAMES = 512
PAGE = Path(__file__).parents[2] / "docs" / "optimizer.md"
NAME = "communication"

Exchange = tuple[str, int]


def exchanges(level: str, *, tasks: int, samples: int, parameters: int, item: int = 4) -> list[Exchange]:
    """What a process hands in at each step, in order: the kind of exchange, and bytes. ``names`` are few.

    Args:
        level: one of :data:`LEVELS`.
        tasks: ``m``.
        samples: ``b``, in each process.
        parameters: ``n``, shared.
        item: bytes of a number in a row; losses, Gramians and alignments have 8.
    """
    losses = [("names", 0), ("gather", 2 * 8 * tasks * samples)]
    more = {
        "loss": [],
        "Gramian": [("reduce", item * tasks * parameters)],
        "features": [("reduce", 8 * tasks * tasks)],
        "Jacobian": [("reduce", item * tasks * parameters)],
        "reference": [("gather", 8 * tasks * samples)],
    }
    before = [("reduce", item * parameters)] if level == "reference" else []
    return [*before, *losses, *more[level]]


def seconds(sent: Sequence[Exchange], ranks: int, *, bandwidth: float = BANDWIDTH, latency: float = LATENCY) -> float:
    """How long the exchanges take in a ring."""
    turns = ranks - 1
    total = 0.0
    for kind, size in sent:
        if kind == "reduce":  # to all: each piece goes around twice
            total += 2 * turns * latency + 2 * turns / ranks * size / bandwidth
        elif kind == "gather":
            total += turns * latency + turns * size / bandwidth
        else:  # two gathers: the sizes, and the names
            total += 2 * turns * latency + turns * NAMES / bandwidth
    return total


def table() -> str:
    """Milliseconds a step, against processes and tasks."""
    head = ["level", "m", *(f"R = {ranks}" for ranks in RANKS)]
    lines = [head, ["---", "---:", *["---:"] * len(RANKS)]]
    lines.append(["gradients, by DDP", "any", *(_ms(seconds([("reduce", 4 * PARAMETERS)], ranks)) for ranks in RANKS)])
    for level in LEVELS:
        for m in TASKS if level != "Jacobian" else ():
            sent = exchanges(level, tasks=m, samples=SAMPLES, parameters=PARAMETERS)
            name = "Gramian, Jacobian" if level == "Gramian" else level
            lines.append([name, str(m), *(_ms(seconds(sent, ranks)) for ranks in RANKS)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ms(value: float) -> str:
    return f"{1e3 * value:.3g}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.communication", description=__doc__)
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/optimizer.md")
    options = parser.parse_args(arguments)
    print(table())
    if options.write_docs:
        write(PAGE, {NAME: table()})


if __name__ == "__main__":
    main()
