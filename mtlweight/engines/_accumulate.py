"""Micro-batches that come one by one, in a loop that a trainer may own: the last one weighs them all."""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import CellType, CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor

from mtlweight._checks import expect_count
from mtlweight._errors import MTLWeightError

_LAST = (
    "Say which one is the last: accumulate(..., last=...), such as last=accelerator.sync_gradients; or drop the "
    "loader's incomplete last batches."
)
Combine = Callable[[Any, Any, Any], Tensor]
"""From losses, reference and mask to the scalar."""


@dataclass
class Accumulation:
    """The micro-batches of one step.

    Args:
        size: how many make up a step; ``None`` where nothing is accumulated.
        last: whether the next one is the last of its step; ``None``: if it is the ``size``-th.
        each: whether each one is weighed by itself.
        divisor: what the loop divides each scalar by; ``None``: by ``size``.
        count: how many have come since the last step.
        total: how many make up the step of those that have come.
        complete: whether the last one has come.
        parts: losses, reference and mask of those that wait.
        scalars: what they returned, whose gradients say what the loop divided them by.
        warned: whether it was said that the loop divides by something else.
    """

    size: int | None = None
    last: bool | None = None
    each: bool = False
    divisor: int | None = None
    count: int = 0
    total: int = 0
    complete: bool = False
    parts: list[tuple[Any, Any, Any]] = field(default_factory=list)
    outside: list[list[tuple[str, Any]]] = field(default_factory=list)
    scalars: list[Tensor] = field(default_factory=list)
    warned: bool = False

    @contextlib.contextmanager
    def within(self, size: int, last: bool | None, weigh: str, divisor: int | None) -> Iterator[None]:
        """Within the context ``size`` micro-batches make up a step. An error that leaves it forgets those that wait."""
        expect_count("accumulate", "micro-batches a step", size)
        if weigh not in ("together", "each"):
            raise MTLWeightError(f"accumulate: expected weigh='together' or 'each', found {weigh!r}. Choose one.")
        if divisor is not None:
            expect_count("accumulate", "divisor", divisor)
            if weigh == "each":
                raise MTLWeightError(
                    f"accumulate: with weigh='each' every scalar is returned as it is: expected no divisor, found "
                    f"{divisor}. Leave it out, and divide each scalar by the number of micro-batches yourself, or the "
                    "step is that many times their mean."
                )
        before = self.size, self.last, self.each, self.divisor
        self.size, self.last, self.each, self.divisor = size, last, weigh == "each", divisor
        try:
            yield
        except BaseException:
            self.restart()
            raise
        finally:
            self.size, self.last, self.each, self.divisor = before

    def restart(self) -> None:
        """The next micro-batch is the first of its step."""
        self.count, self.complete, self.parts, self.outside, self.scalars = 0, False, [], [], []

    def mark(self) -> Callable[[], None]:
        """A function that forgets the micro-batches that come after this call: for closures that run again."""
        if self.complete:
            self.restart()
        count = self.count

        def rewind() -> None:
            self.count, self.complete = count, False
            del self.parts[count:], self.outside[count:], self.scalars[count:]

        return rewind

    @property
    def continues(self) -> bool:
        """Whether the micro-batch that is being weighed by itself goes on from the state of the one before it."""
        return self.each and self.count > 1

    def take(self, combine: Combine, groups: list[dict[str, Any]], losses: Any, reference: Any, mask: Any) -> Tensor:
        """The scalar of a micro-batch, for loops that divide it by ``divisor``.

        Args:
            combine: weighs losses with their reference and mask.
            groups: the optimizer's, whose device the scalar of one that waits is on.
            losses: of this micro-batch, and so on.
            reference: to compare with.
            mask: which samples have a label.
        """
        if self.size is None:
            waiting = 0 if self.complete else len(self.parts)
            if waiting:
                self.restart()
                raise MTLWeightError(
                    f"accumulate: expected the last of {self.total} micro-batches, found a combine outside while "
                    f"{waiting} still waited for it. They are dropped now. {_LAST}"
                )
            return combine(losses, reference, mask)
        if self.complete:
            self.restart()
        if self.count == self.size:
            raise MTLWeightError(
                f"accumulate: expected the last of at most {self.size} micro-batches a step, found one more. Pass the "
                "number that the loop accumulates and divides by, and last=True with the last one."
            )
        deferred = callable(losses) and not isinstance(losses, Tensor)
        if not self.each and not deferred:
            raise MTLWeightError(
                f"accumulate: {self.size} micro-batches are weighed together when the last one comes: expected losses "
                f"as a callable, found {type(losses).__name__}. Pass combine(lambda batch=batch: losses(model, "
                "batch)); or choose weigh='each'."
            )
        self.count, self.total = self.count + 1, self.size
        self.complete = self.count == self.size if self.last is None else self.last
        if self.each:
            return combine(losses, reference, mask)
        self.parts.append((losses, reference, mask))
        self.outside.append(_outside([losses, reference]))
        if not self.complete:
            device = next(p.device for group in groups for p in group["params"])
            scalar = torch.zeros((), device=device, requires_grad=True)  # its backward leaves all parameters alone
            self.scalars.append(scalar)
            return scalar
        self._expect_own_data()
        divisor = self._divided()
        each, references, masks = ([*column] for column in zip(*self.parts, strict=True))
        given = [one for one in references if one is not None]
        alone = len(each) == 1
        return divisor * combine(
            each[0] if alone else each,
            given[0] if len(given) == 1 else given or None,
            masks[0] if alone else None if all(one is None for one in masks) else masks,
        )

    def expect_complete(self) -> None:
        """Raises if a step comes while micro-batches wait."""
        if self.parts and not self.complete:
            raise MTLWeightError(
                f"accumulate: expected step() after {self.total} micro-batches, found it after {self.count}, which "
                f"wait for the last one and have no gradient yet (an epoch before this one may have left some). {_LAST}"
            )

    def _divided(self) -> int:
        """What the loop says that it divides by; warns once if it is seen to do otherwise, which a loss scale hides."""
        assert self.size is not None
        divisor = self.size if self.divisor is None else self.divisor
        gradients = [scalar.grad for scalar in self.scalars if scalar.grad is not None]
        factors = torch.stack(gradients).tolist() if gradients and not self.warned else []
        numbers = [n for n in range(1, self.size + 1) if any(abs(n * factor - 1) < 1e-3 for factor in factors)]
        found = next((n for n in numbers if n != divisor), None)
        if found is not None:
            self.warned = True
            warnings.warn(
                f"mtlweight: accumulate: expected a loop that divides each scalar by {divisor}, found a factor of "
                f"1/{found} on one. If that is what the loop divides by, gradients are {divisor / found:g} times what "
                f"they should be: pass divisor={found}, since some trainers divide by the number of micro-batches in a "
                "group, which may be short, and some not at all. If the factor is your own, or a small loss scale, all "
                "is well.",
                stacklevel=5,  # where combine was called
            )
        return divisor

    def _expect_own_data(self) -> None:
        for (losses, reference, _), then in zip(self.parts, self.outside, strict=True):
            for (name, now), (_, before) in zip(_outside([losses, reference]), then, strict=True):
                if not _same(now, before):
                    raise MTLWeightError(
                        "accumulate: micro-batches are evaluated when the last one comes: expected callables that hold "
                        f"their data, found one that looks for {name!r} outside, where it is another by now. Bind it: "
                        f"lambda {name}={name}: ..."
                    )


def expect_own_parts(given: Any) -> None:
    """Raises if two callables of a list are one function that looks for its data outside: both find the same.

    Functions are looked at, as loops and comprehensions make them; no partial functions and no methods.
    """
    several = given if isinstance(given, (list, tuple)) else ()
    functions = [inspect.unwrap(one) for one in several if callable(one) and not isinstance(one, Tensor)]
    seen: dict[Any, Any] = {}
    for one in functions:
        if not isinstance(one, FunctionType):
            continue
        held = [_contents(cell) for cell in one.__closure__ or ()]
        held += [*(one.__defaults__ or ()), *(one.__kwdefaults__ or {}).values()]
        key = one.__code__, *map(id, held)
        if seen.setdefault(key, one) is not one:
            names = [*one.__code__.co_freevars, *(name for name in _globals(one.__code__) if name in one.__globals__)]
            raise MTLWeightError(
                "Losses in parts, or references in a list, come from one callable each: expected callables that hold "
                f"their data, found two that look for the same outside ({', '.join(names)}), where a loop has left the "
                "last. Bind what differs: lambda rows=rows: ..."
            )


def _same(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, (int, float, str)) and type(a) is type(b) and a == b)


def _outside(given: Any, seen: set[int] | None = None) -> list[tuple[str, Any]]:
    """What callables, or collections of these, find outside themselves at present: variables that a loop may rebind."""
    seen = set() if seen is None else seen
    if isinstance(given, (list, tuple, Mapping)):
        several = given.values() if isinstance(given, Mapping) else given
        return [pair for one in several for pair in _outside(one, seen)]
    function = inspect.unwrap(given) if callable(given) else given
    while isinstance(function, functools.partial):
        function = function.func
    if callable(function) and not hasattr(function, "__code__"):
        function = type(function).__call__
    if id(function) in seen:
        return []
    seen.add(id(function))
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if not isinstance(code, CodeType):
        return []
    values = [(name, function.__globals__.get(name)) for name in _globals(code)]
    values += [(name, _contents(cell)) for name, cell in zip(code.co_freevars, cells or (), strict=True)]
    # What it calls may look outside in its turn; functions of other files do not look at the loop.
    called = [v for _, v in values if isinstance(v, FunctionType) and v.__globals__ is function.__globals__]
    return values + [pair for one in called for pair in _outside(one, seen)]


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _globals(code: CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _globals(constant)
