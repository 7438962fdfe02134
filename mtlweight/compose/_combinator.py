"""The base classes of combinators."""

from __future__ import annotations

import functools
import operator
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtlweight._checks import title
from mtlweight._errors import MTLWeightError
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Level, ReferenceUse, Weighting, evaluate


class Combinator(Weighting):
    """A weighting made of others: reads, writes and uses what they do. Its state has theirs at ``"0"``, ``"1"``, ..."""

    def __post_init__(self) -> None:
        for part in self.parts:
            expect_weighting(part, title(self))

    @property
    @abstractmethod
    def parts(self) -> tuple[Weighting, ...]:
        """The weightings that it is made of."""

    layout = ("parts",)

    @property
    def needs(self) -> Needs:
        """What its parts read."""
        return _union(part.needs for part in self.parts)

    def needs_at(self, step: int) -> Needs:
        """What its parts read at this step."""
        return _union(part.needs_at(step) for part in self.parts)

    @property
    def writes(self) -> Level:
        """The finest level that its parts write."""
        levels = {part.writes for part in self.parts}
        return "sample" if "sample" in levels else "entry" if "entry" in levels else "task"

    @property
    def reference(self) -> ReferenceUse | None:
        """The one use of the reference that its parts agree on."""
        return next((part.reference for part in self.parts if part.reference is not None), None)

    @property
    def observes(self) -> bool:
        """Whether any part observes."""
        return any(part.observes for part in self.parts)

    def observes_at(self, step: int) -> bool:
        """Whether any part observes this step."""
        return any(part.observes_at(step) for part in self.parts)

    def observe(self, view: View, state: State) -> State:
        """Lets each part that observes this step do so."""
        observers = [(i, part) for i, part in enumerate(self.parts) if part.observes_at(view.step)]
        return {**state, **{str(i): part.observe(view, substate(state, i)) for i, part in observers}}


@dataclass(frozen=True, repr=False)
class Wrapper(Combinator):
    """A combinator of one weighting, whose weights it changes."""

    inner: Weighting

    @property
    def parts(self) -> tuple[Weighting, ...]:
        """The one inside."""
        return (self.inner,)

    def changed(self, weights: Tensor) -> Tensor:
        """What becomes of the inner weights."""
        return weights

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """The inner weights, changed."""
        weights, inner = evaluate(self.inner, view, substate(state, 0))
        return self.changed(weights), {"0": inner}

    def ahead(self, view: View, state: State) -> Tensor:
        """The inner weights of the look-ahead step, changed."""
        return self.changed(ahead_of(self.inner, view, substate(state, 0)))


def expect_weighting(part: object, where: str) -> None:
    """Raises if a part of a combinator is no weighting."""
    if not isinstance(part, Weighting):
        raise MTLWeightError(f"Expected weightings in {where}, found {part!r}. Pass objects such as UW() or PCGrad().")


def ahead_of(part: Weighting, view: View, state: State | None) -> Tensor:
    """A part's weights of the look-ahead step, for which no gradients are measured.

    A part that looks ahead has a method for it; one that reads losses alone has its usual weights; any other has ones.
    """
    if part.reference is not None and part.reference.lookahead is not None:
        return part.ahead(view, part.init(view) if state is None else state)
    if part.needs in Needs.LOSSES | Needs.SAMPLES:
        return evaluate(part, view, state)[0]
    return ones(view)


def ones(view: View) -> Tensor:
    """Weight 1 for each task."""
    return torch.ones(len(view.tasks), dtype=view.dtype, device=view.device)


def substate(state: State, part: int) -> Any:
    """The state of one part of a combinator; ``None`` before its first step."""
    return state.get(str(part))


def _union(needs: Iterable[Needs]) -> Needs:
    return functools.reduce(operator.or_, needs, Needs.NOTHING)
