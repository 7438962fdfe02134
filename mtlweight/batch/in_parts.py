"""Losses in parts: the weights of the whole batch, the memory of one part."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight._weighting import Level
from mtlweight.autograd.graph import Graph
from mtlweight.autograd.half_precision import wide
from mtlweight.autograd.inject import inject_known
from mtlweight.autograd.replay import snapshot
from mtlweight.batch import losses as given
from mtlweight.batch.evaluate import evaluated
from mtlweight.batch.reference import Reference
from mtlweight.batch.source import Source
from mtlweight.batch.step import Step
from mtlweight.batch.whole import Whole
from mtlweight.engines.jacobian import Rows


class InParts:
    """Losses in parts, one callable each, so that one part's graph is in memory at a time.

    The first pass takes the losses and alignments; each later one replays the parts, with the same dropout masks and
    buffers, and adds up gradients. See :class:`~mtlweight.batch.source.Source`.

    Args:
        parts: one callable a part.
        step: what was known before; its mask is a list too, or ``None``.
        reference: computes the gradient of the reference when it is first called; ``None`` if there is none.
        aligned: the alignments over all parts, if they are known.
    """

    own = None

    def __init__(
        self,
        parts: Sequence[Callable[[], Any]],
        step: Step,
        reference: Callable[[], Reference] | None = None,
        aligned: dict[str, Tensor] | None = None,
    ) -> None:
        self.reference, self.aligned = reference, aligned
        self._means: Tensor | None = None
        self._closures, self._steps, self._rewind = list(parts), step.split(len(parts)), snapshot(step.settings.modules)
        compare = aligned is None and reference is not None and step.compares
        losses: list[dict[str, Tensor]] = []
        alignments: list[dict[str, Tensor]] = []
        for closure, each in zip(self._closures, self._steps, strict=True):
            part = evaluated(closure, reference if compare else None, each)
            losses.append({task: loss.detach() for task, loss in part.losses.items()})
            alignments.append(part.alignments() if compare and part.losses else {})
        step.draft.tasks = given.placed(step.draft.tasks, [each.draft.tasks for each in self._steps])
        some = next((row for part in losses for row in part.values()), torch.zeros(0))
        rows = [next(iter(part.values()), some.new_zeros(0)) for part in losses]  # a part may have no task at all
        if any(row.ndim == 0 for row in rows):
            raise MTLWeightError(
                "Losses in parts come per sample, so that means are over the whole batch: expected [b] losses, found "
                "scalars. Compute the losses with reduction='none'."
            )
        self._sizes = [len(row) for row in rows]
        self.device = some.device
        labelled = [each.labelled(part) for each, part in zip(self._steps, losses, strict=True)]
        self.step = replace(step, mask=given.join(labelled, step.draft.tasks))
        self.losses: Mapping[str, Tensor] = given.join(losses, step.draft.tasks)
        if compare:
            self.aligned = given.join(alignments, step.draft.tasks)

    def without(self, tasks: Sequence[str]) -> InParts:
        """The same as if these tasks were absent."""
        rest = copy.copy(self)
        rest.losses = {task: loss for task, loss in self.losses.items() if task not in tasks}
        if self._means is not None:
            rest._means = self._means[[i for i, task in enumerate(self.losses) if task not in tasks]]
        if self.aligned is not None:
            rest.aligned = {task: values for task, values in self.aligned.items() if task not in tasks}
        return rest

    def counting(self, means: Tensor) -> InParts:
        """The same, where each loss counts for so much in its task's total."""
        changed = copy.copy(self)
        changed._means = means
        return changed

    def shares(self) -> Tensor:
        """What each sample counts for in its task's mean."""
        if self._means is not None:
            return self._means
        shares = given.shares(given.stack(self.losses), list(self.losses), self.step.masks)
        assert shares is not None
        return shares

    def gradients(self, coefficients: Tensor | None) -> Rows:
        """Over the shared parameters."""
        total: Rows | None = None
        for part, columns in self._replayed(self.shares() if coefficients is None else coefficients):
            found = part.gradients(columns)
            total = found.zero(len(self.losses)) if total is None else total
            total.add(self._places(part), found)
        assert total is not None
        return total

    def gramian_of_features(self, coefficients: Tensor | None) -> None:
        """There is none: the features engine refuses losses in parts."""

    def alignments(self) -> dict[str, Tensor]:
        """Of a weighting that compares though it had not announced it for this step."""
        if self.aligned is None:
            found = [part.alignments() for part, _ in self._replayed(self.shares())]
            self.aligned = given.join(found, list(self.losses))
        return self.aligned

    def scalar(self, weights: Tensor, writes: Level, rows: Rows | None) -> Tensor:
        """The scalar whose backward hands out what replaying the parts adds up."""
        if writes == "entry":
            raise MTLWeightError(
                f"{self.step.settings.name} writes weights per gradient entry: expected the losses of the whole batch "
                "at once, found them in parts. Pass one callable; or take "
                "accumulate(k, weigh='each'), or a weighting per task or per sample."
            )
        shares = self.shares()
        coefficients = weights if writes == "sample" else weights[:, None] * shares
        total: dict[Tensor, Tensor] = {}
        for part, columns in self._replayed(torch.stack([coefficients, shares])):
            terms = part.stacked
            sums = Graph((column.to(terms.dtype) * terms).sum() for column in columns)
            for p, g in part.step_gradients(sums):
                if g is not None:
                    total[p] = total[p] + g if p in total else wide(g)
        return inject_known((shares * given.stack(self.losses)).sum(), [*total.items()])

    def penalty(self, objective: Callable[[Source], Tensor]) -> Tensor:
        """There is none: each part's graph has been freed."""
        raise MTLWeightError(
            "A penalty needs the graph of the whole batch: expected the losses at once, found them in parts. Pass "
            "one callable."
        )

    def idle(self) -> Tensor:
        """Zero, with a backward that adds zeros to all parameters."""
        return self.step.idle()

    def _places(self, part: Whole) -> list[int]:
        tasks = list(self.losses)
        return [tasks.index(task) for task in part.losses]

    @torch.enable_grad()  # a weighting, which may be the first to ask, runs without gradients
    def _replayed(self, values: Tensor) -> Iterator[tuple[Whole, Tensor]]:
        """Each part that has tasks, once more, as it was the first time; with its tasks and columns of the values.

        Args:
            values: ``[..., m, b]``.
        """
        self._rewind()
        starts = itertools.accumulate(self._sizes, initial=0)
        for closure, step, start, size in zip(self._closures, self._steps, starts, self._sizes, strict=False):
            losses = {task: loss for task, loss in step.named(closure()).items() if task in self.losses}
            for task, loss in losses.items():
                first = self.losses[task][start : start + size]
                if loss.shape != first.shape or not torch.allclose(
                    loss.detach(), first, 1e-2, 1e-2 * float(first.abs().max())
                ):
                    raise MTLWeightError(
                        f"Losses in parts are evaluated twice: expected the same ones each time, found others of task "
                        f"{task!r}. Take the data outside the callable: lambda batch=batch: losses(model, batch)."
                    )
            if losses:
                part = Whole(losses, step, self.reference)
                yield part, values[..., self._places(part), start : start + size]
