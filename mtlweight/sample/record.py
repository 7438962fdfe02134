"""What each sample of a data set has weighed: to find mislabelled data."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight._report import Report


@dataclass
class SampleWeights:
    """A record of weights per sample by position in the data set, over epochs.

    Give it the optimizer's report after each step, with the positions of the batch's samples (let the data set return
    them). It keeps *relative* weights, ``w / mean(w)`` over all labelled samples of the batch's tasks: 1 is what a
    sample counts for if all count the same, whatever the batch's size and the weights' sum. Nothing is copied to the
    host before a result is asked for.

    >>> from mtlweight import Report
    >>> record = SampleWeights()
    >>> weights = torch.tensor([[0.5, 0.0, 0.5]])
    >>> shares = torch.full((1, 3), 1 / 3)
    >>> record.add(Report(step=1, tasks=("price",), weights=weights, shares=shares), index=[7, 2, 5])
    >>> record.table()[0]
    {'task': 'price', 'index': 2, 'seen': 1, 'dropped': 1, 'mean': 0.0, 'last': 0.0}
    >>> corrupted = torch.tensor([False, False, True, False, False, False, False, False])
    >>> record.auroc(corrupted, "price")
    1.0
    """

    _batches: list[tuple[tuple[str, ...], Tensor, Tensor, Tensor]] = field(default_factory=list, repr=False)
    _step: int = 0
    _last: Tensor | None = field(default=None, repr=False)

    def add(self, report: Report, index: Tensor | list[int]) -> None:
        """Records one step; the report that was recorded last, as it stands after a skipped step, is passed over.

        Args:
            report: ``optimizer.report`` after the step. Of several processes each records its own samples.
            index: ``[b]``, the samples' positions in the data set.

        Raises:
            MTLWeightError: if the weights are not per sample, or there are not as many positions as samples.
        """
        weights, shares = report.weights, report.shares
        again = weights is not None and self._last is not None and torch.equal(weights, self._last)
        if weights is None or (again and report.step == self._step):  # the first step was skipped, or a later one
            return
        if shares is None or weights.shape != shares.shape:
            raise MTLWeightError(
                "SampleWeights records weights per sample: expected a report of a step with a weighting such as "
                f"SLGrad, found weights of shape {list(weights.shape)}. Use such a "
                "weighting, and losses per sample."
            )
        index, own = torch.as_tensor(index, device=weights.device), report.own or slice(None)
        b = weights[:, own].shape[1]
        if index.shape != (b,):
            raise MTLWeightError(
                f"SampleWeights: expected one position for each of the {b} samples, found an index of shape "
                f"{list(index.shape)}. Let the data set return the position with each sample."
            )
        labelled = shares > 0
        mean = weights.sum() / labelled.sum()
        relative = weights / torch.where(mean == 0, 1.0, mean)
        self._batches.append((report.tasks, index, relative[:, own], labelled[:, own]))
        self._step, self._last = report.step, weights

    def history(self, task: str, index: int) -> list[float]:
        """The relative weights of one sample in one task, in the order in which it was seen."""
        positions, values = self._of(task)
        found: list[float] = values[positions == index].tolist()
        return found

    def table(self, task: str | None = None, *, skip: int = 0) -> list[dict[str, str | int | float]]:
        """One row for each sample that was seen: how often, how often its weight was 0, mean and last relative weight.

        Args:
            task: the task; all if left out.
            skip: how many of each sample's first times to leave out, when the model knew little.
        """
        rows: list[dict[str, str | int | float]] = []
        for name in self.tasks if task is None else (task,):
            positions, values = self._of(name, skip)
            index, inverse = positions.unique(return_inverse=True)
            seen = torch.bincount(inverse, minlength=len(index))
            dropped = torch.bincount(inverse, weights=(values == 0).double(), minlength=len(index))
            mean = torch.bincount(inverse, weights=values, minlength=len(index)) / seen
            latest = torch.zeros_like(index).scatter_reduce(0, inverse, torch.arange(len(inverse)), "amax")
            last = values[latest]
            columns = (index, seen, dropped.long(), mean, last)
            names = ("index", "seen", "dropped", "mean", "last")
            each = zip(*(column.tolist() for column in columns), strict=True)
            rows += [{"task": name, **dict(zip(names, row, strict=True))} for row in each]
        return rows

    def to_csv(self, path: str | Path, *, skip: int = 0) -> None:
        """Writes :meth:`table` of all tasks to a file of comma-separated values."""
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ("task", "index", "seen", "dropped", "mean", "last"))
            writer.writeheader()
            writer.writerows(self.table(skip=skip))

    def auroc(self, corrupted: Tensor | Mapping[int, bool], task: str, *, skip: int = 0) -> float:
        """How well a low mean weight finds corrupted samples: the probability that one has less than a clean one.

        1/2 is chance; ties count half.

        Args:
            corrupted: booleans by position in the data set.
            task: whose weights and labels.
            skip: as in :meth:`table`.

        Raises:
            MTLWeightError: if no corrupted or no clean sample was seen.
        """
        rows = self.table(task, skip=skip)
        try:
            bad = torch.tensor([bool(corrupted[int(row["index"])]) for row in rows])
        except LookupError as error:
            raise MTLWeightError(
                "SampleWeights: expected a truth value for each position that was seen, up to "
                f"{max(int(row['index']) for row in rows)}, found {len(corrupted)} values. Pass one a sample of the "
                "data set."
            ) from error
        if not bad.any() or bad.all():
            raise MTLWeightError(
                f"SampleWeights: expected corrupted and clean samples among the {len(rows)} seen in task {task!r}, "
                f"found {int(bad.sum())} corrupted ones. Record more batches, or look at the mask."
            )
        mean = torch.tensor([float(row["mean"]) for row in rows], dtype=torch.float64)
        _, inverse, counts = mean.unique(return_inverse=True, return_counts=True)
        ranks = (counts.cumsum(0) - (counts - 1) / 2)[inverse]  # of equal values their mean rank
        clean = int((~bad).sum())
        above = float(ranks[~bad].sum()) - clean * (clean + 1) / 2
        return above / (clean * int(bad.sum()))

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that were seen."""
        return tuple(dict.fromkeys(task for tasks, *_ in self._batches for task in tasks))

    def _of(self, task: str, skip: int = 0) -> tuple[Tensor, Tensor]:
        """Positions and relative weights in one task, in the order in which they were seen."""
        found = [
            (index[labelled[t]], relative[t][labelled[t]])
            for tasks, index, relative, labelled in self._batches
            for t, name in enumerate(tasks)
            if name == task
        ]
        if not found:
            raise MTLWeightError(
                f"SampleWeights: expected a task that was recorded ({', '.join(self.tasks) or 'none was'}), found "
                f"{task!r}. Record its steps first."
            )
        positions, values = (torch.cat(column).cpu() for column in zip(*found, strict=True))
        if skip:
            order = positions.argsort(stable=True)
            counts = positions[order].unique_consecutive(return_counts=True)[1]
            first = (counts.cumsum(0) - counts).repeat_interleave(counts)
            time = torch.empty_like(positions)
            time[order] = torch.arange(len(positions)) - first
            positions, values = positions[time >= skip], values[time >= skip]
        return positions, values.double()
