import json
from pathlib import Path

import pytest
import torch

import mtlweight
from tests.benchmarks import _render, causal_step, loss_step, sample_step, sample_weights, solvers, task_step
from tests.benchmarks.__main__ import TITLES, main
from tests.benchmarks._measure import Ratio, Settings, compare, measure, peak_memory
from tests.benchmarks._models import problem

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """Small shapes gain nothing from threads, and lose much where other work runs beside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


BENCHMARKS = (sample_weights, sample_step, task_step, solvers, loss_step, causal_step)


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda module: module.TABLE)
def test_each_contestant_of_each_quick_row_runs_and_is_named_in_the_ratios(benchmark):
    rows = list(benchmark.rows(Settings(quick=True)))
    assert rows
    for row in rows:
        assert row.table == benchmark.TABLE
        for ratio in row.ratios:
            assert {*ratio.over, *ratio.under} <= set(row.contestants)
        for run in row.contestants.values():
            run()


@pytest.mark.parametrize("model", ["LeNet", "MLP 3x512"])
def test_all_ways_to_slgrads_weights_agree(model):
    row = sample_weights.row(problem(model, tasks=2, samples=6, device=CPU, seed=1), model)
    expected = row.contestants["loop"]()
    assert expected.shape == (2, 6)
    for name, run in row.contestants.items():
        torch.testing.assert_close(
            run().float(), expected, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_torchjd_takes_the_same_mgda_step_over_the_shared_parameters():
    pytest.importorskip("torchjd")
    start = problem("conv + BatchNorm", tasks=2, samples=6, device=CPU, seed=1)
    steps = {}
    for name, make in (
        ("ours", lambda p: task_step.ours(p, "rows")),
        ("autojac", lambda p: task_step.torchjd_autojac(p, None, False)),
        ("autogram", task_step.torchjd_autogram),
    ):
        p = start.fresh()
        make(p)()
        steps[name] = torch.cat([q.grad.flatten() for q in p.shared])
    # For two tasks, TorchJD's Frank-Wolfe iteration is exact too.
    torch.testing.assert_close(steps["autojac"], steps["ours"], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(steps["autogram"], steps["ours"], rtol=1e-3, atol=1e-5)


def test_both_libraries_give_weights_from_gramians_of_few_and_many_tasks():
    for m in (2, 8, 64):
        row = solvers.row(solvers.gramian(m, 1000, seed=1), 1000)
        for name, run in row.contestants.items():
            assert run().shape == (m,), (name, m)


def test_our_weights_from_a_gramian_leave_no_residual_and_wrong_ones_do():
    for m in (2, 8, 16):
        G = solvers.gramian(m, 1000, seed=1)
        for method in solvers.METHODS:
            if method.residual is not None:
                weights = solvers.of_ours(method.name, G)().numpy()
                assert method.residual(weights, G.numpy()) < 1e-8, (method.name, m)
                weights[0] /= 2
                assert method.residual(weights, G.numpy()) > 1e-3, (method.name, m)


def test_the_step_by_hand_is_the_step_of_the_library():
    start = problem("LeNet", tasks=2, samples=6, device=CPU, seed=1)
    ours, hand = start.fresh(), start.fresh()
    sample_step.slgrad(ours, callables=True)()
    sample_step.by_hand(hand)()
    for a, b in zip(ours.model.parameters(), hand.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6)


def test_the_first_step_of_uncertainty_weighting_by_hand_is_that_of_the_library():
    start = problem("LeNet", tasks=2, samples=6, device=CPU, seed=1)
    ours, hand = start.fresh(), start.fresh()
    loss_step.ours(ours, mtlweight.UW())()
    loss_step.by_hand(hand)()
    for a, b in zip(ours.model.parameters(), hand.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_peak_memory_counts_what_is_held_at_the_same_time():
    def run():
        for _ in range(2):
            x = torch.ones(2**18)  # 1 MiB
            y = x + 1
            del x, y

    assert peak_memory(run, CPU) == pytest.approx(2, rel=0.1)


def test_peak_memory_is_the_same_again_where_a_run_lets_go_of_what_the_one_before_it_made():
    held = [torch.ones(2**18)]

    def run():
        held.clear()
        held.append(torch.ones(2**18))

    assert [peak_memory(run, CPU) for _ in range(3)] == pytest.approx([1, 1, 1], rel=0.1)


def test_a_slow_row_gets_fewer_rounds_and_five_at_least():
    row = next(loss_step.rows(Settings(quick=True)))
    assert measure(row, Settings(rounds=7, turn=0.0, budget=0.0))["rounds"] == 5
    assert measure(row, Settings(rounds=2, turn=0.0, budget=0.0))["rounds"] == 2
    assert measure(row, Settings(rounds=7, turn=0.0, budget=60.0))["rounds"] == 7


def test_the_best_of_several_is_chosen_without_the_round_that_it_is_compared_in():
    values = {"a": [1.0, 1.0, 1.0], "b": [1.0, 4.0, 4.0], "c": [4.0, 2.0, 2.0]}
    found = compare(Ratio("a / best", ("a",), ("b", "c")), values)
    # Without the first round c is the best; without one of the others, by the medians 2.5 and 3, b is.
    assert [found[name] for name in ("low", "median", "high")] == [0.25, 0.25, 0.25]
    assert found["under"] == "c"  # over all rounds
    assert compare(Ratio("memory", ("a",), ("b", "c")), {"a": [1.0], "b": [3.0], "c": [2.0]})["median"] == 0.5


def test_a_ratio_takes_the_best_of_several_and_is_held_against_its_limit():
    row = next(loss_step.rows(Settings(quick=True)))
    row.ratios[0].under = tuple(row.contestants)
    row.ratios[0].at_most = 0.0
    result = measure(row, Settings(rounds=2, turn=0.0))
    ratio = next(iter(result["ratios"].values()))
    assert not ratio["met"]
    assert ratio["under"] == min(result["ms"], key=lambda name: result["ms"][name]["median"])
    assert ratio["low"] <= ratio["median"] <= ratio["high"]


def test_one_command_prints_the_table_and_writes_the_numbers(tmp_path, capsys, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(
        "# T\n<!-- machine -->\n<!-- end machine -->\n<!-- loss step -->\nold\n<!-- end loss step -->\nkept\n"
    )
    monkeypatch.setattr(_render, "PAGE", page)
    path = tmp_path / "numbers.json"
    main(["--only", "loss step", "--quick", "--rounds", "2", "--json", str(path), "--write-docs"])
    printed = capsys.readouterr().out
    run = json.loads(path.read_text())
    assert run["environment"]["torch"] == torch.__version__
    assert set(run["results"][0]["ms"]) == {"plain", "UW", "DWA", "RLW", "UW by hand"}
    assert "UW / plain" in printed
    text = page.read_text()
    assert "UW / plain" in text
    assert "old" not in text
    assert text.endswith("kept\n")
    main(["--from", str(path)])
    assert capsys.readouterr().out == printed


def test_the_page_has_a_place_for_each_table():
    text = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    for name in (*TITLES, "machine"):
        assert f"<!-- {name} -->" in text
        assert f"<!-- end {name} -->" in text
