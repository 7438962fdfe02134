"""One batch as a weighting may see it, made by hand: the input of every check."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight._statistics import gramian_of
from mtlweight._view import Needs, View

Numbers: TypeAlias = Tensor | Sequence[Any]
"""A tensor, or nested sequences of numbers."""
EVERYTHING = ~Needs.NOTHING


@dataclass(frozen=True, eq=False)
class Problem:
    """Losses and gradients that belong together; all statistics follow from them.

    Args:
        losses: ``[m]`` or ``[m, b]``.
        rows: the gradients: ``[m, n]``, or ``[m, b, n]`` beside losses ``[m, b]``.
        reference: gradient of the reference objective, ``[n]``.
        tasks: names of the rows.
        kind: the property that the gradients were built to have, for messages.
        after: the losses after the step, ``[m]``, for weightings that observe them.
        known: all tasks that have a place, in order; those of the rows if left out.
    """

    losses: Tensor
    rows: Tensor
    reference: Tensor
    tasks: tuple[str, ...]
    kind: str = "given"
    after: Tensor | None = None
    known: tuple[str, ...] | None = None

    @classmethod
    def given(cls, jacobian: Numbers, losses: Numbers | None = None, reference: Numbers | None = None) -> Problem:
        """A problem from numbers, such as a counterexample to store.

        Args:
            jacobian: ``[m, n]``, or ``[m, b, n]`` beside losses ``[m, b]``.
            losses: ``[m]`` or ``[m, b]``. Default: ones.
            reference: gradient of the reference objective, ``[n]``. Default: zeros.
        """
        rows = torch.as_tensor(jacobian, dtype=torch.float64)
        shape = rows.shape[:-1]
        return cls(
            losses=torch.ones(shape, dtype=rows.dtype) if losses is None else torch.as_tensor(losses, dtype=rows.dtype),
            rows=rows,
            reference=rows.new_zeros(rows.shape[-1])
            if reference is None
            else torch.as_tensor(reference, dtype=rows.dtype),
            tasks=tuple(str(i) for i in range(len(rows))),
        )

    @functools.cached_property
    def jacobian(self) -> Tensor:
        """``J``, ``[m, n]``; the gradient of a loss per sample is the mean of its samples' gradients."""
        return self.rows if self.rows.ndim == 2 else self.rows.mean(dim=1)

    @functools.cached_property
    def gramian(self) -> Tensor:
        """``G = J Jᵀ``, ``[m, m]``."""
        return gramian_of(self.jacobian)

    @property
    def alignment(self) -> Tensor:
        """``J g_ref``, of the shape of the losses."""
        return self.rows @ self.reference

    def view(self, *, step: int = 0, seed: int = 0) -> View:
        """The view of this batch."""
        return View(Statistics(self), step=step, seed=seed)

    def scaled(self, factors: float | Tensor) -> Problem:
        """All losses and gradients times one factor, or times one factor a task, ``[m]``."""
        each = torch.as_tensor(factors, dtype=self.losses.dtype).expand(len(self.tasks))

        def times(values: Tensor) -> Tensor:
            return each.reshape(-1, *[1] * (values.ndim - 1)) * values

        after = None if self.after is None else times(self.after)
        return replace(self, losses=times(self.losses), rows=times(self.rows), after=after)

    def taking(self, tasks: Sequence[int], samples: Sequence[int] | None = None) -> Problem:
        """Some of the tasks, in the given order, each with its place; of the samples too."""
        losses, rows = self.losses[list(tasks)], self.rows[list(tasks)]
        if samples is not None:
            losses, rows = losses[:, list(samples)], rows[:, list(samples)]
        after = None if self.after is None else self.after[list(tasks)]
        names, known = tuple(self.tasks[i] for i in tasks), self.known or self.tasks
        return replace(self, losses=losses, rows=rows, after=after, tasks=names, known=known)

    def step(self, weights: Tensor) -> Tensor:
        """``Σ w · J`` over tasks, or over tasks and samples, ``[n]``."""
        if weights.ndim == 2 and self.rows.ndim == 3 and weights.shape == self.losses.shape:
            return torch.einsum("tb,tbn->n", weights, self.rows)
        return ((weights if weights.ndim == 2 else weights[:, None]) * self.jacobian).sum(dim=0)

    def size(self, weights: Tensor) -> float:
        """``Σ |w| |g|``: how long the step could be, the unit in which its length is judged."""
        if weights.ndim == 2 and self.rows.ndim == 3 and weights.shape == self.losses.shape:
            lengths = torch.linalg.vector_norm(self.rows, dim=2)
            return float((weights.abs() * lengths).sum())
        terms = (weights if weights.ndim == 2 else weights[:, None]) * self.jacobian
        return float(torch.linalg.vector_norm(terms, dim=1).sum())

    def describe(self, needs: Needs, gradients: bool = False) -> str:
        """What a weighting with these needs sees, for messages; with ``gradients`` the Jacobian too."""
        parts = []
        if Needs.LOSSES in needs:
            parts.append(f"losses = {show(self.losses)}")
            if self.after is not None:
                parts.append(f"losses after the step = {show(self.after)}")
        if gradients or needs & (Needs.GRAMIAN | Needs.JACOBIAN):
            name = "jacobian" if self.rows.ndim == 2 else "jacobian per sample"
            parts.append(f"{name} ({self.kind}) = {show(self.rows)}")
        if Needs.GRAMIAN in needs:
            parts.append(f"gramian = {show(self.gramian)}")
        if Needs.ALIGNMENT in needs:
            parts.append(f"alignment = {show(self.alignment)}")
        return ", ".join(parts or [f"{len(self.tasks)} tasks"])


class Statistics:
    """A view's source that computes everything from a problem, and knows what was read.

    Each statistic is one tensor of its own: a weighting that changes it in place is seen, and harms no other check.

    Args:
        problem: the batch.
        allowed: what may be read.
    """

    def __init__(self, problem: Problem, allowed: Needs = EVERYTHING) -> None:
        self.problem = problem
        self.tasks = problem.tasks
        self.known = problem.known or problem.tasks
        self.device = problem.losses.device
        self.read = Needs.NOTHING
        self.values: dict[str, Tensor] = {}
        self._allowed = allowed

    def losses(self) -> Tensor:
        return self._take("losses", Needs.LOSSES)

    def shares(self) -> Tensor:
        losses = self.problem.losses
        return torch.full_like(losses, 1 / losses.shape[1])

    def gramian(self, coefficients: Tensor | None) -> Tensor:
        if coefficients is not None:
            self._mark(Needs.GRAMIAN, "gramian")
            return gramian_of(self._rows(coefficients))
        return self._take("gramian", Needs.GRAMIAN)

    def jacobian(self, coefficients: Tensor | None) -> Tensor:
        if coefficients is not None:
            self._mark(Needs.JACOBIAN, "jacobian")
            return self._rows(coefficients)
        return self._take("jacobian", Needs.JACOBIAN)

    def alignment(self) -> Tensor:
        return self._take("alignment", Needs.ALIGNMENT)

    def reference_gradient(self) -> Tensor:
        return self._take("reference", Needs.ALIGNMENT)

    def _rows(self, coefficients: Tensor) -> Tensor:
        return torch.einsum("tb,tbn->tn", coefficients, self.problem.rows)

    def _take(self, name: str, need: Needs) -> Tensor:
        self._mark(need, name)
        if name not in self.values:
            value: Tensor = getattr(self.problem, name)
            self.values[name] = value.clone()
        return self.values[name]

    def _mark(self, need: Needs, name: str) -> None:
        self.read |= need
        if need not in self._allowed:
            raise MTLWeightError(f"read {name}, which was not announced for this step")


class AfterStep(Statistics):
    """The statistics after the step: the losses alone."""

    def losses(self) -> Tensor:
        after = self.problem.after
        return super().losses() if after is None else after.clone()


def show(values: Tensor) -> str:
    """A tensor as a person writes it: small integers, times a power of ten where that makes it shorter."""
    numbers = values.detach().double().cpu()
    sizes = [abs(x) for x in numbers.flatten().tolist() if x != 0 and math.isfinite(x)]
    exponent = 0
    if sizes and not (max(sizes) < 1e4 and min(sizes) > 1e-4):
        exponent = math.floor(math.log10(max(sizes)) + 1e-9)
        for lower in (exponent, exponent - 1, exponent - 2):
            if all(abs(x / 10.0**lower - round(x / 10.0**lower)) < 1e-6 and round(x / 10.0**lower) for x in sizes):
                exponent = lower
                break
        else:
            exponent = 0
    text = _nested((numbers / 10.0**exponent).tolist())
    return text if exponent == 0 else f"1e{exponent} * {text}"


def _nested(values: float | list[float]) -> str:
    if isinstance(values, list):
        return "[" + ", ".join(_nested(value) for value in values) + "]"
    if math.isfinite(values) and abs(values - round(values)) < 1e-6 * abs(values):
        return str(round(values)) if abs(values) < 1e6 else f"{values:.4g}"
    return f"{values:.6g}"
