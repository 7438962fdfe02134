"""What a ``MultiTaskOptimizer`` knows: what is committed, and what waits for its step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mtlweight._report import Report
from mtlweight._statistics import Given
from mtlweight._view import State
from mtlweight._weighting import Level
from mtlweight.batch.accumulation import Accumulation
from mtlweight.batch.nonfinite import Hidden
from mtlweight.batch.settings import Settings


@dataclass
class Use:
    """What has become of one scalar. Its hook holds this and nothing else of the step."""

    remembers: bool = False  # whether the weighting has a state that would be lost
    backward: bool = False  # whether one has gone through it
    behind: bool = False  # whether the wrapped optimizer was stepped then, though not by this one
    done: bool = False  # whether it was committed, or the next one goes on from it


@dataclass
class Pending:
    """What ``step`` will commit."""

    state: State | None
    report: Report | None
    tasks: tuple[str, ...]
    memory: State
    seed: int | None
    uses: Counter[str]
    dropped: tuple[str, ...] = ()
    skip: bool = False
    hidden: Hidden = field(default_factory=list)
    observe: Callable[[], Given] | None = None
    use: Use = field(default_factory=Use)


@dataclass
class Decision:
    """The weights of one call of ``combine``, and the losses that they are for."""

    weights: Tensor
    writes: Level
    tasks: tuple[str, ...]
    shape: torch.Size
    dropped: tuple[str, ...]
    start: Pending


@dataclass
class Closure:
    """One ``step(closure)``. What its first evaluation decides holds for all of them: a line search compares values.

    Args:
        decided: in the first evaluation, by each call of ``combine``.
        calls: how many there were in this evaluation.
    """

    decided: list[Decision] = field(default_factory=list)
    calls: int = 0


@dataclass
class Record:
    """All that an optimizer knows, so that it has one attribute of its own."""

    settings: Settings
    seed: int | None
    # Committed:
    step: int = 0
    state: State | None = None
    tasks: tuple[str, ...] = ()
    memory: State = field(default_factory=dict)
    uses: Counter[str] = field(default_factory=Counter)
    report: Report = field(default_factory=Report)
    skipped: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    uncommitted: int = 0
    # Of this run:
    broken: dict[str, str] = field(default_factory=dict)
    fallbacks: Counter[str] = field(default_factory=Counter)
    warned: set[str] = field(default_factory=set)
    averaged: bool = False  # whether the processes' gradients were seen to be the same
    searches: bool = False  # whether the wrapped optimizer was seen to evaluate its closure again
    # In mid-step:
    pending: Pending | None = None
    closure: Closure | None = None
    stepping: bool = False
    cleared: bool = False
    accumulation: Accumulation = field(default_factory=Accumulation)

    def start(self) -> Pending:
        """Where a step starts from."""
        return Pending(self.state, None, self.tasks, self.memory, self.seed, self.uses)
