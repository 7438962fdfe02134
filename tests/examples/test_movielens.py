import importlib.util
import sys
from pathlib import Path

import movielens
import pytest
import torch

SCRIPT = Path(movielens.__file__)
needs_data = pytest.mark.skipif(
    importlib.util.find_spec("recbole") is None, reason=f"the ratings are not installed: {movielens.INSTALL}"
)


@needs_data
@pytest.mark.training
def test_its_quick_form_prints_a_row_a_method_and_saves_the_picture(tmp_path, python):
    picture = tmp_path / "new folder" / "picture.png"
    named = ["--weighting", "UW() >> PCGrad()", "--weighting", "FAMO()"]
    # One batch in three has no film noir in it: the task is absent then.
    few = ["--split", "random", "--genre", "Film-Noir", "--batch", "64"]
    done = python(SCRIPT, "--quick", *named, *few, "--seeds", "2", "--output", picture)
    methods = ["no look at the inputs", "one network a task", "equal weights", "tuned constants", *named[1::2]]
    lines = done.out.splitlines()
    rows = {name: line.removeprefix(name).split() for name in methods for line in lines if line.startswith(f"{name}  ")}
    for method in methods:
        assert 0.8 < float(rows[method][0]) < 1.5
        assert rows[method][1] == "±"
    assert "Tuned constants, seed by seed:" in done.out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000
    assert "/600 " in done.err  # the progress bar: 2 seeds, 25 batches, 3 + 7 + 2 trainings


@needs_data
def test_the_ratings_are_the_complete_movielens_100k():
    ratings = movielens.read()
    assert ratings.stars.bincount().tolist() == [0, 6_110, 11_370, 27_145, 34_174, 21_201]
    assert len(ratings.user.unique()) == 943
    assert len(ratings.film.unique()) == 1_682
    assert len(ratings.genres) == 19
    of_genre = ratings.films[ratings.film, 2 + ratings.genres.index("Sci-Fi")]
    assert of_genre.sum() == 12_730
    assert ratings.films[:, 1].nonzero().flatten().tolist() == [267, 1412]  # the two whose year is not a number
    assert ratings.people[1, 0] == pytest.approx((24 - 34) / 12)
    assert ratings.people[1:, 2:].sum(dim=1).eq(1).all()  # one occupation each


@needs_data
@pytest.mark.parametrize("split", ["time", "random"])
def test_the_three_parts_are_all_ratings_each_once(split):
    problem = movielens.load(0, split)
    parts = [problem.train, problem.validation, problem.test]
    assert [len(part) for part in parts] == [80_000, 10_000, 10_000]
    stars = torch.cat([part.labels[:, 0] for part in parts]).long()
    assert stars.bincount().tolist() == movielens.read().stars.bincount().tolist()


@needs_data
def test_the_test_split_by_time_is_later_than_all_else_and_mostly_of_people_without_a_rating_before():
    ratings, problem = movielens.read(), movielens.load(0, "time")
    order = ratings.when.sort().values
    assert order[89_999] <= order[90_000]
    late = ratings.stars[ratings.when > order[90_000]].bincount()
    assert (
        problem.test.labels[:, 0].long().bincount() - late
    ).abs().sum() < 200  # ratings of the same second as its first
    assert (problem.test.inputs["user"] == 0).float().mean() > 0.8
    assert (problem.train.inputs["user"] > 0).all()


@needs_data
def test_people_and_films_without_a_rating_in_the_training_split_share_the_embedding_0():
    problem = movielens.load(0, "random", rows=2_000)
    for name in ("user", "film"):
        seen = problem.train.inputs[name].unique()
        assert torch.isin(problem.test.inputs[name], torch.cat([seen, torch.zeros(1)])).all()
        assert (problem.test.inputs[name] == 0).any()


@needs_data
def test_the_third_task_has_a_label_for_films_of_its_genre_alone():
    problem = movielens.load(0, genre="Horror")
    column = 23 + 2 + movielens.read().genres.index("Horror")
    horror = problem.train.inputs["facts"][:, column] == 1
    stars, liked, five = problem.train.labels.T
    assert torch.equal(~five.isnan(), horror)
    assert torch.equal(five[horror] == 1, stars[horror] == 5)
    assert torch.equal(liked == 1, stars >= 4)


@needs_data
def test_a_seed_draws_the_random_split_and_the_split_by_time_is_always_the_same():
    assert torch.equal(movielens.load(0, "random").test.labels[:, 0], movielens.load(0, "random").test.labels[:, 0])
    assert not torch.equal(movielens.load(0, "random").test.labels[:, 0], movielens.load(1, "random").test.labels[:, 0])
    first, second = (movielens.load(seed, "time").test.labels[:, 0].sum() for seed in (0, 1))
    assert (first - second).abs() < 200  # ratings of the same second, in the seed's order


@needs_data
def test_an_unknown_genre_is_refused_with_the_list_of_those_there_are():
    with pytest.raises(ValueError, match=r"found 'Sci-fi'. Choose one of Action, .*Western"):
        movielens.load(0, genre="Sci-fi")


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps recbole==1\.2\.1"):
        movielens.read.__wrapped__()


@needs_data
def test_reading_the_ratings_does_not_import_the_package():
    movielens.read()
    assert "recbole" not in sys.modules
