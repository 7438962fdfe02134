"""Micro-batches that come one by one, in a loop that a trainer may own: the last one weighs them all."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mtlweight._checks import expect_count
from mtlweight._errors import MTLWeightError
from mtlweight.batch.late_binding import expect_bound, outside

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
        self.outside.append(outside([losses, reference]))
        if not self.complete:
            device = next(p.device for group in groups for p in group["params"])
            scalar = torch.zeros((), device=device, requires_grad=True)  # its backward leaves all parameters alone
            self.scalars.append(scalar)
            return scalar
        for (one, compared, _), then in zip(self.parts, self.outside, strict=True):
            expect_bound([one, compared], then)
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
