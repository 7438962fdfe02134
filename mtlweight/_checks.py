"""Checks of what methods, combinators and the optimizer are given."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight._view import View


def expect_count(name: str, what: str, value: Any, low: int = 1) -> None:
    """Raises if a hyperparameter that counts something is not a whole number, or too small.

    Args:
        name: the weighting, for the message.
        what: the argument, for the message.
        value: as the user gave it.
        low: the smallest number allowed.

    Raises:
        MTLWeightError: if it is below ``low`` or no integer, which would never be reached by counting.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < low:
        raise MTLWeightError(f"{name}: expected {what} >= {low}, found {value!r}. Pass a whole number.")


def nonnegative(name: str, view: View, losses: Tensor | None = None, what: str = "losses >= 0") -> Tensor:
    """The view's losses, or the given ones.

    Args:
        name: the weighting, for the message.
        view: names the tasks.
        losses: ``[m]``; the view's if left out.
        what: what was expected.

    Raises:
        MTLWeightError: if one is negative.
    """
    losses = view.losses if losses is None else losses
    values = losses.tolist()
    if any(x < 0 for x in values):
        found = ", ".join(f"{t} = {x:.4g}" for t, x in zip(view.tasks, values, strict=True) if x < 0)
        raise MTLWeightError(
            f"{name}: expected {what}, since it takes logarithms or ratios of them; found {found}. Shift the loss by a "
            "lower bound, or use a weighting that accepts negative losses."
        )
    return losses


def expect_kind(name: str, value: Any, kind: Any, words: str) -> None:
    """Raises if an argument of the optimizer is of another kind.

    Args:
        name: the argument.
        value: as the user gave it.
        kind: the types allowed.
        words: what messages call them.
    """
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
