"""Checks of what methods, combinators and the optimizer are given."""

import math
from collections.abc import Callable
from numbers import Integral
from typing import Any

from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight._view import View

_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "finite": ("a finite {}", math.isfinite),
    "> 0": ("a finite {} > 0", lambda x: 0 < x < math.inf),
    ">= 0": ("a finite {} >= 0", lambda x: 0 <= x < math.inf),
    "in [0, 1)": ("{} in [0, 1)", lambda x: 0 <= x < 1),
    "in [0, 1]": ("{} in [0, 1]", lambda x: 0 <= x <= 1),
    "in (0, 1)": ("{} in (0, 1)", lambda x: 0 < x < 1),
}
"""The ranges of :func:`expect`: what messages call them, and the test."""


def expect(owner: object, allowed: str, *names: str) -> None:
    """Raises if one of these attributes of the owner is out of range; ``allowed`` is one of ``_RANGES``."""
    words, fits = _RANGES[allowed]
    for name in names:
        value = getattr(owner, name)
        if not fits(value):
            raise MTLWeightError(f"{title(owner)}: expected {words.format(name)}, found {value}.")


def expect_one_of(owner: object, name: str, *choices: str | None) -> None:
    """Raises if the hyperparameter of this name is none of the choices."""
    value = getattr(owner, name)
    if value not in choices:
        *others, last = map(repr, choices)
        raise MTLWeightError(f"{title(owner)}: expected {name} {', '.join(others)} or {last}, found {value!r}.")


def title(owner: object) -> str:
    """What messages call it: its class, or the function that builds it."""
    name = type(owner).__name__
    return name[1:].lower() if name.startswith("_") else name


def expect_count(name: str, what: str, value: Any, low: int = 1) -> None:
    """Raises if a hyperparameter is no integer, which counting would never reach, or is below ``low``."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < low:
        raise MTLWeightError(f"{name}: expected {what} >= {low}, found {value!r}. Pass a whole number.")


def nonnegative(name: str, view: View, losses: Tensor | None = None, what: str = "losses >= 0") -> Tensor:
    """The view's losses, or the given ones, ``[m]``. Raises if one is negative."""
    losses = view.losses if losses is None else losses
    if (losses < 0).any():
        found = ", ".join(f"{t} = {x:.4g}" for t, x in zip(view.tasks, losses.tolist(), strict=True) if x < 0)
        raise MTLWeightError(
            f"{name}: expected {what}, since it takes logarithms or ratios of them; found {found}. Shift the loss by a "
            "lower bound, or use a weighting that accepts negative losses."
        )
    return losses


def expect_kind(name: str, value: Any, kind: Any, words: str) -> None:
    """Raises if an argument of the optimizer is of another kind, which messages call ``words``."""
    if not isinstance(value, kind):
        raise MTLWeightError(
            f"MultiTaskOptimizer: expected {name} to be {words}, found {type(value).__name__}. See its docstring."
        )


def expect_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises if an argument of the optimizer is none of the names that it may be."""
    if value not in choices:
        raise MTLWeightError(
            f"MultiTaskOptimizer: expected {name} to be one of {', '.join(choices)}; found {value!r}. Choose one."
        )
