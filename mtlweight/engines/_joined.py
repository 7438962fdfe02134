"""A batch whose parts lie in several processes: the weights of the whole, the gradients of one's own part."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mtlweight._statistics import statistics_dtype
from mtlweight._view import Needs, View
from mtlweight._weighting import Level
from mtlweight.engines import _losses
from mtlweight.engines._batch import Batch
from mtlweight.engines._graph import Backward
from mtlweight.engines._inject import inject_known
from mtlweight.engines._plan import Plan
from mtlweight.engines._processes import Layout, Processes, sharded
from mtlweight.engines._reference import Reference
from mtlweight.engines._rows import Rows


class Joined(Batch):
    """The batches of all processes as one, of which this process has a part.

    Each counts its own losses by their share in the whole times the number of processes. Then everything of the whole
    batch is the *mean* over the processes of what each has: losses, rows, and the gradients that the user's
    ``DistributedDataParallel`` averages. So the scalar of :meth:`combined` gives this process's gradients alone.

    Args:
        evaluate: gives this process's part; its tasks may be without a label here.
        plan: how to measure.
        reference: computes the reference's gradient, if there is one.
        alignment: one ``[B]`` or scalar tensor a task of the whole batch, if it is known already.
    """

    def __init__(
        self,
        evaluate: Callable[[], Batch],
        plan: Plan,
        reference: Callable[[], Reference] | None = None,
        alignment: dict[str, Tensor] | None = None,
    ) -> None:
        part, layout = Layout.of(plan, evaluate, lambda batch: batch._losses)
        losses, masks = layout.masked(part._losses, part._plan.masks)
        empty = [task for task, mask in masks.items() if not mask.any()]
        super().__init__(losses, replace(plan, mask=masks), reference, alignment)
        self._part, self._layout, self._all = part, layout, part
        self._keep([task for task in losses if task not in empty])

    @property
    def _processes(self) -> Processes:
        return self._layout.processes

    def _keep(self, tasks: Sequence[str]) -> None:
        """Restricts it to these tasks, and says what each of the part's losses counts for."""
        gone = [task for task in self._part.tasks if task not in tasks]
        self._part = self._part.without(gone) if gone else self._part
        self._losses = {task: self._losses[task] for task in tasks}
        self.__dict__.pop("_stacked", None)
        self._plan = replace(self._plan, mask={task: self._plan.masks[task] for task in tasks if self._plan.masks})
        self._places = [tasks.index(task) for task in self._part.tasks]
        if not self._places:
            return
        count, layout = self._processes.count, self._layout
        if layout.per_sample:
            shares = _losses.shares(_losses.stack(self._losses), tasks, self._plan.masks)
            assert shares is not None
            self._part.means = count * shares[self._places, layout.own]
        else:
            holders = [layout.holders(task) for task in self._part.tasks]
            self._part.means = count / torch.tensor(holders, dtype=statistics_dtype(self.device), device=self.device)

    def without(self, tasks: Sequence[str]) -> Batch:
        """The batch as if these tasks were absent; what was measured of the others is kept."""
        batch = copy.copy(self)
        keep = [i for i, task in enumerate(self.tasks) if task not in tasks]
        batch._rows = None if self._rows is None else self._rows.subset(keep)
        batch._values = batch._gramian = None
        if self._aligned is not None:
            batch._aligned = {t: values for t, values in self._aligned.items() if t not in tasks}
        batch._keep([self.tasks[i] for i in keep])
        return batch

    def measured(self) -> dict[str, Any]:
        """What the report keeps."""
        return {**super().measured(), "own": self._layout.own if self._layout.per_sample else None}

    def penalty(self, objective: Callable[..., Tensor], view: View, environments: Any) -> Tensor | None:
        """The objective of this process's losses; their mean over the processes joins the step."""
        mine, told = self._processes.told(
            lambda: self._part.penalty(objective, view, environments) if self._places else None,
            lambda found: found is not None,
        )
        return None if mine is None else mine * (len(told) / sum(told))

    def agreed(self, value: Tensor) -> Tensor:
        """A value that each process has its own of, as their mean."""

        def fill(total: Tensor) -> None:
            total.copy_(value)

        return self._processes.total(fill, value) / self._processes.count

    def combined(self, weights: Tensor, writes: Level, penalty: Tensor | None = None) -> Tensor:
        """The scalar whose backward is this process's part of the weighted step.

        Its value is the plain sum of the tasks' losses over the whole batch.
        """
        means = self.losses() if self.losses().ndim == 1 else (self.shares() * self.losses()).sum(dim=1)
        if self._places:
            mine = weights[self._places]
            mine = self._processes.count * mine[:, self._layout.own] if writes == "sample" else mine
            scalar = self._part.combined(mine, writes, penalty)
        else:
            scalar = self._with_learnt(self.idle(), means.sum())
        if len(self._part.tasks) < len(self._all.tasks):  # who averages gradients waits for every parameter's
            had = {id(p) for p in Backward([scalar]).leaves}
            rest: list[tuple[Tensor, Tensor | None]] = [
                (p, torch.zeros_like(p)) for p in self._touched() if id(p) not in had
            ]
            scalar = scalar + inject_known(torch.zeros_like(scalar.detach()), rest)
        return means.sum().to(scalar) + (scalar - scalar.detach())

    def idle(self) -> Tensor:
        """Zero, with a backward that adds zeros to what this process's losses reach."""
        value = torch.zeros((), device=self._layout.device)
        return inject_known(value, [(p, torch.zeros_like(p)) for p in self._touched()])

    def _touched(self) -> list[Tensor]:
        # Sharded parameters are not in the graph, and no other process waits for them.
        mine = [] if sharded(self._plan.trainable) else Backward(self._all._losses.values()).leaves
        return mine or self._plan.trainable

    def _own(self, coefficients: Tensor | None) -> Tensor | None:
        """The part's coefficients for those of the whole batch."""
        if coefficients is None:
            return None
        return self._processes.count * coefficients[self._places, self._layout.own]

    def _measure(
        self, inputs: list[Tensor], coefficients: Tensor | None, engine: str, keep_graph: bool | None = None
    ) -> Rows:
        m, n = len(self.tasks), sum(p.numel() for p in inputs)
        mine = Rows.collect([], 0, inputs, [], coefficients, whole=Needs.JACOBIAN in self._plan.needs)
        like = torch.empty(m * n + 2, dtype=mine.dtype, device=inputs[0].device)

        def fill(vector: Tensor) -> None:
            nonlocal mine
            if self._places:
                mine = self._part._measure(inputs, self._own(coefficients), engine, keep_graph)
            rows = vector[:-2].view(m, n)
            for t, place in enumerate(self._places):
                for piece, found in zip(rows[place].split(mine.widths), mine.vectors(t), strict=True):
                    if found is not None:
                        piece.copy_(found)
            vector[-2:] = torch.tensor([mine.rounding, float(mine.reached)])

        total = self._processes.total(fill, like)
        if coefficients is None:
            self._part._rows = mine  # the step is made of these: other processes add theirs
        rounding, reached = total[-2:].tolist()
        whole = mine.like(total[:-2].view(m, n).div_(self._processes.count), coefficients, reached=reached > 0)
        whole.rounding = rounding / max(reached, 1)  # all that reach anything have the same
        return whole

    def _features(self, coefficients: Tensor | None) -> Tensor | None:
        m = len(self.tasks)

        def fill(vector: Tensor) -> None:
            found = self._part._features(self._own(coefficients)) if self._places else None
            if found is not None:
                vector[:-1].view(m, m)[[[i] for i in self._places], self._places] = found
                vector[-1] = 1

        # Representations of different samples are different coordinates, so that inner products add up.
        like = torch.empty(m * m + 1, dtype=statistics_dtype(self.device), device=self.device)
        total = self._processes.total(fill, like)
        return total[:-1].view(m, m) / self._processes.count**2 if total[-1] > 0 else None

    def _align(self) -> dict[str, Tensor]:
        self._with_reference()  # an exchange, which is not to be inside the next one
        (values,) = self._layout.joined(lambda: (self._part._aligned or self._part._align()) if self._places else {})
        return {task: values[task] for task in self.tasks}
