"""Several processes under DistributedDataParallel take the steps of one process on the joined batch."""

import functools
import itertools
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mtlweight import MGDA, UW, MTLWeightError
from tests.benchmarks import communication
from tests.distributed.cases import (
    ALONE,
    SCENARIOS,
    SHARDED,
    SPOILT,
    TURNED,
    UNLABELLED,
    Singular,
    Spoilt,
    Turned,
    Unlabelled,
    parity,
)
from tests.distributed.training import Run, Training
from tests.problems import Problem, same, same_numbers, wrap

ROOT = Path(__file__).parents[2]
COUNTS = (2, 4)
of_any_number = pytest.mark.parametrize("count", COUNTS)
of_two = pytest.mark.parametrize("count", [2])


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory):
    """What each case gave in each process; the processes are started once, for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "popen-gw" in base.name else base

    @functools.cache
    def found(count, device):
        folder = base / f"processes-{device}"
        try:
            folder.mkdir()
        except FileExistsError:  # they have been started
            while not (folder / "done").exists():
                time.sleep(0.2)
        else:
            command = [sys.executable, "-m", "tests.distributed.worker", folder, device, *map(str, COUNTS)]
            try:
                subprocess.run(command, cwd=ROOT, timeout=900, check=False)  # each case says whether it was reached
            finally:
                (folder / "done").touch()
        files = [folder / f"{count}-{r}.pt" for r in range(count)]
        return [torch.load(file, weights_only=False) if file.exists() else {} for file in files]

    def outcome(count, name, device="cpu"):
        each = [
            mine.get(name, {"error": f"{name} was not reached: an earlier case failed, or the process ended"})
            for mine in found(count, device)
        ]
        for mine in each:
            assert "error" not in mine, mine["error"]
        return [mine["result"] for mine in each]

    return outcome


def close(actual, expected):
    """Equality of nested values up to rounding."""
    if isinstance(expected, torch.Tensor) and expected.is_floating_point():
        same_numbers(actual, expected, rtol=1e-9)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            close(actual[key], value)
    elif isinstance(expected, (list, tuple)):
        for pair in zip(actual, expected, strict=True):
            close(*pair)
    else:
        assert (
            actual == pytest.approx(expected, rel=1e-9, abs=1e-9) if isinstance(expected, float) else actual == expected
        )


EVERY = [pytest.param(count, name, id=f"{name}-{count}") for count in COUNTS for name in parity(count)]


@pytest.mark.parametrize(("count", "name"), EVERY)
def test_processes_take_the_steps_of_one_process_on_the_joined_batch(outcomes, count, name, device):
    expected = Training(parity(count)[name], count).train()
    for found in outcomes(count, name, device):
        close(found, expected)


@of_any_number
def test_all_processes_have_the_same_bits(outcomes, count):
    for name in parity(count):
        first, *others = outcomes(count, name)
        for other in others:
            assert same(first, other), name


@of_two
def test_a_line_search_evaluates_as_often_and_finds_the_same_in_every_process(outcomes, count):
    first, *others = outcomes(count, "line_searches")
    assert all(len(values) > 2 for run in first.values() for values in run["values"])
    assert all(same(first, other) for other in others)


@of_any_number
@pytest.mark.parametrize("name", SPOILT, ids=str)
def test_a_loss_that_is_not_finite_in_one_process_is_skipped_or_dropped_in_all(outcomes, count, name):
    expected = Spoilt(SPOILT[name], count).train()
    assert expected["skipped"] == ("skip" in name)
    assert expected["dropped"] == ({"1": 1} if "drop" in name else {})
    for found in outcomes(count, "spoilt"):
        close(found[name], expected)


@of_any_number
def test_a_loss_that_is_not_finite_in_one_process_raises_in_all_and_changes_nothing(outcomes, count):
    single = Spoilt(Run(SPOILT["drop: MGDA()"].weighting), count)
    single.train(steps=1)
    expected = single.train(steps=1, start=2)
    for before, heard, after, then in outcomes(count, "spoilt_and_raised"):
        assert "NonFiniteError: The loss of task 1 is not finite" in heard
        assert same({**after, "values": None}, {**before, "values": None})
        close(then, expected)


@of_two
@pytest.mark.parametrize("name", [name for name in SPOILT if "SLGrad" not in name], ids=str)
def test_a_gradient_that_is_not_finite_in_one_process_is_judged_the_same_in_all(outcomes, count, name):
    expected = Singular(SPOILT[name], count).train()
    assert expected["skipped"] == (name != "drop: MGDA()")
    for found in outcomes(count, "singular"):
        close(found[name], expected)


@of_any_number
def test_a_penalty_that_is_not_finite_in_one_process_skips_the_step_in_all(outcomes, count):
    first, *others = outcomes(count, "a_penalty_fails")
    assert (first["skipped"], first["step"]) == (1, 1)
    for other in others:
        assert same(other, first)


@pytest.mark.parametrize(
    ("count", "name"),
    [*itertools.product(COUNTS, ["all_absent", "accumulated"]), (2, "line_searches"), (2, "recorded_and_merged")],
)
def test_processes_do_what_one_process_does(outcomes, count, name):
    expected = SCENARIOS[name](count, None, "cpu")
    for found in outcomes(count, name):
        close(found, expected)


@of_any_number
def test_an_error_in_one_process_raises_in_all_and_the_next_step_is_as_if_it_had_not_been(outcomes, count):
    *others, last = outcomes(count, "one_fails")
    for part, (heard, unchanged, then) in last.items():
        assert heard == "RuntimeError: out of order"
        for other in others:
            heard, still, after = other[part]
            assert heard.startswith("MTLWeightError: ")
            assert "none takes" in heard
            assert unchanged
            assert still
            assert same(after, then)
    assert all(f"Process {count - 1} could not" in other["losses"][0] for other in others)
    assert all("found RuntimeError: out of order" in other["losses"][0] for other in others)


@of_any_number
def test_calls_that_differ_between_processes_raise_in_all(outcomes, count):
    for found in outcomes(count, "unlike"):
        assert "all scalars or all [b]; found both" in found["kinds"]
        assert "ference" in found["no reference in one"] or "none takes" in found["no reference in one"]
        assert "expected the same reference in all of them, found none, one" in found["a reference in one"]
        assert "expected the same seed in all of them, found 0, 1" in found["seeds"]


@of_any_number
@pytest.mark.parametrize("name", TURNED)
def test_a_task_has_the_same_place_in_all_processes_whatever_the_order_of_their_mappings(outcomes, count, name):
    expected = Turned(TURNED[name], count).train()
    first, *others = (found[name] for found in outcomes(count, "turned"))
    close(first, expected)
    assert first["tasks"] == ["0", "1", "2"]
    for other in others:
        assert same(other, first)


@of_two
@pytest.mark.parametrize("name", UNLABELLED)
def test_a_row_without_any_label_at_first_has_its_place_in_all_processes(outcomes, count, name):
    expected = Unlabelled(UNLABELLED[name], count).train()
    for found in outcomes(count, "unlabelled"):
        close(found[name], expected)


@of_any_number
def test_where_no_seed_is_given_that_of_the_first_process_is_taken(outcomes, count):
    with torch.random.fork_rng(devices=[]):
        expected, _ = SCENARIOS["seeded_by_torch"](count, None, "cpu")
    for found, heard in outcomes(count, "seeded_by_torch"):
        close(found, expected)
        assert "expected the same seed in all of them, found None, 3" in heard


@of_two
def test_gradients_that_nobody_averages_raise_before_the_first_step(outcomes, count):
    for heard, unchanged in outcomes(count, "not_averaged"):
        assert "Wrap the model in DistributedDataParallel" in heard
        assert unchanged


@of_two
def test_without_a_group_each_process_weighs_its_own_batch(outcomes, count):
    for rank, found in enumerate(outcomes(count, "each_by_itself")):
        close(found, Training(ALONE, count, rank, averaged=False).train())


@of_any_number
def test_a_group_of_some_processes_is_as_many_processes(outcomes, count):
    expected = Training(Run(MGDA()), 2).train()
    for found, copied, refused in outcomes(count, "a_group_of_some"):
        close(found, expected)
        assert copied
        assert count == 2 or "process_group to be a torch.distributed.ProcessGroup that this process is in" in refused


@of_two
def test_a_checkpoint_of_one_process_goes_on_in_all_and_must_be_loaded_in_all(outcomes, count):
    for found in outcomes(count, "checkpoints"):
        for whole, heard, resumed in found.values():
            close({**resumed, "values": None}, {**whole, "values": None})
            assert "expected the same step in all of them, found 2, 0" in heard


@of_two
def test_a_copied_or_pickled_optimizer_keeps_its_group_or_says_that_it_is_gone(outcomes, count):
    for copied, gone in outcomes(count, "copies"):
        assert copied
        assert "expected one named 'no such' here, found none" in gone


@of_two
def test_each_process_records_the_weights_of_its_own_samples(outcomes, count):
    rows = [row for found in outcomes(count, "recorded") for row in found]
    close(sorted(rows, key=lambda row: (row["task"], row["index"])), SCENARIOS["recorded"](count, None, "cpu"))


@of_any_number
@pytest.mark.parametrize("level", communication.LEVELS)
def test_as_much_is_sent_as_the_table_in_the_docs_says(outcomes, count, level):
    for found in outcomes(count, "sent"):
        sent, sizes, flags = found[level]
        expected = communication.exchanges(level, **sizes, item=8)
        assert [kind for kind, _ in sent] == [kind for kind, _ in expected]
        for (_, actual), (_, said) in zip(sent, expected, strict=True):
            assert said <= actual <= said + 8 * flags


@of_two
def test_bucket_views_and_static_graphs_work_or_raise(outcomes, count):
    expected = [Training(Run(weighting), count).train() for weighting in (UW(), MGDA())]
    for found, heard in outcomes(count, "options_of_ddp"):
        close(found, [*expected, expected[0]])
        assert "without static_graph=True where gradients are measured" in heard


@of_two
@pytest.mark.parametrize("name", SHARDED)
def test_parameters_sharded_by_fully_shard_are_those_of_one_process(outcomes, count, name):
    expected = Training(SHARDED[name], count).train()["parameters"]
    for found in outcomes(count, "sharded"):
        close(found[name], expected)


@of_two
def test_what_cannot_be_measured_of_sharded_parameters_raises_before_anything_has_changed(outcomes, count):
    for found in outcomes(count, "sharded_and_refused"):
        for name, (heard, unchanged) in found.items():
            assert "but the parameters are sharded" in heard, name
            assert unchanged, name


@of_two
def test_fsdp1_is_named_where_gradients_are_read_or_processes_count_as_one(outcomes, count):
    for found in outcomes(count, "flattened"):
        for name, (heard, *alone) in found.items():
            assert re.search(r"found (it in )?FullyShardedDataParallel \(FSDP1\).* Use ", heard), (name, heard)
            assert all(text is None for text in alone), (name, alone)


@of_two
def test_a_piece_of_a_gradient_that_is_not_finite_skips_the_step_in_all_processes(outcomes, count):
    for before, after_loss, after_gradient, skipped, then in outcomes(count, "sharded_and_not_finite"):
        assert same(after_loss, before)
        assert same(after_gradient, before)
        assert skipped == 2
        assert not same(then, before)
        assert all(p.isfinite().all() for p in then.values())


@of_two
def test_an_optimizer_with_sharded_state_takes_the_same_steps_and_does_not_look_ahead(outcomes, count):
    for found, heard in outcomes(count, "redundant"):
        for name, parameters in found.items():
            close(parameters, Training(Run(parity(count)[name].weighting, steps=3), count).train()["parameters"])
        assert "found ZeroRedundancyOptimizer, which has them elsewhere" in heard


def test_a_group_of_another_kind_is_refused():
    with pytest.raises(MTLWeightError, match=r"process_group to be a torch\.distributed\.ProcessGroup .* found int"):
        wrap(Problem(), UW(), process_group=3)


def test_the_docs_have_the_table_that_the_model_prints():
    page = (ROOT / "docs" / "optimizer.md").read_text()
    assert communication.table() in page


def test_costs_of_the_model_grow_with_what_is_sent_and_vanish_for_one_process():
    sizes = {"tasks": 10, "samples": 64, "parameters": 10**7}
    for level in communication.LEVELS:
        sent = communication.exchanges(level, **sizes)
        seconds = [communication.seconds(sent, count) for count in (1, 2, 8, 64)]
        assert seconds[0] == 0
        assert seconds == sorted(seconds)
    # On paper, all processes send and receive 2 (R - 1) / R of the rows: 4 bytes each, 12.5e9 in a second.
    (_, rows) = communication.exchanges("Gramian", **sizes)[-1]
    assert communication.seconds([("reduce", rows)], 4, latency=0) == pytest.approx(2 * 3 / 4 * 4e8 / 12.5e9)
