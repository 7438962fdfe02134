"""Callables that look for their data outside themselves, where a loop may have left other data by now."""

import dis
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from types import CellType, CodeType, FunctionType
from typing import Any

from torch import Tensor

from mtlweight._errors import MTLWeightError


def expect_bound(given: Any, before: Sequence[tuple[str, Any]]) -> None:
    """Raises if callables find something else outside themselves than before.

    Args:
        given: callables, or collections of these.
        before: what :func:`outside` found then.
    """
    for (name, now), (_, then) in zip(outside(given), before, strict=True):
        if not _same(now, then):
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


def outside(given: Any, seen: set[int] | None = None) -> list[tuple[str, Any]]:
    """What callables, or collections of these, find outside themselves at present: variables that a loop may rebind."""
    seen = set() if seen is None else seen
    if isinstance(given, (list, tuple, Mapping)):
        several = given.values() if isinstance(given, Mapping) else given
        return [pair for one in several for pair in outside(one, seen)]
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
    return values + [pair for one in called for pair in outside(one, seen)]


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
