"""How time and memory are measured."""

import gc
import json
import math
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile

MIB = 2**20
SETTLED = 32
"""Uses of an engine after which its next comparison with a backward, the 64th, is far: see :func:`settled`."""
FEWEST = 5
"""Rounds that a row gets even where they last long, unless fewer are asked for."""


@dataclass
class Settings:
    """How much is measured.

    Args:
        device: where.
        rounds: repeats; in each, every contestant of a row has its turn, in a new order.
        turn: seconds that a turn lasts at least; fast contestants are repeated within it.
        budget: seconds that the rounds of a row may last; slow rows get fewer rounds, but :data:`FEWEST` at least.
        seed: of models, data and the order within a round.
        quick: small shapes, for a look and for the test suite.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rounds: int = 15
    turn: float = 0.05
    budget: float = 30.0
    seed: int = 0
    quick: bool = False


@dataclass
class Ratio:
    """The best of some contestants over the best of others, with the limit that it is to keep.

    Args:
        label: what it says.
        over: names in the numerator; of several, the best counts: see :func:`compare`.
        under: names in the denominator, likewise.
        at_most: limit from above.
        at_least: limit from below.
        of: ``"ms"``, the times, or ``"mib"``, the peak memory, which is taken once.
    """

    label: str
    over: tuple[str, ...]
    under: tuple[str, ...]
    at_most: float | None = None
    at_least: float | None = None
    of: Literal["ms", "mib"] = "ms"


@dataclass
class Row:
    """One line of a benchmark: contestants that do the same job on one model and shape.

    Args:
        table: name of the benchmark.
        label: model and shape.
        contestants: by name.
        ratios: what is compared.
        residuals: for contestants that solve a problem, what is wrong with the solution. Memory is then not measured.
    """

    table: str
    label: dict[str, str | int]
    contestants: dict[str, Callable[[], Any]]
    ratios: list[Ratio]
    residuals: dict[str, Callable[[], float]] = field(default_factory=dict)


def measure(row: Row, settings: Settings) -> dict[str, Any]:
    """Times all contestants of a row in one round-robin loop, then takes their peak memory, or residuals.

    A ratio is taken within each round, where its two contestants ran close together, and then summarised.
    """
    repeats, lasts = {}, 0.0
    for name, run in row.contestants.items():
        run()  # allocators, kernels' choices, lazy state
        once = _time(run, 1, settings.device)
        repeats[name] = max(1, math.ceil(settings.turn / once))
        lasts += repeats[name] * once
    rounds = min(settings.rounds, max(FEWEST, int(settings.budget / lasts)))
    order = list(row.contestants)
    shuffle = random.Random(settings.seed).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            seconds[name].append(_time(row.contestants[name], repeats[name], settings.device))
    small = {} if row.residuals else row.contestants
    memory = {name: peak_memory(run, settings.device) for name, run in small.items()}
    ratios = {}
    for ratio in row.ratios:
        values = seconds if ratio.of == "ms" else {name: [mib] for name, mib in memory.items()}
        ratios[ratio.label] = compare(ratio, values)
    times = {name: summarise(1e3 * s for s in values) for name, values in seconds.items()}
    residuals = {name: residual() for name, residual in row.residuals.items()}
    found = {"ms": times, "mib": memory, "residuals": residuals, "ratios": ratios}
    return {"table": row.table, "label": row.label, "rounds": rounds, **found}


def settled(run: Callable[[], Any]) -> Callable[[], Any]:
    """A contestant in the state that it is in for most of a training.

    Alignments are compared with a backward at the 1st, 2nd, 4th, 8th, ... use: a few rounds after the start it would be
    in most of them, and over a training it is in next to none.
    """
    for _ in range(SETTLED):
        run()
    return run


def compare(ratio: Ratio, values: dict[str, list[float]]) -> dict[str, Any]:
    """A ratio within each round, summarised.

    Of several contestants, the best is the one with the smallest median over all *other* rounds: chosen by this one as
    well, the best of equals would look faster than each of them is.

    Args:
        ratio: what is compared.
        values: by name, one a round.
    """
    count = len(values[ratio.under[0]])
    others = [[r for r in range(count) if r != each] or [each] for each in range(count)]

    def best(names: tuple[str, ...], rounds: Iterable[int]) -> str:
        rounds = list(rounds)
        return min(names, key=lambda name: statistics.median(values[name][r] for r in rounds))

    summary = summarise(
        values[best(ratio.over, rest)][r] / values[best(ratio.under, rest)][r] for r, rest in enumerate(others)
    )
    met = (ratio.at_most is None or summary["median"] <= ratio.at_most) and (
        ratio.at_least is None or summary["median"] >= ratio.at_least
    )
    limits = {"at_most": ratio.at_most, "at_least": ratio.at_least}
    over, under = (best(names, range(count)) for names in (ratio.over, ratio.under))
    return {**summary, **limits, "met": met, "over": over, "under": under}


def summarise(values: Iterable[float]) -> dict[str, float]:
    """Median and quartiles."""
    each = list(values)
    low, middle, high = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
    return {"median": middle, "low": low, "high": high}


def peak_memory(run: Callable[[], Any], device: torch.device) -> float:
    """The most memory, in MiB, that torch's allocator held during a run on top of what it held before.

    On CUDA the allocator counts it itself. On the CPU it has no counter: the profiler's memory events, one for each
    allocation and release of a tensor in order of time, are added up. What a kernel allocates on its own, past torch's
    allocator, is not seen; and what was there before is not taken off when it is released.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    peak, held = 0, {}
    for event in sorted(
        (e for e in events if e.get("name") == "[memory]"), key=lambda e: (e["ts"], e["args"]["Ev Idx"])
    ):
        block, size = event["args"]["Addr"], event["args"]["Bytes"]
        if size > 0:
            held[block] = size
        else:  # of a block that was there before, the size is known by chance
            held.pop(block, None)
        peak = max(peak, sum(held.values()))
    return peak / MIB


def environment(settings: Settings) -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    cuda = settings.device.type == "cuda"
    return {
        "kind": settings.device.type,
        "device": torch.cuda.get_device_name(settings.device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rounds": settings.rounds,
        "turn": settings.turn,
        "budget": settings.budget,
        "seed": settings.seed,
        "quick": settings.quick,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _time(run: Callable[[], Any], repeats: int, device: torch.device) -> float:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize()
    return (time.perf_counter() - start) / repeats


def note(text: str) -> None:
    """Progress, beside the table."""
    print(text, file=sys.stderr, flush=True)
