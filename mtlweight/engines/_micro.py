"""A batch in parts: the weights of the whole, the memory of one."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight._view import Needs
from mtlweight._weighting import Level
from mtlweight.engines import _losses
from mtlweight.engines._again import snapshot
from mtlweight.engines._batch import Batch
from mtlweight.engines._evaluate import evaluated
from mtlweight.engines._graph import Backward
from mtlweight.engines._inject import inject_known
from mtlweight.engines._plan import Plan
from mtlweight.engines._range import gradient, wide
from mtlweight.engines._reference import Reference
from mtlweight.engines._rows import Rows


class MicroBatches(Batch):
    """A batch whose losses come in parts, one callable each, so that one part's graph is in memory at a time.

    The first pass takes the losses and alignments; each later one draws the same dropout masks and begins with the same
    buffers, and adds up gradients.

    Args:
        parts: one callable a part.
        plan: how to measure; its mask is a list too, or ``None``.
        reference: computes the reference's gradient, if there is one.
        alignment: one ``[b]`` tensor a task over all parts, if it is known already.
    """

    def __init__(
        self,
        parts: Sequence[Callable[[], Any]],
        plan: Plan,
        reference: Callable[[], Reference] | None = None,
        alignment: dict[str, Tensor] | None = None,
    ) -> None:
        self._closures = list(parts)
        self._plans = plan.split(len(parts))
        self._rewind = snapshot(plan.modules)
        compare = alignment is None and reference is not None and Needs.ALIGNMENT in plan.needs
        losses: list[dict[str, Tensor]] = []
        aligned: list[dict[str, Tensor]] = []
        for closure, each in zip(self._closures, self._plans, strict=True):
            part = evaluated(closure, reference, each) if compare else Batch(each.named(closure()), each)
            losses.append({task: loss.detach() for task, loss in part._losses.items()})
            aligned.append((part._aligned or part._align()) if compare and part.tasks else {})
        plan.agreed.tasks = _losses.placed(plan.tasks, [each.tasks for each in self._plans])
        some = next((row for part in losses for row in part.values()), torch.zeros(0))
        rows = [next(iter(part.values()), some.new_zeros(0)) for part in losses]  # a part may have no task at all
        if any(row.ndim == 0 for row in rows):
            raise MTLWeightError(
                "Losses in parts come per sample, so that means are over the whole batch: expected [b] losses, found "
                "scalars. Compute the losses with reduction='none'."
            )
        self._sizes = [len(row) for row in rows]
        present = [each.labelled(part) for each, part in zip(self._plans, losses, strict=True)]
        whole = replace(plan, mask=_losses.join(present, plan.tasks))
        if compare:
            alignment = _losses.join(aligned, plan.tasks)
        super().__init__(_losses.join(losses, plan.tasks), whole, reference, alignment)

    def without(self, tasks: Sequence[str]) -> Batch:
        """The batch as if these tasks were absent."""
        batch = copy.copy(self)
        batch.__dict__.pop("_stacked", None)
        batch._losses = {t: loss for t, loss in self._losses.items() if t not in tasks}
        if self._aligned is not None:
            batch._aligned = {t: values for t, values in self._aligned.items() if t not in tasks}
        batch._rows = batch._values = batch._gramian = None
        return batch

    @property
    def graphs(self) -> Mapping[str, Tensor]:
        """The losses of all parts. Each part's graph has been freed."""
        if self._plan.penalised:
            raise MTLWeightError(
                "A penalty needs the graph of the whole batch: expected the losses at once, found them in parts. Pass "
                "one callable."
            )
        return self._losses

    def combined(self, weights: Tensor, writes: Level, penalty: Tensor | None = None) -> Tensor:
        """The scalar whose backward is the weighted step, and whose value is the plain sum of the tasks' losses."""
        assert penalty is None  # refused above
        if writes == "entry":
            raise MTLWeightError(
                f"{self._plan.name} writes weights per gradient entry: expected the losses of the whole batch at once, "
                "found them in parts. Pass one callable; or take "
                "accumulate(k, weigh='each'), or a weighting per task or per sample."
            )
        shares = self.shares()
        coefficients = weights if writes == "sample" else weights[:, None] * shares
        total: dict[Tensor, Tensor] = {}
        for part, columns, plain in zip(
            self._again(), *(x.split(self._sizes, dim=1) for x in (coefficients, shares)), strict=True
        ):
            if not part:
                continue
            terms = _losses.stack(part)
            chosen = [self.tasks.index(task) for task in part]
            sums = [(x[chosen].to(terms.dtype) * terms).sum() for x in (columns, plain)]
            if self._plan.heads == "unweighted" and self._plan.shared is not None:
                pairs = self._two_backwards(*sums)
            else:
                graph = Backward(sums[:1])
                reached = graph.leaves
                with self._plan.measuring():
                    found = gradient(sums[0], reached, keep_graph=False, narrow=graph.narrow)
                pairs = [*zip(reached, found, strict=True)]
            for p, g in self._inner(pairs):
                if g is not None:
                    total[p] = total[p] + g if p in total else wide(g)
        value = (shares * self.losses()).sum()
        return self._with_learnt(inject_known(value, [*total.items()]), value)

    @torch.enable_grad()  # weigh runs without gradients, measuring needs them
    def _align(self) -> dict[str, Tensor]:
        """Of a weighting that compares though it had not announced it for this step."""
        pairs = zip(self._again(), self._plans, strict=True)
        aligned = [Batch(part, plan, self._reference)._align() if part else {} for part, plan in pairs]
        return _losses.join(aligned, self.tasks)

    @torch.enable_grad()  # as above
    def _measure(
        self, inputs: list[Tensor], coefficients: Tensor | None, engine: str, keep_graph: bool | None = None
    ) -> Rows:
        each = self.shares() if coefficients is None else coefficients
        total: Rows | None = None
        for part, plan, columns in zip(self._again(), self._plans, each.split(self._sizes, dim=1), strict=True):
            if not part:
                continue
            places = [self.tasks.index(task) for task in part]
            found = Batch(part, plan)._measure(inputs, columns[places], engine, keep_graph)
            if total is None:
                total = found.zero(len(self.tasks), coefficients)
            total.add(places, found)
        assert total is not None
        return total

    def _again(self) -> Iterator[dict[str, Tensor]]:
        """Each part's losses once more, with their graph; as they were the first time."""
        self._rewind()
        starts = itertools.accumulate(self._sizes, initial=0)
        for closure, plan, start, size in zip(self._closures, self._plans, starts, self._sizes, strict=False):
            losses = {task: loss for task, loss in plan.named(closure()).items() if task in self._losses}
            for task, loss in losses.items():
                first = self._losses[task][start : start + size]
                if loss.shape != first.shape or not torch.allclose(
                    loss.detach(), first, 1e-2, 1e-2 * float(first.abs().max())
                ):
                    raise MTLWeightError(
                        f"Losses in parts are evaluated twice: expected the same ones each time, found others of task "
                        f"{task!r}. Take the data outside the callable: lambda batch=batch: losses(model, batch)."
                    )
            yield losses
