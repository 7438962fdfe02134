"""A record of what each sample of a data set has weighed and how it was aligned, to find mislabelled data."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mtlweight._checks import expect_count
from mtlweight._errors import MTLWeightError
from mtlweight._report import Report


class _Seen(NamedTuple):
    """One task's record in the order in which its samples were seen; tensors ``[k]``."""

    time: Tensor  # number of the recorded step
    position: Tensor
    weight: Tensor  # NaN without a label, until the record is settled
    alignment: Tensor  # NaN where none was measured

    def at(self, index: Tensor) -> _Seen:
        return _Seen(*(column[index] for column in self))


class _Table(NamedTuple):
    """The columns of :meth:`SampleWeights.table`, sorted by position."""

    position: Tensor
    seen: Tensor
    dropped: Tensor
    mean: Tensor
    last: Tensor
    opposed: Tensor
    alignment: Tensor


_COLUMNS = ("index", *_Table._fields[1:])  # `index` is a method of tuples
By = Literal["alignment", "weight"] | None
Row = dict[str, str | int | float | None]


@dataclass(eq=False)  # tensors do not compare to one truth
class SampleWeights:
    """A record of weights and alignments per sample, by position in the data set, over epochs.

    Give it the optimizer's report after each step, with the positions of the batch's samples (let the data set return
    them). It keeps *relative* weights, ``w / mean(w)`` over all labelled samples of the batch's tasks: 1 is the weight
    of a sample if all have the same, whatever the batch's size and the weights' sum. Where the weighting reads
    alignments, it keeps ``a / mean(|a|)`` over the same samples, since the norm of the reference's gradient varies from
    step to step. Nothing is copied to the host before a result is asked for.

    The values of a sample that is seen several times are averaged.

    Micro-batches of one step are recorded together, once after the step, with the positions of all of them in order.
    Of several processes each records its own samples; :meth:`merge` joins their records.

    >>> from mtlweight import Report
    >>> record = SampleWeights()
    >>> weights, alignment = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[-1.0, -2.0, 3.0]])
    >>> shares = torch.full((1, 3), 1 / 3)
    >>> report = Report(step=1, tasks=("price",), weights=weights, shares=shares, alignment=alignment)
    >>> record.add(report, index=[7, 2, 5])
    >>> record.rank("price")  # the most suspicious first
    [2, 7, 5]
    >>> record.to_table("price")[0]
    {'task': 'price', 'index': 2, 'seen': 1, 'dropped': 1, 'mean': 0.0, 'last': 0.0, 'opposed': 1.0, 'alignment': -1.0}
    >>> corrupted = torch.tensor([False, False, True, False, False, False, False, False])
    >>> record.auroc(corrupted, "price")
    1.0
    """

    _seen: dict[str, _Seen] = field(default_factory=dict, repr=False)
    _waiting: dict[str, list[_Seen]] = field(default_factory=dict, repr=False)  # still on the device
    _count: int = 0
    _step: int = 0
    _last: Tensor | None = field(default=None, repr=False)

    def add(self, report: Report, index: Tensor | list[int]) -> None:
        """Records one step. After a skipped step the report is still the last one, and is not recorded twice.

        Args:
            report: ``optimizer.report`` after the step.
            index: ``[b]``, the samples' positions in the data set: of all micro-batches, or parts, in their order.

        Raises:
            MTLWeightError: if the weights are not per sample, or ``index`` is not one whole number a sample. Nothing is
                recorded then.
        """
        if not isinstance(report, Report):
            raise MTLWeightError(
                f"SampleWeights: expected the optimizer's report, found {type(report).__name__}. Pass optimizer.report."
            )
        weights = report.weights
        last = self._last if report.step == self._step else None
        if weights is None or (last is not None and torch.equal(weights, last.to(weights.device))):
            return
        reports = [report]
        while reports[0].earlier is not None:
            reports.insert(0, reports[0].earlier)
        index = torch.as_tensor(index, device=weights.device)
        if index.numel() and (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool):
            raise MTLWeightError(
                f"SampleWeights: expected positions as whole numbers, found {index.dtype}. Let the data set return the "
                "position with each sample."
            )
        found = [_relative(each) for each in reports]
        sizes = [weight.shape[1] for weight, _ in found]
        if index.shape != (sum(sizes),):
            parts = f" of {len(sizes)} micro-batches" if len(sizes) > 1 else ""
            raise MTLWeightError(
                f"SampleWeights: expected one position for each of the {sum(sizes)} samples{parts}, found an index of "
                f"shape {list(index.shape)}. Let the data set return the position with each sample."
            )
        for each, part, columns in zip(reports, index.long().split(sizes), found, strict=True):
            time = torch.full_like(part, self._count)
            for task, weight, alignment in zip(each.tasks, *columns, strict=True):
                self._waiting.setdefault(task, []).append(_Seen(time, part, weight, alignment))
        self._count, self._step, self._last = self._count + 1, report.step, weights

    @classmethod
    def merge(cls, records: Iterable[SampleWeights]) -> SampleWeights:
        """Joins the records of several processes or workers, which stay as they are.

        The k-th steps of all are taken to be the same step. So processes that step together get the record that one
        process would have of the joined batches. To gather the records in every process:

            states = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, record.state_dict())
            whole = SampleWeights.merge(map(SampleWeights.from_state_dict, states))

        Args:
            records: in the order of the processes.

        Raises:
            MTLWeightError: if there is none, or one is no record.
        """
        records = [*records]
        wrong = next((type(record).__name__ for record in records if not isinstance(record, cls)), None)
        if not records or wrong is not None:
            raise MTLWeightError(
                f"SampleWeights.merge: expected records, found {wrong or 'none'}. Pass a list of SampleWeights; "
                "SampleWeights.from_state_dict makes one of what another process has sent."
            )
        merged = cls(_count=max(r._count for r in records), _step=records[0]._step, _last=records[0]._last)
        for task in dict.fromkeys(task for record in records for task in record.tasks):
            parts = [seen[task] for record in records if task in (seen := record._settled())]
            joined = _joined(parts)
            merged._seen[task] = joined.at(joined.time.argsort(stable=True))
        return merged

    def state_dict(self) -> dict[str, Any]:
        """All that was recorded. It loads with ``torch.load(weights_only=True)``."""
        seen = {task: found._asdict() for task, found in self._settled().items()}
        last = None if self._last is None else self._last.cpu()
        return {"count": self._count, "step": self._step, "last": last, "seen": seen}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Replaces the record by what :meth:`state_dict` returned.

        Raises:
            MTLWeightError: if it is anything else. The record stays as it was.
        """
        try:
            count, step, last = (state_dict[key] for key in ("count", "step", "last"))
            seen = {task: _Seen(**columns) for task, columns in state_dict["seen"].items()}
            fits = all(len({len(column) for column in found}) == 1 for found in seen.values())
        except (TypeError, KeyError, AttributeError):
            fits = False
        if not fits:
            raise MTLWeightError(
                "SampleWeights: expected a state dict of a SampleWeights, found "
                f"{', '.join(map(str, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict).__name__}. "
                "Pass what state_dict() returned."
            )
        self._count, self._step, self._last, self._seen, self._waiting = count, step, last, seen, {}

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any]) -> SampleWeights:
        """A new record that continues a :meth:`state_dict`."""
        record = cls()
        record.load_state_dict(state_dict)
        return record

    def history(self, task: str, index: int) -> list[float]:
        """The relative weights of one sample in one task, in the order in which it was seen."""
        found = self._of(task)
        values: list[float] = found.weight[found.position == index].tolist()
        return values

    def rank(self, task: str, *, by: By = None, skip: int = 0) -> list[int]:
        """The positions of all samples seen in a task, the most suspicious first.

        By alignment: by the share of times in which a sample's gradient opposed the reference's, largest first; then by
        the mean relative alignment, lowest first. By weight: by the mean relative weight, lowest first. Ties are in the
        order of the positions, samples without any alignment last.

        Each task has a rank of its own, since a label may be wrong in one task and right in another.

        Args:
            task: the task.
            by: ``"alignment"``; or ``"weight"``, which cannot tell apart samples that were always dropped. Default: the
                alignment, or the weight if the weighting reads no alignments.
            skip: how many of each sample's first times to leave out, when the model knew little. Default 0.

        Raises:
            MTLWeightError: if the task was not recorded, or has no alignments to rank by.
        """
        table, levels = self._ranked(task, by, skip)
        found: list[int] = table.position[levels.argsort(stable=True)].tolist()
        return found

    def to_table(self, task: str | None = None, *, by: By = None, skip: int = 0) -> list[Row]:
        """The rows of :meth:`table` in the order of :meth:`rank`, task after task."""
        rows: list[Row] = []
        for name in self.tasks if task is None else (task,):
            table = self.table(name, skip=skip)
            rows += [table[i] for i in self._ranked(name, by, skip)[1].argsort(stable=True)]
        return rows

    def table(self, task: str | None = None, *, skip: int = 0) -> list[Row]:
        """One row for each sample that was seen, in the order of their positions.

        ``seen`` is how often; ``dropped`` how often its weight was 0; ``mean`` and ``last`` are its mean and last
        relative weight; ``opposed`` is the share of times in which its alignment was negative, ``alignment`` the mean
        relative one: ``None`` if none was measured.

        Args:
            task: the task. Default: all.
            skip: as in :meth:`rank`.
        """
        rows: list[Row] = []
        for name in self.tasks if task is None else (task,):
            for row in zip(*(column.tolist() for column in self._table(name, skip)), strict=True):
                values = (None if value != value else value for value in row)  # NaN
                rows.append({"task": name, **dict(zip(_COLUMNS, values, strict=True))})
        return rows

    def to_csv(self, path: str | Path, *, skip: int = 0) -> None:
        """Writes :meth:`table` of all tasks to a CSV file."""
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ("task", *_COLUMNS))
            writer.writeheader()
            writer.writerows(self.table(skip=skip))

    def auroc(self, corrupted: Tensor | Mapping[int, bool], task: str, *, by: By = None, skip: int = 0) -> float:
        """The probability that :meth:`rank` has a corrupted sample before a clean one; 1/2 is chance, ties count half.

        Args:
            corrupted: booleans by position in the data set.
            task: whose weights, alignments and labels.
            by: as in :meth:`rank`.
            skip: as in :meth:`rank`.

        Raises:
            MTLWeightError: if no corrupted or no clean sample was seen, or :meth:`rank` raises.
        """
        table, levels = self._ranked(task, by, skip)
        seen: list[int] = table.position.tolist()
        try:
            if isinstance(corrupted, Tensor) and seen and seen[0] < 0:  # which would count from the end
                raise LookupError
            bad = torch.tensor([bool(corrupted[index]) for index in seen], dtype=torch.bool)
        except LookupError as error:
            raise MTLWeightError(
                "SampleWeights: expected a truth value for each position that was seen, up to "
                f"{seen[-1]}, found {len(corrupted)} values. Pass one a sample of the data set."
            ) from error
        if not bad.any() or bad.all():
            raise MTLWeightError(
                f"SampleWeights: expected corrupted and clean samples among the {len(seen)} seen in task {task!r}, "
                f"found {int(bad.sum())} corrupted ones. Record more batches, or look at the mask."
            )
        counts = levels.bincount()
        ranks = (counts.cumsum(0) - (counts - 1) / 2)[levels]  # ties have their mean rank
        clean = int((~bad).sum())
        above = float(ranks[~bad].sum()) - clean * (clean + 1) / 2
        return above / (clean * int(bad.sum()))

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that were seen."""
        return tuple(self._settled())

    def _settled(self) -> dict[str, _Seen]:
        """Each task's record of its labelled samples, on the host."""
        waiting, self._waiting = self._waiting, {}
        for task, parts in waiting.items():
            time, position, weight, alignment = (column.cpu() for column in _joined(parts))
            new = _Seen(time, position, weight.double(), alignment.double()).at(~weight.isnan())
            self._seen[task] = _joined([self._seen[task], new]) if task in self._seen else new
        return self._seen

    def _of(self, task: str, skip: int = 0) -> _Seen:
        """One task's record, without each sample's first ``skip`` times."""
        expect_count("SampleWeights", "skip", skip, 0)
        found = self._settled().get(task)
        if found is None:
            raise MTLWeightError(
                f"SampleWeights: expected a task that was recorded ({', '.join(self.tasks) or 'none was'}), found "
                f"{task!r}. Record its steps first."
            )
        if skip:
            order = found.position.argsort(stable=True)
            counts = found.position[order].unique_consecutive(return_counts=True)[1]
            first = (counts.cumsum(0) - counts).repeat_interleave(counts)
            times = torch.empty_like(order)
            times[order] = torch.arange(len(order)) - first
            found = found.at(times >= skip)
        return found

    def _table(self, task: str, skip: int) -> _Table:
        found = self._of(task, skip)
        index, inverse = found.position.unique(return_inverse=True)

        def total(values: Tensor) -> Tensor:
            return torch.bincount(inverse, weights=values.double(), minlength=len(index))

        seen = torch.bincount(inverse, minlength=len(index))
        latest = torch.zeros_like(index).scatter_reduce(0, inverse, torch.arange(len(inverse)), "amax")
        measured = total(~found.alignment.isnan())
        return _Table(
            index,
            seen,
            dropped=total(found.weight == 0).long(),
            mean=total(found.weight) / seen,
            last=found.weight[latest],
            opposed=total(found.alignment < 0) / measured,
            alignment=total(found.alignment.nan_to_num()) / measured,
        )

    def _ranked(self, task: str, by: By, skip: int) -> tuple[_Table, Tensor]:
        """The table, and integers that are smaller for more suspicious samples and equal where samples tie."""
        table = self._table(task, skip)
        if by not in ("alignment", "weight", None):
            raise MTLWeightError(f"SampleWeights: expected by='alignment' or 'weight', found {by!r}. Choose one.")
        measured = bool((~table.alignment.isnan()).any())
        if by == "alignment" and not measured:
            raise MTLWeightError(
                f"SampleWeights: expected alignments of task {task!r} to rank by, found none in the reports. Use a "
                "weighting that reads them per sample, such as SLGrad, or by='weight'."
            )
        keys = table.mean[:, None]
        if by == "alignment" or (by is None and measured):
            keys = torch.stack([(-table.opposed).nan_to_num(1.0), table.alignment.nan_to_num()], dim=1)
        return table, keys.unique(dim=0, return_inverse=True)[1]  # sorted by the first column, then the second


def _joined(parts: Sequence[_Seen]) -> _Seen:
    return _Seen(*map(torch.cat, zip(*parts, strict=True)))


def _relative(report: Report) -> tuple[Tensor, Tensor]:
    """This process's weights and alignments, divided by the whole batch's means; the weights NaN without a label."""
    weights, shares, alignment = report.weights, report.shares, report.alignment
    if weights is None or shares is None or weights.shape != shares.shape:
        shape = "nothing" if weights is None else f"weights of shape {list(weights.shape)}"
        raise MTLWeightError(
            "SampleWeights records weights per sample: expected a report of a step with a weighting such as "
            f"SLGrad, found {shape}. Use such a weighting, and losses per sample."
        )
    labelled = shares > 0
    if alignment is None or alignment.shape != weights.shape:
        alignment = torch.full_like(weights, torch.nan)
    alignment = alignment.to(weights.dtype)
    own, count = report.own or slice(None), labelled.sum()
    weight, aligned = (
        values / torch.where(total == 0, 1.0, total / count)
        for values, total in ((weights, weights.sum()), (alignment, alignment.abs().sum()))
    )
    return weight.where(labelled, torch.nan)[:, own], aligned[:, own]
