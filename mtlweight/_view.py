"""What a weighting may read of one batch: each statistic lazily, once, and only if it was declared."""

from __future__ import annotations

import copy
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight._statistics import gramian_of, statistics_dtype

State: TypeAlias = "Mapping[str, Tensor | State]"
"""A weighting's state: nested mappings of tensors. Loads with ``torch.load(weights_only=True)``."""


class Needs(enum.Flag):
    """What a weighting reads. An engine computes exactly what is declared, once.

    ``SAMPLES`` together with ``LOSSES`` or ``ALIGNMENT`` asks for one value per task *and sample*.
    """

    NOTHING = 0
    LOSSES = enum.auto()
    GRAMIAN = enum.auto()
    JACOBIAN = enum.auto()
    ALIGNMENT = enum.auto()
    SAMPLES = enum.auto()


class Source(Protocol):
    """Where a view's values come from: an engine's measurements, or values given by hand.

    ``coefficients`` is ``None`` for the tasks' own losses (a ``[b]`` loss is averaged over the batch), or ``[m, b]``
    for the totals ``Σ_i c[t, i] ℓ[t, i]``. Losses, Gramian and alignment have ``statistics_dtype``. ``shares``,
    ``[m, b]``, are the coefficients of the averages, asked for only if losses or alignments are per sample. ``known``
    names all tasks that have a place, in order; ``tasks`` those of the rows.
    """

    @property
    def tasks(self) -> tuple[str, ...]: ...
    @property
    def known(self) -> tuple[str, ...]: ...
    @property
    def device(self) -> torch.device: ...
    def losses(self) -> Tensor: ...
    def shares(self) -> Tensor: ...
    def gramian(self, coefficients: Tensor | None) -> Tensor: ...
    def jacobian(self, coefficients: Tensor | None) -> Tensor: ...
    def alignment(self) -> Tensor: ...
    def reference_gradient(self) -> Tensor: ...


@dataclass
class _Shared:
    """What a view has in common with all views derived from it."""

    generator: torch.Generator | None = None
    notes: dict[str, Tensor | float] = field(default_factory=dict)


class View:
    """The statistics of one batch, as one weighting sees them.

    Args:
        source: where the values come from.
        step: number of committed steps before this one.
        seed: seed of :attr:`generator`, together with ``step``. Default ``None``: torch's, ``torch.initial_seed()``.
        needs: what may be read; anything else raises.

    Attributes:
        tasks: names of the tasks present in this batch, in the order of the rows, which is that of their places.
        known: names of all tasks that have a place, in order; absent ones too. A task gets its place when it is first
            mentioned, as a key of the mapping or a row of the tensor, whether or not it has a loss or a label then. It
            keeps it: in later batches, in micro-batches, in all processes, after a resume.
        step: number of committed steps before this one.
        notes: named tensors for ``optimizer.report``; write with :meth:`note`.
    """

    def __init__(
        self, source: Source, *, step: int = 0, seed: int | None = None, needs: Needs = ~Needs.NOTHING
    ) -> None:
        self.tasks, self.known = source.tasks, source.known
        self.step = step
        self._source = source
        self._seed = seed
        self._needs = needs
        self._shared = _Shared()
        # The weights so far: [m, b] on the samples' losses, then [m] on the tasks' totals, then [m, n] on their rows.
        self._samples: Tensor | None = None
        self._factors: Tensor | None = None
        self._entries: Tensor | None = None

    @property
    def places(self) -> tuple[int, ...]:
        """The place of each present task among :attr:`known`: what belongs to a task by position is looked up here."""
        return tuple([self.known.index(task) for task in self.tasks])

    @property
    def device(self) -> torch.device:
        """Where the statistics are, and where weights are expected."""
        return self._source.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of losses, Gramian and alignment, and the best one for weights."""
        return statistics_dtype(self.device)

    @property
    def notes(self) -> Mapping[str, Tensor]:
        """What the weightings noted for the report so far."""
        return {name: torch.as_tensor(value) for name, value in self._shared.notes.items()}

    @property
    def losses(self) -> Tensor:
        """The tasks' losses, ``[m]``; for losses per sample their mean, or the weighted total."""
        self._read(Needs.LOSSES, "losses")
        return self._total(self._source.losses())

    @property
    def sample_losses(self) -> Tensor:
        """The losses of each task and sample, ``[m, b]``."""
        self._read(Needs.LOSSES | Needs.SAMPLES, "sample_losses")
        return self._each(self._source.losses())

    @property
    def shares(self) -> Tensor:
        """Each sample's coefficient in its task's mean, ``[m, b]``: 0 without a label, else one over their number."""
        return self._source.shares()

    @property
    def gramian(self) -> Tensor:
        """``G = J Jᵀ``, ``[m, m]``: inner products of the tasks' gradients."""
        self._read(Needs.GRAMIAN, "gramian")
        if self._entries is not None:
            return gramian_of(self._rows())
        gramian = self._source.gramian(self._samples)
        return gramian if self._factors is None else self._factors[:, None] * gramian * self._factors

    @property
    def jacobian(self) -> Tensor:
        """``J``, ``[m, n]``: the tasks' gradients with respect to the shared parameters, in float32 or float64."""
        self._read(Needs.JACOBIAN, "jacobian")
        return self._rows()

    @property
    def alignment(self) -> Tensor:
        """``J g_ref``, ``[m]``: inner products of the tasks' gradients with the reference's gradient."""
        self._read(Needs.ALIGNMENT, "alignment")
        if self._entries is not None:
            return (self._rows() @ self._source.reference_gradient()).to(self.dtype)
        return self._total(self._source.alignment())

    @property
    def sample_alignment(self) -> Tensor:
        """``<∇ℓ[t, i], g_ref>``, ``[m, b]``: inner products of the samples' gradients with the reference's."""
        self._read(Needs.ALIGNMENT | Needs.SAMPLES, "sample_alignment")
        return self._each(self._source.alignment())

    @property
    def generator(self) -> torch.Generator:
        """Random numbers seeded from ``(seed, step)``: the same on all ranks, and nothing to save.

        Draw one number for each of :attr:`known` and take those at :attr:`places`, so that a draw belongs to a task,
        whoever is absent.
        """
        if self._shared.generator is None:
            seed = torch.initial_seed() if self._seed is None else self._seed
            # A multiplication by an odd constant, modulo 2^64, keeps neighbouring steps and seeds apart.
            mixed = (seed * 0x9E3779B97F4A7C15 + self.step * 0xD1342543DE82EF95) % (1 << 63)
            self._shared.generator = torch.Generator(self.device).manual_seed(mixed)
        return self._shared.generator

    def gather(self, table: Any, default: float | Tensor = 0.0) -> Tensor:
        """The present tasks' rows of a table in the state, ``[m, ...]``.

        Args:
            table: mapping from task name to a tensor, as :meth:`scatter` makes it.
            default: the row of a task that the table does not know yet.
        """
        missing = torch.as_tensor(default, dtype=None if isinstance(default, Tensor) else self.dtype)
        return torch.stack([table.get(task, missing).to(self.device) for task in self.tasks])

    def scatter(self, table: Any, values: Tensor) -> dict[str, Tensor]:
        """The table with the present tasks' rows replaced; absent tasks keep theirs."""
        # Each row is copied: a view would keep, and save, the rows of tasks that have gone.
        return {**table, **{task: row.clone() for task, row in zip(self.tasks, values.detach(), strict=True)}}

    def note(self, name: str, value: Tensor | float) -> None:
        """Leaves a named value for ``optimizer.report.notes``, such as a solver's residual."""
        self._shared.notes[name] = value.detach() if isinstance(value, Tensor) else value

    def restricted(self, needs: Needs) -> View:
        """The same view with ``needs`` alone readable."""
        return self._with(_needs=needs)

    def of(self, source: Source) -> View:
        """The same view of another batch, such as this process's part of one."""
        return self._with(_source=source, tasks=source.tasks, known=source.known)

    def scaled(self, weights: Tensor, writes: str | None = None) -> View:
        """The view of the weighted problem: losses, rows and alignment times ``weights``, Gramian ``w G wᵀ``.

        After weights per sample, ``[m, b]``, the tasks' losses and rows are their weighted totals.

        Args:
            weights: ``[m]``, ``[m, b]`` or ``[m, n]``.
            writes: ``"task"``, ``"sample"`` or ``"entry"``; told from the shape if left out.
        """
        writes = writes or self._level(weights)
        weights = weights.to(self.device, self.dtype)
        if writes == "task":
            return self._with(_factors=weights if self._factors is None else self._factors * weights)
        if writes == "sample":
            if self._entries is not None:
                raise MTLWeightError(MIXED_LEVELS)
            samples = weights if self._samples is None else self._samples * weights
            return self._with(_samples=_outer(self._factors, samples), _factors=None)
        if self._samples is not None:
            raise MTLWeightError(MIXED_LEVELS)
        return self._with(_entries=weights if self._entries is None else self._entries * weights)

    def _level(self, weights: Tensor) -> str:
        if weights.ndim == 1:
            return "task"
        losses = self._source.losses()
        return "sample" if losses.ndim == 2 and losses.shape == weights.shape else "entry"

    def _with(self, **changes: Any) -> View:
        view = copy.copy(self)
        view.__dict__.update(changes)
        return view

    def _read(self, needs: Needs, name: str) -> None:
        if needs & self._needs != needs:  # dynamo cannot trace `in` before Python 3.11
            declared = " | ".join(f"Needs.{need.name}" for need in Needs if need.value and need in needs)
            raise MTLWeightError(
                f"The weighting reads view.{name} but does not declare it. Expected {declared} in its `needs`, found "
                f"{self._needs}. Add the flag, so that an engine knows what to compute."
            )

    def _total(self, values: Tensor) -> Tensor:
        if values.ndim == 2:
            values = ((self.shares if self._samples is None else self._samples) * values).sum(dim=1)
        return values if self._factors is None else self._factors * values

    def _each(self, values: Tensor) -> Tensor:
        expect_samples(values, self.tasks)
        values = values if self._samples is None else self._samples * values
        return _outer(self._factors, values)

    def _rows(self) -> Tensor:
        rows = self._source.jacobian(self._samples)
        factors = None if self._factors is None else self._factors.to(rows.dtype)
        rows = _outer(factors, rows)
        return rows if self._entries is None else self._entries.to(rows.dtype) * rows


MIXED_LEVELS = (
    "A weighting per sample ([m, b]) and one per gradient entry ([m, n]) cannot be chained: no single weight tensor "
    "broadcasts to both. Expected at most one of the two levels in a chain, found both. Use weightings per task ([m]) "
    "beside one of them."
)


def expect_samples(values: Tensor, tasks: tuple[str, ...]) -> None:
    """Raises if values are per task."""
    if values.ndim == 1:
        raise MTLWeightError(
            f"A weighting per sample needs losses per sample: expected a [b] loss for each task, found scalars for "
            f"{', '.join(tasks)}. Compute the losses with reduction='none'."
        )


def _outer(factors: Tensor | None, values: Tensor) -> Tensor:
    return values if factors is None else factors[:, None] * values
