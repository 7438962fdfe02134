"""Losses of several processes: the weights of the whole batch, the gradients of one's own part."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight._statistics import statistics_dtype
from mtlweight._weighting import Level
from mtlweight.autograd.graph import Graph
from mtlweight.autograd.inject import inject_known
from mtlweight.batch import losses as given
from mtlweight.batch.in_parts import InParts
from mtlweight.batch.reference import Reference
from mtlweight.batch.source import Losses, Source
from mtlweight.batch.step import Step
from mtlweight.batch.whole import Whole
from mtlweight.distributed.processes import Processes
from mtlweight.distributed.sharded import sharded
from mtlweight.engines.jacobian import Rows

T = TypeVar("T")


class Joined:
    """The losses of all processes as those of one batch, of which this process has a part.

    Each counts its own losses by their share in the whole times the number of processes. Then everything of the whole
    batch is the *mean* over the processes of what each has: losses, rows, and the gradients that the user's
    ``DistributedDataParallel`` averages. So the scalar gives this process's gradients alone.
    See :class:`~mtlweight.batch.source.Source`.

    Args:
        evaluate: gives this process's part; its tasks may be without a label here.
        step: what was known before.
        reference: computes the gradient of the reference when it is first called; ``None`` if there is none.
        aligned: the alignments of the whole batch, if they are known.
    """

    def __init__(
        self,
        evaluate: Callable[[], Whole | InParts],
        step: Step,
        reference: Callable[[], Reference] | None = None,
        aligned: dict[str, Tensor] | None = None,
    ) -> None:
        part, self._layout = Layout.of(step, evaluate, lambda part: part.losses)
        losses, masks = self._layout.masked(part.losses, part.step.masks)
        self.step, self.reference, self.aligned = replace(step, mask=masks), reference, aligned
        self.own = self._layout.own if self._layout.per_sample else None
        self.device = self._layout.device
        self._every, self._part = part.losses, part
        self._mine: Rows | None = None  # what this process has of the rows of the tasks' means
        self._keep(losses, [task for task, mask in masks.items() if not mask.any()])

    def _keep(self, losses: Losses, gone: Sequence[str]) -> None:
        """Restricts it to the other tasks, and says what each of the part's losses counts for."""
        self.losses = {task: loss for task, loss in losses.items() if task not in gone}
        part, layout, tasks = self._part.without(gone), self._layout, list(self.losses)
        self._places = [tasks.index(task) for task in part.losses]
        if self._places:
            shares = self.shares()
            if shares is None:
                holders = [layout.holders(task) for task in part.losses]
                means = 1 / torch.tensor(holders, dtype=statistics_dtype(self.device), device=self.device)
            else:
                means = shares[self._places, layout.own]
            part = part.counting(layout.processes.count * means)
        self._part = part

    def without(self, tasks: Sequence[str]) -> Joined:
        """The same as if these tasks were absent."""
        rest = copy.copy(self)
        if self.aligned is not None:
            rest.aligned = {task: values for task, values in self.aligned.items() if task not in tasks}
        if self._mine is not None and self._places:
            keep = [i for i, task in enumerate(self._part.losses) if task not in tasks]
            rest._mine = self._mine.subset(keep)
        rest._keep(self.losses, tasks)
        return rest

    def shares(self) -> Tensor | None:
        """What each sample counts for in its task's mean."""
        return given.shares(given.stack(self.losses), list(self.losses), self.step.masks)

    def _own(self, coefficients: Tensor | None) -> Tensor | None:
        """The part's coefficients for those of the whole batch."""
        if coefficients is None:
            return None
        return self._layout.processes.count * coefficients[self._places, self._layout.own]

    def gradients(self, coefficients: Tensor | None) -> Rows:
        """Over the shared parameters: the mean over the processes."""
        shared, processes = self.step.shared_for("gradients"), self._layout.processes
        self.step.expect_real(shared)
        m, n = len(self.losses), sum(p.numel() for p in shared)
        mine = Rows.collect([], 0, shared, whole=self.step.reads_jacobian)

        def fill(vector: Tensor) -> None:
            nonlocal mine
            if self._places:
                mine = self._part.gradients(self._own(coefficients))
            rows = vector[:-2].view(m, n)
            for t, place in enumerate(self._places):
                for piece, found in zip(rows[place].split(mine.widths), mine.vectors(t), strict=True):
                    if found is not None:
                        piece.copy_(found)
            vector[-2:] = torch.tensor([mine.rounding, float(mine.reached)])

        total = processes.total(fill, torch.empty(m * n + 2, dtype=mine.dtype, device=shared[0].device))
        if coefficients is None:
            self._mine = mine
        rounding, reached = total[-2:].tolist()
        joined = mine.like(total[:-2].view(m, n).div_(processes.count), reached=reached > 0)
        joined.rounding = rounding / max(reached, 1)  # all that reach anything have the same
        return joined

    def gramian_of_features(self, coefficients: Tensor | None) -> Tensor | None:
        """The Gramian at the shared representation.

        Representations of different samples are different coordinates, so that inner products add up.
        """
        m, processes = len(self.losses), self._layout.processes

        def fill(vector: Tensor) -> None:
            found = self._part.gramian_of_features(self._own(coefficients)) if self._places else None
            if found is not None:
                vector[:-1].view(m, m)[[[i] for i in self._places], self._places] = found
                vector[-1] = 1

        like = torch.empty(m * m + 1, dtype=statistics_dtype(self.device), device=self.device)
        total = processes.total(fill, like)
        return total[:-1].view(m, m) / processes.count**2 if total[-1] > 0 else None

    def alignments(self) -> dict[str, Tensor]:
        """``<∇ℓ, g_ref>`` by task, of the whole batch."""
        if self.aligned is None:
            assert self.reference is not None
            self.reference()  # an exchange, which is not to be inside the next one
            (values,) = self._layout.joined(lambda: self._part.alignments() if self._places else {})
            self.aligned = {task: values[task] for task in self.losses}
        return self.aligned

    def scalar(self, weights: Tensor, writes: Level, rows: Rows | None) -> Tensor:
        """The scalar whose backward is this process's part of the weighted step; its value is of the whole batch."""
        if self._places:
            mine = weights[self._places]
            mine = self._layout.processes.count * mine[:, self._layout.own] if writes == "sample" else mine
            scalar = self._part.scalar(mine, writes, None if rows is None else self._mine)
        else:
            scalar = self.idle()
        if len(self._part.losses) < len(self._every):  # who averages gradients waits for every parameter's
            had = {id(p) for p in Graph([scalar]).leaves}
            rest = [p for p in self._touched() if id(p) not in had]
            scalar = scalar + inject_known(torch.zeros_like(scalar.detach()), [(p, torch.zeros_like(p)) for p in rest])
        losses, shares = given.stack(self.losses), self.shares()
        value = losses.sum() if shares is None else (shares * losses).sum()
        return value.to(scalar) + (scalar - scalar.detach())

    def penalty(self, objective: Callable[[Source], Tensor]) -> Tensor | None:
        """The objective of this process's losses; their mean over the processes joins the step."""
        mine, told = self._layout.processes.told(
            lambda: self._part.penalty(objective) if self._places else None, lambda found: found is not None
        )
        return None if mine is None else mine * (len(told) / sum(told))

    def idle(self) -> Tensor:
        """Zero, with a backward that adds zeros to what this process's losses reach."""
        value = torch.zeros((), device=self.device)
        return inject_known(value, [(p, torch.zeros_like(p)) for p in self._touched()])

    def _touched(self) -> list[Tensor]:
        # Sharded parameters are not in the graph, and no other process waits for them.
        mine = [] if sharded(self.step.trainable) else Graph(self._every.values()).leaves
        return mine or self.step.trainable


class _Said(NamedTuple):
    """What a process tells of itself: ``stamp``, torch's seed, the tasks it has heard of, and what its losses are."""

    stamp: Mapping[str, Any]
    seed: int
    tasks: list[str]
    present: tuple[str, ...]
    size: int | None
    kinds: list[torch.dtype]


@dataclass(frozen=True)
class Layout:
    """Which process has which tasks, and how many samples.

    Args:
        processes: who takes part.
        tasks: of all of them.
        sizes: the number of samples in each; for scalar losses 1.
        present: the tasks that each has.
        per_sample: whether the losses come per sample.
        dtype: of the losses.
        device: of this process.
    """

    processes: Processes
    tasks: tuple[str, ...]
    sizes: tuple[int, ...]
    present: tuple[tuple[str, ...], ...]
    per_sample: bool
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, step: Step, work: Callable[[], T], losses: Callable[[T], Losses]) -> tuple[T, Layout]:
        """Computes this process's losses and asks what the others have.

        From then on tasks have the same places in all processes, and where no seed was given it is the first one's.

        Args:
            step: names the processes, and what must be the same in all of them.
            work: computes the losses.
            losses: takes them from what ``work`` gives.

        Raises:
            MTLWeightError: in all processes, if it failed in one; if their stamps differ; or if losses come per sample
                in some processes alone.
        """
        processes, draft, seed = step.processes, step.draft, torch.initial_seed()
        assert processes is not None
        device = step.trainable[0].device if step.trainable else torch.device("cpu")

        def tell(result: T) -> _Said:
            nonlocal device
            rows = losses(result)
            row = next(iter(rows.values()), None)
            device = device if row is None else row.device
            kinds = [row.dtype for row in rows.values()]
            size = None if row is None or row.ndim == 0 else len(row)
            return _Said(step.stamp, seed, draft.tasks, tuple(rows), size, kinds)

        result, told = processes.told(work, tell)
        for name, value in step.stamp.items():
            values = [said.stamp[name] for said in told]
            if any(other != value for other in values):
                raise MTLWeightError(
                    f"The processes take different steps: expected the same {name} in all of them, found "
                    f"{', '.join(dict.fromkeys(map(str, values)))}. Make the optimizers and the calls alike, and load "
                    "a checkpoint in every process."
                )
        draft.tasks = given.placed(step.stamp["tasks"], [said.tasks for said in told])
        draft.seed = told[0].seed if draft.seed is None else draft.seed
        sizes = [said.size for said in told if said.present]
        if any(size is None for size in sizes) and any(size is not None for size in sizes):
            raise MTLWeightError(
                "Expected losses of one kind in all processes, all scalars or all [b]; found both. Use the same "
                "reduction everywhere."
            )
        dtype = torch.float32
        for kind in (kind for said in told for kind in said.kinds):
            dtype = torch.promote_types(dtype, kind)
        layout = cls(
            processes,
            tuple(task for task in draft.tasks if any(task in said.present for said in told)),
            tuple((1 if said.size is None else said.size) if said.present else 0 for said in told),
            tuple(said.present for said in told),
            any(size is not None for size in sizes),
            dtype,
            device,
        )
        return result, layout

    @property
    def own(self) -> slice:
        """The columns of this process."""
        start = sum(self.sizes[: self.processes.rank])
        return slice(start, start + self.sizes[self.processes.rank])

    def joined(self, *work: Callable[[], Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Values per task, and per sample where losses are: side by side, or their mean over the processes with a task.

        Args:
            work: each gives this process's values; all are sent at once.
        """
        shape = (len(work), len(self.tasks), max([*self.sizes, 1]))

        def fill(values: Tensor) -> None:
            for block, compute in zip(values, work, strict=True):
                for task, row in compute().items():
                    block[self.tasks.index(task), : row.numel()] = row.detach().reshape(-1)

        like = torch.empty(shape, dtype=statistics_dtype(self.device), device=self.device)
        found = self.processes.gathered(fill, like)
        if self.per_sample:
            blocks = torch.cat([each[..., :size] for each, size in zip(found, self.sizes, strict=True)], dim=2)
        else:
            counts = torch.tensor([self.holders(task) for task in self.tasks], dtype=like.dtype, device=self.device)
            blocks = torch.stack(found).sum(dim=0)[..., 0] / counts
        return [dict(zip(self.tasks, block.to(self.dtype).unbind(), strict=True)) for block in blocks]

    def masked(self, losses: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], ...]:
        """The losses of all processes, and which samples have a label; nothing is masked among scalars."""
        present = {task: masks.get(task, torch.ones_like(loss)) for task, loss in losses.items()}
        every, there = self.joined(lambda: losses, lambda: present)
        return every, {task: mask.bool() for task, mask in there.items()} if self.per_sample else {}

    def holders(self, task: str) -> int:
        """How many processes have the task."""
        return sum(task in names for names in self.present)
