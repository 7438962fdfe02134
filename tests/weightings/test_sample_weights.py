"""SampleWeights: what each sample has weighed, and how well a low weight finds mislabelled ones."""

import copy
import csv
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtlweight import MTLWeightError, Report, SampleWeights, SLGrad
from tests.problems import Problem, same, step, wrap


def report(number, rows, shares=None, tasks=("left", "right"), **more):
    weights = torch.tensor(rows, dtype=torch.float64)
    shares = torch.full_like(weights, 1 / weights.shape[1]) if shares is None else torch.tensor(shares)
    return Report(step=number, tasks=tasks[: len(rows)], weights=weights, shares=shares, **more)


def aligned(number, rows, **more):
    """A report of the weights that SLGrad makes of these alignments."""
    alignment = torch.tensor(rows, dtype=torch.float64)
    weights = SLGrad("left")(alignment=alignment)
    return report(number, weights.tolist(), alignment=alignment, **more)


def recorded():
    record = SampleWeights()
    record.add(report(1, [[0.4, 0.0], [0.2, 0.2]]), [3, 1])
    record.add(report(2, [[0.0, 0.4], [0.0, 0.0]]), [1, 3])
    return record


def test_weights_are_kept_in_units_of_an_equal_share():
    record = recorded()
    assert record.tasks == ("left", "right")
    assert record.history("left", 3) == [2.0, 4.0]
    assert record.history("right", 1) == [1.0, 0.0]
    assert record.history("left", 9) == []


def test_the_table_has_a_row_for_each_sample_and_task():
    rows = recorded().table()
    unknown = {"opposed": None, "alignment": None}
    assert rows[0] == {"task": "left", "index": 1, "seen": 2, "dropped": 2, "mean": 0.0, "last": 0.0, **unknown}
    assert rows[1] == {"task": "left", "index": 3, "seen": 2, "dropped": 0, "mean": 3.0, "last": 4.0, **unknown}
    assert rows[2:] == [
        {"task": "right", "index": 1, "seen": 2, "dropped": 1, "mean": 0.5, "last": 0.0, **unknown},
        {"task": "right", "index": 3, "seen": 2, "dropped": 1, "mean": 0.5, "last": 0.0, **unknown},
    ]
    assert recorded().table("right") == rows[2:]


def test_a_step_after_going_back_to_a_checkpoint_is_another_one_though_it_has_the_same_number():
    record = recorded()
    record.add(report(2, [[0.25, 0.75]]), [5, 6])
    assert record.history("left", 6) == [1.5]


def test_what_was_not_recorded_is_named():
    record = recorded()
    for ask in (record.history, lambda task, _: record.table(task), lambda task, _: record.auroc(torch.ones(9), task)):
        with pytest.raises(MTLWeightError, match=r"expected a task that was recorded \(left, right\), found 'top'"):
            ask("top", 1)
    with pytest.raises(MTLWeightError, match=r"each position that was seen, up to 3, found 2 values\. Pass"):
        record.auroc(torch.tensor([True, False]), "left")


def test_the_first_times_can_be_left_out():
    record = recorded()
    record.add(report(3, [[0.5, 0.5]]), [1, 8])  # this one is new
    rows = record.table("left", skip=1)
    assert [(row["index"], row["seen"], row["mean"]) for row in rows] == [(1, 2, 0.5), (3, 1, 4.0)]


def test_it_is_written_as_comma_separated_values(tmp_path):
    record = recorded()
    record.to_csv(tmp_path / "weights.csv")
    with (tmp_path / "weights.csv").open() as file:
        rows = [*csv.DictReader(file)]
    table = [{key: "" if value is None else str(value) for key, value in row.items()} for row in record.table()]
    assert table == rows


def test_a_sample_without_a_label_is_not_seen_in_that_task():
    record = SampleWeights()
    record.add(report(1, [[0.5, 0.0], [0.3, 0.2]], shares=[[1.0, 0.0], [0.5, 0.5]]), [0, 1])
    assert [row["index"] for row in record.table("left")] == [0]
    assert record.history("left", 0) == pytest.approx([1.5])  # three labels share 1


def test_a_report_is_recorded_once():
    record, last = recorded(), report(3, [[0.25, 0.75]])
    record.add(last, [5, 6])
    record.add(replace(last, skipped=1), [7, 8])  # the step was skipped: the report is the last one's
    assert record.history("left", 5) == [0.5]
    assert record.history("left", 7) == []
    copied = copy.deepcopy(record)
    copied.add(replace(copy.deepcopy(last), skipped=1), [7, 8])
    assert copied.history("left", 7) == []


def test_a_first_step_that_was_skipped_is_nothing_to_record():
    record = SampleWeights()
    record.add(Report(skipped=1), [7, 8])
    record.add(Report(step=5, skipped=1), [7, 8])  # after a resume
    assert record.tasks == ()


def test_no_weight_at_all_is_zero_for_all():
    record = SampleWeights()
    record.add(report(1, [[0.0, 0.0]]), [0, 1])
    assert record.history("left", 0) == [0.0]


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=2, max_size=12))
def test_auroc_is_the_probability_that_a_corrupted_sample_has_less_weight_than_a_clean_one(samples):
    values, bad = [v for v, _ in samples], [b for _, b in samples]
    record = SampleWeights()
    record.add(report(1, [[float(v) for v in values]]), list(range(len(values))))
    if all(bad) or not any(bad):
        with pytest.raises(MTLWeightError, match="expected corrupted and clean samples"):
            record.auroc(torch.tensor(bad), "left")
        return
    pairs = [(v, w) for v, b in samples if b for w, c in samples if not c]
    expected = sum((v < w) + 0.5 * (v == w) for v, w in pairs) / len(pairs)
    assert record.auroc(torch.tensor(bad), "left") == pytest.approx(expected)
    assert record.auroc(dict(enumerate(bad)), "left") == pytest.approx(expected)


def test_it_takes_the_optimizers_report():
    p, record = Problem(), SampleWeights()
    optimizer = wrap(p, SLGrad("left"), shared=p.encoder)
    step(optimizer, p.samples, reference=p.reference, mask={"right": torch.arange(6) > 2})
    record.add(optimizer.report, torch.arange(10, 16))
    assert [row["index"] for row in record.table("right")] == [13, 14, 15]
    total = sum(row["mean"] for row in record.table())
    assert total == pytest.approx(9.0)


def test_samples_that_were_always_dropped_are_ranked_by_how_negative_their_alignment_was():
    record = SampleWeights()
    record.add(aligned(1, [[-1.0, -4.0, 2.0, -4.0, 1.0, 0.0]]), [9, 8, 1, 3, 2, 5])
    assert record.rank("left") == [3, 8, 9, 5, 2, 1]
    assert record.rank("left", by="weight") == [3, 5, 8, 9, 2, 1]  # four tie: in the order of their positions
    assert [row["index"] for row in record.to_table()] == record.rank("left")


def test_what_opposed_the_reference_more_often_comes_first_then_what_opposed_it_more():
    record = SampleWeights()
    for k, rows in enumerate([[[-1.0, 1.0, -9.0, -2.0]], [[-1.0, 1.0, 9.0, -1.0]]], 1):
        record.add(aligned(k, rows), [0, 1, 2, 3])
    assert record.rank("left") == [3, 0, 2, 1]
    assert [row["opposed"] for row in record.to_table("left")] == [1.0, 1.0, 0.5, 0.0]
    assert record.rank("left", skip=1) == [0, 3, 1, 2]


batches = st.lists(
    st.lists(st.sampled_from([-3.0, -1.0, -0.5, 0.0, 0.25, 2.0]), min_size=4, max_size=4), min_size=1, max_size=4
)


@given(batches, st.lists(st.sampled_from([2.0**-30, 1.0, 2.0**30]), min_size=4, max_size=4))
def test_the_scale_of_a_steps_reference_does_not_change_the_rank(steps, scales):
    records = SampleWeights(), SampleWeights()
    for k, (row, scale) in enumerate(zip(steps, scales, strict=False), 1):
        records[0].add(aligned(k, [row]), [3, 1, 0, 2])
        records[1].add(aligned(k, [[scale * a for a in row]]), [3, 1, 0, 2])  # exact
    for row, other in zip(*(record.table() for record in records), strict=True):
        assert (row["opposed"], row["alignment"]) == (other["opposed"], other["alignment"])
    keys = {row["index"]: (-row["opposed"], row["alignment"], row["index"]) for row in records[0].table()}
    assert records[0].rank("left") == records[1].rank("left") == sorted(keys, key=keys.get)


def test_each_time_that_a_sample_was_seen_counts_the_same_whatever_the_size_of_its_batch():
    record = SampleWeights()
    record.add(aligned(1, [[3.0, -1.0]]), [0, 1])
    record.add(aligned(2, [[1.0, 1.0, 1.0, -1.0]]), [0, 1, 2, 3])
    (row,) = [row for row in record.table() if row["index"] == 0]
    assert row["alignment"] == (1.5 + 1.0) / 2
    assert row["mean"] == pytest.approx((2.0 + 4 / 3) / 2)


def test_a_sample_without_a_label_does_not_count_in_the_mean_alignment():
    record = SampleWeights()
    rows = [[-1.0, 3.0, 0.0]]
    record.add(aligned(1, rows, shares=[[0.5, 0.5, 0.0]]), [0, 1, 2])
    assert [(row["index"], row["alignment"]) for row in record.to_table()] == [(0, -0.5), (1, 1.5)]


def test_samples_without_any_alignment_come_last():
    record = SampleWeights()
    record.add(aligned(1, [[3.0, -1.0]]), [0, 1])
    record.add(report(2, [[0.5, 0.0]]), [0, 2])
    assert record.rank("left") == [1, 0, 2]
    assert record.to_table()[-1]["opposed"] is None
    record.add(Report(step=3, tasks=("left",), weights=torch.ones(1, 1), shares=torch.ones(1, 1)), [0])
    assert {row["index"]: row["opposed"] for row in record.table()}[0] == 0.0


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=12))
def test_auroc_is_the_probability_that_a_corrupted_sample_comes_before_a_clean_one(samples):
    values, bad = [v for v, _ in samples], [b for _, b in samples]
    record = SampleWeights()
    record.add(aligned(1, [[float(v) for v in values]]), list(range(len(values))))
    pairs = [(v, w) for v, b in samples if b for w, c in samples if not c]
    if pairs:
        expected = sum((v < w) + 0.5 * (v == w) for v, w in pairs) / len(pairs)
        assert record.auroc(torch.tensor(bad), "left") == pytest.approx(expected)
        tied = sum((max(v, 0) < max(w, 0)) + 0.5 * (max(v, 0) == max(w, 0)) for v, w in pairs) / len(pairs)
        assert record.auroc(torch.tensor(bad), "left", by="weight") == pytest.approx(tied)


STEPS = [([[-1.0, 2.0, 0.5, -0.5]], [4, 0, 1, 3]), ([[1.0, -2.0, 0.25, 0.0]], [1, 4, 2, 0])]


@given(st.integers(0, 4), st.integers(0, 4))
def test_the_records_of_several_processes_become_that_of_one_process_on_the_joined_batches(first, second):
    whole, parts = SampleWeights(), (SampleWeights(), SampleWeights())
    for k, ((rows, index), cut) in enumerate(zip(STEPS, (first, second), strict=True), 1):
        whole.add(aligned(k, rows), index)
        for record, own in zip(parts, (slice(0, cut), slice(cut, 4)), strict=True):
            record.add(aligned(k, rows, own=own), index[own])
    merged = SampleWeights.merge(parts)
    assert merged.table() == whole.table()
    assert merged.rank("left") == whole.rank("left")
    for index in range(5):
        assert merged.history("left", index) == whole.history("left", index)
    merged.add(replace(aligned(2, STEPS[1][0]), skipped=1), [7, 8, 9, 10])  # recorded in its parts already
    assert merged.history("left", 7) == []
    merged.add(aligned(3, [[1.0, 3.0]]), [4, 7])
    assert merged.history("left", 4)[-1] == 0.5
    assert len(parts[0].history("left", 4)) <= 2


@pytest.mark.parametrize("weigh", ["together", "each", "parts"])
def test_the_micro_batches_of_a_step_are_recorded_together(weigh):
    p, record = Problem(), SampleWeights()
    optimizer = wrap(p, SLGrad("left"), shared=p.encoder, model=p.model)
    optimizer.zero_grad()
    parts = [lambda k=k: p.samples(k) for k in range(3)]
    weights = []
    if weigh == "parts":
        optimizer.combine(parts, reference=p.reference).backward()
    else:
        for part in parts:
            with optimizer.accumulate(3, weigh=weigh):
                (optimizer.combine(part, reference=p.reference) / 3).backward()
            if weigh == "each":  # by itself, the same parameters: the same weights
                alone = wrap(p, SLGrad("left"), shared=p.encoder, model=p.model)
                alone.combine(part, reference=p.reference)
                weights.append(alone._record.pending.report.weights)
    optimizer.step()
    weights = torch.cat(weights or [optimizer.report.weights], dim=1)
    record.add(optimizer.report, torch.arange(100, 118))
    assert [row["index"] for row in record.table("left")] == [*range(100, 118)]
    means = torch.stack([part.mean() for part in weights.split(6 if weigh == "each" else 18, dim=1)])
    expected = weights / means.repeat_interleave(18 // len(means))
    for task, row in zip(("left", "right"), expected, strict=True):
        assert [each["mean"] for each in record.table(task)] == pytest.approx(row.tolist())
    with pytest.raises(MTLWeightError, match=r"each of the 18 samples.*found an index of shape \[6\]"):
        SampleWeights().add(optimizer.report, torch.arange(6))


def test_a_record_goes_on_from_what_was_saved(tmp_path):
    record = SampleWeights()
    for k, (rows, index) in enumerate(STEPS, 1):
        record.add(aligned(k, rows), index)
    torch.save(record.state_dict(), tmp_path / "record.pt")
    resumed = SampleWeights()
    resumed.add(report(9, [[1.0]]), [99])  # forgotten
    resumed.load_state_dict(torch.load(tmp_path / "record.pt", weights_only=True))
    last = replace(aligned(2, STEPS[1][0]), skipped=1)
    for each in (record, resumed):
        each.add(last, [7, 8, 9, 10])  # the step was skipped
        each.add(aligned(3, [[1.0, 3.0, -2.0]]), [4, 7, 0])
    assert resumed.table() == record.table()
    assert resumed.rank("left", skip=1) == record.rank("left", skip=1)
    assert resumed.tasks == record.tasks


def test_a_saved_record_is_not_changed_by_what_is_recorded_later():
    record = recorded()
    saved = record.state_dict()
    before = copy.deepcopy(saved)
    record.add(report(3, [[0.25, 0.75]]), [5, 6])
    assert same(saved, before)


def test_an_empty_record_can_be_saved_and_merged():
    empty = SampleWeights.from_state_dict(SampleWeights().state_dict())
    assert SampleWeights.merge([empty, recorded()]).table() == recorded().table()
    assert SampleWeights.merge([empty]).tasks == ()
    assert empty.to_table() == []


def test_a_bad_step_or_state_leaves_the_record_as_it_was():
    record = recorded()
    for index in ([0.0, 1.0], [True, False], [0, 1, 2]):
        with pytest.raises(MTLWeightError):
            record.add(report(3, [[0.5, 0.5]]), index)
    for state in ({}, None, {"count": 1, "step": 1, "last": None, "seen": {"left": {"index": torch.ones(1)}}}):
        with pytest.raises(MTLWeightError, match="expected a state dict of a SampleWeights, found"):
            record.load_state_dict(state)
    assert same(record.state_dict(), recorded().state_dict())
    record.add(report(3, [[0.5, 0.5]]), [1, 3])  # and the step itself is still to come
    assert len(record.history("left", 1)) == 3


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda r: r.add(Report(step=1, weights=torch.ones(2)), [0]),
            r"records weights per sample: expected .* found weights of shape \[2\]",
        ),
        (lambda r: r.add(report(1, [[1.0, 0.0]]), [0]), r"each of the 2 samples, found an index of shape \[1\]"),
        (lambda r: r.table("up"), r"a task that was recorded \(none was\), found 'up'"),
        (lambda r: r.rank("up"), r"a task that was recorded \(none was\), found 'up'"),
        (lambda r: r.add({}, [0]), "expected the optimizer's report, found dict"),
        (lambda r: r.add(report(1, [[1.0]]), [0.5]), r"positions as whole numbers, found torch\.float32"),
        (
            lambda _: recorded().rank("left", by="alignment"),
            "expected alignments of task 'left' to rank by, found none",
        ),
        (lambda _: recorded().rank("left", by="loss"), "expected by='alignment' or 'weight', found 'loss'"),
        (lambda _: recorded().table(skip=-1), "expected skip >= 0, found -1"),
        (lambda _: SampleWeights.merge([]), "merge: expected records, found none"),
        (lambda r: SampleWeights.merge([r, r.state_dict()]), "merge: expected records, found dict"),
    ],
)
def test_what_cannot_be_recorded_or_shown_says_why(act, message):
    with pytest.raises(MTLWeightError, match=message):
        act(SampleWeights())
