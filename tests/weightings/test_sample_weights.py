"""SampleWeights: what each sample has weighed, and how well a low weight finds mislabelled ones."""

import copy
import csv
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtlweight import MTLWeightError, Report, SampleWeights, SLGrad
from tests.optimizer.problems import Problem, step, wrap


def report(number, rows, shares=None, tasks=("left", "right")):
    weights = torch.tensor(rows, dtype=torch.float64)
    shares = torch.full_like(weights, 1 / weights.shape[1]) if shares is None else torch.tensor(shares)
    return Report(step=number, tasks=tasks[: len(rows)], weights=weights, shares=shares)


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
    assert rows[0] == {"task": "left", "index": 1, "seen": 2, "dropped": 2, "mean": 0.0, "last": 0.0}
    assert rows[1] == {"task": "left", "index": 3, "seen": 2, "dropped": 0, "mean": 3.0, "last": 4.0}
    assert rows[2:] == [
        {"task": "right", "index": 1, "seen": 2, "dropped": 1, "mean": 0.5, "last": 0.0},
        {"task": "right", "index": 3, "seen": 2, "dropped": 1, "mean": 0.5, "last": 0.0},
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
    assert [{key: str(value) for key, value in row.items()} for row in record.table()] == rows


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


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda r: r.add(Report(step=1, weights=torch.ones(2)), [0]),
            r"records weights per sample: expected .* found weights of shape \[2\]",
        ),
        (lambda r: r.add(report(1, [[1.0, 0.0]]), [0]), r"each of the 2 samples, found an index of shape \[1\]"),
        (lambda r: r.table("up"), r"a task that was recorded \(none was\), found 'up'"),
    ],
)
def test_what_cannot_be_recorded_or_shown_says_why(act, message):
    with pytest.raises(MTLWeightError, match=message):
        act(SampleWeights())
