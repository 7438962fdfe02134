"""What a penalty is, what it may read of one batch, and how penalties are composed."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtlweight._errors import MTLWeightError, NonFiniteError
from mtlweight._view import View
from mtlweight.causal._environments import labels
from mtlweight.causal._selector import Call, ModuleSelector


class Seen:
    """What a penalty may read of one batch; each quantity is computed once, with its graph.

    Args:
        selector: the modules and their graph.
        losses: one ``[b]`` loss a task, with its graph.
        environments: as in ``combine``; see :func:`~mtlweight.causal._environments.labels`.
        view: step and random numbers, and which of the losses have a label.
    """

    def __init__(self, selector: ModuleSelector, losses: Mapping[str, Tensor], environments: Any, view: View) -> None:
        self.selector = selector
        self.losses = losses
        self.step = view.step
        self._environments = environments
        self._view = view
        self._calls = selector.calls(losses)

    @functools.cached_property
    def gates(self) -> Tensor:
        """``A``, ``[T, K]``."""
        return self.selector.gates()

    @functools.cached_property
    def modules(self) -> Tensor:
        """``Z``, ``[K, b, ...]``: the modules' outputs in all forward passes that the losses come from."""
        return torch.cat([call.modules for call in self._present()], dim=1)

    @property
    def samples(self) -> Mapping[str, Tensor]:
        """One ``[b]`` loss a task."""
        if any(loss.ndim != 1 for loss in self.losses.values()):
            raise MTLWeightError(
                "The penalty compares samples of several environments: expected a [b] loss for each task, found scalars"
                ". Compute the losses with reduction='none'."
            )
        return self.losses

    @functools.cached_property
    def sensitivity(self) -> Tensor:
        """``S[t, i, k] = ∂ℓ[t, i] / ∂A[t, k]``, ``[m, b, K]``, for the ``m`` tasks with a loss.

        It is the inner product of ``Z[k, i]`` with the gradient of ``ℓ[t, i]`` at the task's features, so one backward
        through the heads serves all tasks, samples and environments. If a head mixes samples, as BatchNorm does in
        training, it is the effect of a sample's features on the sum of the task's losses.
        """
        calls = self._present()
        unknown = next((task for task in self.losses if task not in self.selector.tasks), None)
        if unknown is not None:
            raise MTLWeightError(
                f"The selector has no task {unknown!r}: expected losses of {', '.join(self.selector.tasks)}. Name the "
                "task in ModuleSelector(modules, tasks)."
            )
        total = sum((loss.sum() for loss in self.samples.values()), start=self.gates.new_zeros(()))
        slopes = torch.autograd.grad(total, [call.mixed for call in calls], create_graph=True)
        parts: dict[str, list[Tensor]] = {task: [] for task in self.selector.tasks}
        for call, slope in zip(calls, slopes, strict=True):
            products = torch.einsum("tbd,kbd->tbk", _flat(slope), _flat(call.modules))
            for task, row in zip(call.tasks, products.unbind(), strict=True):
                parts[task].append(row)
        for task, loss in self.losses.items():
            found = sum(map(len, parts[task]))
            if found != len(loss) or not parts[task]:
                raise MTLWeightError(
                    f"Expected the {len(loss)} losses of task {task!r} to come from as many samples in the selector, "
                    f"found {found}. Compute each loss from the task's features."
                )
        return torch.stack([torch.cat(parts[task]) for task in self.losses])

    @functools.cached_property
    def environments(self) -> Tensor:
        """The label of each sample, ``[b]``, from 0 to the number of environments present less one."""
        first = next(iter(self.losses.values()))
        return labels(self._environments, first, lambda: self._view.generator)

    def risks(self) -> tuple[Tensor, Tensor]:
        """``R_t^e``, ``[e, m]``, and each environment's share in the task's mean over them, as :func:`means` says."""
        return self._means(torch.stack([*self.samples.values()]))

    def gradients(self) -> tuple[Tensor, Tensor]:
        """``∇_A R_t^e``, ``[e, m, K]``, and the shares."""
        return self._means(self.sensitivity)

    def note(self, name: str, value: Tensor | float) -> None:
        """Leaves a named value for ``optimizer.report.notes``."""
        self._view.note(name, value)

    def _means(self, values: Tensor) -> tuple[Tensor, Tensor]:
        shares = self._view.shares[[self._view.tasks.index(task) for task in self.losses]]
        return means(values, self.environments, (shares > 0).to(values.device))

    def _present(self) -> list[Call]:
        if not self._calls:
            raise MTLWeightError(
                "The penalty saw no forward pass of its selector in the losses' graph: expected losses computed "
                "through the selector in training mode, after the penalty was bound to it with .on(selector); "
                "found none. Call selector.train(), and compute the losses anew before each combine."
            )
        return self._calls


class Penalty(ABC):
    """A scalar that is added to the weighted losses: how far the modules and their graph are from what is wanted.

    A penalty is an immutable value. ``2.0 * a + b`` is one too, and so is ``warmup(steps, p)``. Bind it to a selector
    and give it to the optimizer: ``MultiTaskOptimizer(..., penalty=p.on(selector))``. Weightings do not weigh it.
    """

    @abstractmethod
    def parts(self, seen: Seen) -> dict[str, Tensor]:
        """Named scalars, with their graph, whose sum is the penalty."""

    def on(self, selector: ModuleSelector) -> Bound:
        """The penalty of this selector, for ``MultiTaskOptimizer(..., penalty=...)``."""
        return Bound(self, selector)

    def __mul__(self, factor: float) -> Penalty:
        return _Scaled(self, factor)

    __rmul__ = __mul__

    def __add__(self, other: Penalty) -> Penalty:
        return _Sum((*_terms(self), *_terms(other))) if isinstance(other, Penalty) else NotImplemented


class Bound:
    """A penalty and its selector: called with losses, it returns the scalar and notes its parts.

    Args:
        penalty: the penalty.
        selector: from now on it remembers its forward passes in training mode.
    """

    def __init__(self, penalty: Penalty, selector: ModuleSelector) -> None:
        if not isinstance(selector, ModuleSelector):
            raise MTLWeightError(
                f"A penalty looks at a ModuleSelector: expected one, found {type(selector).__name__}. Pass the "
                "selector itself."
            )
        self.penalty = penalty
        self.selector = selector
        selector.remembers = True

    def __call__(self, losses: Mapping[str, Tensor], view: View, environments: Any = None) -> Tensor:
        """The penalty of one batch.

        Args:
            losses: the tasks' losses, computed through the selector.
            view: step, random numbers and notes.
            environments: as in ``combine``.

        Raises:
            NonFiniteError: if a part is not finite.
        """
        seen = Seen(self.selector, losses, environments, view)
        with torch.enable_grad():
            parts = self.penalty.parts(seen)
        for name, value in parts.items():
            if not value.isfinite():
                raise NonFiniteError(
                    f"The penalty {name!r} is not finite: expected a finite number, found {value.item()}. Look at the "
                    "features' scale, or choose a smaller coefficient."
                )
            view.note(name, value)
        first = next(iter(losses.values()))
        return torch.stack([value.to(first.device) for value in parts.values()]).sum() if parts else first.new_zeros(())

    def __repr__(self) -> str:
        return f"{self.penalty!r}.on({type(self.selector).__name__})"


@dataclass(frozen=True)
class _Scaled(Penalty):
    inner: Penalty
    factor: float

    def __post_init__(self) -> None:
        if not 0 <= self.factor < math.inf:
            raise MTLWeightError(f"A penalty's coefficient: expected a finite number >= 0, found {self.factor}.")

    def parts(self, seen: Seen) -> dict[str, Tensor]:
        return {name: self.factor * value for name, value in self.inner.parts(seen).items()}

    def __repr__(self) -> str:
        inner = f"({self.inner!r})" if isinstance(self.inner, _Sum) else repr(self.inner)
        return f"{self.factor:g} * {inner}"


@dataclass(frozen=True)
class _Sum(Penalty):
    terms: tuple[Penalty, ...]

    def parts(self, seen: Seen) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for term in self.terms:
            for name, value in term.parts(seen).items():
                total[name] = total[name] + value if name in total else value
        return total

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.terms))


@dataclass(frozen=True)
class _Warmup(Penalty):
    steps: int
    inner: Penalty
    start: int

    def __post_init__(self) -> None:
        if self.steps < 1 or self.start < 0:
            raise MTLWeightError(
                f"warmup: expected steps >= 1 and start >= 0, found steps={self.steps} and start={self.start}."
            )

    def parts(self, seen: Seen) -> dict[str, Tensor]:
        factor = min(1.0, (seen.step - self.start) / self.steps)
        return {} if factor <= 0 else _Scaled(self.inner, factor).parts(seen)

    def __repr__(self) -> str:
        return f"warmup({self.steps}, {self.inner!r}" + (f", start={self.start})" if self.start else ")")


def warmup(steps: int, penalty: Penalty, *, start: int = 0) -> Penalty:
    """The penalty times ``min(1, (step - start) / steps)``, and 0 until ``start``.

    Counts committed steps. A penalty that is 0 is not computed. Use it for invariance in particular, which needs
    features that already predict something: IRM's authors switch it on late, too.

    Args:
        steps: length of the ramp; 1 is a switch.
        penalty: the penalty.
        start: the committed steps before the ramp begins.

    >>> from mtlweight.causal import Sparsity, warmup
    >>> warmup(100, 0.1 * Sparsity())
    warmup(100, 0.1 * Sparsity())
    """
    return _Warmup(steps, penalty, start)


def means(values: Tensor, environments: Tensor, labelled: Tensor) -> tuple[Tensor, Tensor]:
    """The means over the labelled samples of each environment. Linear in ``b``.

    Args:
        values: ``[m, b, ...]``, 0 where there is no label.
        environments: ``[b]``, from 0 to their number less one.
        labelled: ``[m, b]``.

    Returns:
        tuple: the means, ``[e, m, ...]``; and the shares ``[e, m]``, with as many dimensions as the means: equal for
            the environments where a task has a label, with sum 1, and 0 elsewhere.
    """
    count = int(environments.max()) + 1
    by_sample = values.transpose(0, 1)
    sums = by_sample.new_zeros(count, *by_sample.shape[1:]).index_add(0, environments, by_sample)
    counts = sums.new_zeros(count, len(values)).index_add(0, environments, labelled.T.to(sums.dtype))
    counts = counts.reshape(*counts.shape, *[1] * (sums.ndim - 2))
    present = (counts > 0).to(sums.dtype)
    return sums / counts.clamp(min=1), present / present.sum(dim=0).clamp(min=1)


def _flat(values: Tensor) -> Tensor:
    """``[r, b, ...]`` to ``[r, b, d]``, in float32 at least."""
    return values[..., None].flatten(2).to(torch.promote_types(values.dtype, torch.float32))


def _terms(penalty: Penalty) -> tuple[Penalty, ...]:
    return penalty.terms if isinstance(penalty, _Sum) else (penalty,)
