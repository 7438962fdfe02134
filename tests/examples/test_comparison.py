import argparse

import comparison
import pytest
import torch
from comparison import BASELINES, BLIND, EQUAL, SINGLE, TUNED, Comparison, Network, Problem, Run, Table, Task
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mtlweight import Constant, Equal, MTLWeightError, SLGrad

TASKS = (Task("price", "RMSE"), Task("sold", "AUC"), Task("returned", "AUC"))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 8)

    def forward(self, inputs):
        return self.layer(inputs["x"]).relu()


@pytest.fixture
def problem():
    """The third task has a label where the second one is a yes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 4, generator=generator)
    sold = (x[:, 0] > 0).float()
    labels = torch.stack([3 + x[:, 1], sold, (x[:, 2] > 0).float().where(sold == 1, torch.nan)], dim=1)
    table = Table({"x": x}, labels)
    rows = torch.arange(300)
    return Problem(TASKS, table[rows[:200]], table[rows[200:250]], table[rows[250:]], Encoder, 8)


@pytest.fixture
def options():
    return argparse.Namespace(weighting=["UW() >> PCGrad()"], seeds=2, epochs=3, batch=32, rate=1e-2, decay=0.0)


def test_the_mean_of_a_tasks_losses_is_that_over_the_rows_with_a_label(problem):
    model = Network(problem, TASKS)
    found = comparison.losses(problem, model(problem.train), problem.train)
    labels, known = problem.train.labels, ~problem.train.labels[:, 2].isnan()
    output = model(problem.train)
    assert 0 < known.sum() < 200
    expected = {
        "price": (output["price"] - labels[:, 0]).square().mean(),
        "sold": nn.functional.binary_cross_entropy_with_logits(output["sold"], labels[:, 1]),
        "returned": nn.functional.binary_cross_entropy_with_logits(output["returned"][known], labels[known, 2]),
    }
    for task, loss in expected.items():
        assert found[task].shape == (200,)
        torch.testing.assert_close(found[task].mean(), loss)


def test_a_task_without_any_label_in_the_batch_is_none_and_the_others_are_trained_on(problem, options):
    without = problem.train.labels[:, 2].isnan()
    table = problem.train[without]
    assert comparison.losses(problem, Network(problem, TASKS)(table), table)["returned"] is None
    sparse = problem._replace(train=problem.train[torch.cat([without.nonzero()[:100, 0], (~without).nonzero()[:3, 0]])])
    options.batch, options.epochs, options.seeds = 4, 1, 1
    result = comparison.compare("a title", lambda _: sparse, options)
    assert all(0 <= run.metrics["returned"] <= 1 for runs in result.runs.values() for run in runs)


def test_a_task_without_a_label_on_the_validation_split_is_left_out_of_the_score(problem):
    without = problem.validation.labels[:, 2].isnan()
    few = problem._replace(validation=problem.validation[without])
    assert comparison._score(few, Network(few, TASKS)) < 1
    assert comparison._score(few, Network(few, TASKS[2:])) == 0  # nothing is known of it


def test_a_task_whose_training_labels_are_all_alike_or_missing_starts_with_finite_answers(problem):
    labels = problem.train.labels.clone()
    labels[:, 1], labels[:, 2] = 0.0, torch.nan
    answers = comparison.constant_answers(problem._replace(train=Table(problem.train.inputs, labels)))
    torch.testing.assert_close(answers[1:].sigmoid(), torch.tensor([1e-3, 0.5]))


@given(
    st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=30).filter(
        lambda rows: len({yes for _, yes in rows}) == 2
    )
)
def test_the_auc_is_the_share_of_pairs_in_order_with_ties_as_half(rows):
    answers = torch.tensor([float(answer) for answer, _ in rows])
    labels = torch.tensor([float(yes) for _, yes in rows])
    difference = answers[labels == 1][:, None] - answers[labels == 0]
    expected = ((difference > 0).double() + (difference == 0).double() / 2).mean().item()
    assert comparison.auc(answers, labels) == pytest.approx(expected)


def test_without_a_look_at_the_inputs_the_error_is_the_labels_deviation_and_the_auc_is_chance(problem):
    blind = comparison.metrics(problem, comparison.blind_answers(problem, problem.train), problem.train)
    deviation = problem.train.labels[:, 0].std(correction=0).item()
    assert blind == pytest.approx({"price": deviation, "sold": 0.5, "returned": 0.5})


def test_equal_weights_are_the_first_of_the_constants_and_no_two_are_proportional():
    grid = comparison.constants(3)
    assert grid[0] == (1, 1, 1)
    assert len({tuple(weight / sum(weights) for weight in weights) for weights in grid}) == len(grid) == 7


def test_the_tuned_constants_are_those_with_the_best_score_on_the_validation_split(problem, options, monkeypatch):
    scores = {}

    def train(_problem, weighting, tasks, *_):
        score = 0.9 if weighting == Constant({"price": 1, "sold": 4, "returned": 1}) else 0.1
        scores[repr(weighting)] = score
        return comparison.Trained({task.name: score for task in tasks}, score, seconds=1.0)

    monkeypatch.setattr(comparison, "train", train)
    result = comparison.compare("a title", lambda _: problem, options)
    assert 0.9 in scores.values()
    assert result.chosen == [(1, 4, 1)] * 2
    assert result.metric(TUNED, TASKS[0]) == [0.9, 0.9]
    assert result.metric(EQUAL, TASKS[0]) == [0.1, 0.1]
    trainings = {method: runs[0].trainings for method, runs in result.runs.items()}
    assert trainings == {BLIND: 0, SINGLE: 3, EQUAL: 1, TUNED: 7, "UW() >> PCGrad()": 1}
    assert result.runs[TUNED][0].seconds == 7


def test_the_parameters_of_the_best_epoch_are_tested_and_not_those_of_the_last(problem, options, monkeypatch):
    scores, states = iter([0.1, 0.7, 0.3]), []

    def score(_, model):
        states.append(model(problem.test)["price"].detach())
        return next(scores)

    monkeypatch.setattr(comparison, "_score", score)
    bar = argparse.Namespace(update=lambda: None)
    trained = comparison.train(problem, Equal(), TASKS, options, 0, bar)
    expected = comparison.rmse(states[1], problem.test.labels[:, 0])
    assert trained.score == 0.7
    assert trained.metrics["price"] == pytest.approx(expected)
    assert comparison.rmse(states[2], problem.test.labels[:, 0]) != pytest.approx(expected)


def test_all_methods_see_the_same_batches():
    batches = [rows.tolist() for rows, _ in comparison.batches(10, 4, 2, seed=1)]
    torch.rand(3)
    assert [rows.tolist() for rows, _ in comparison.batches(10, 4, 2, seed=1)] == batches
    assert [last for _, last in comparison.batches(10, 4, 2, seed=1)] == [False, False, True] * 2
    assert sorted(row for rows in batches[:3] for row in rows) == list(range(10))


def test_a_weighting_that_reads_a_reference_gets_the_main_tasks_loss_on_validation_rows(problem):
    row = problem.validation[torch.zeros(1, dtype=torch.long)]
    problem = problem._replace(validation=row)  # whichever rows are drawn, they are this one
    model = Network(problem, TASKS)
    loss = comparison._reference(problem, model, SLGrad("sold"), 32)
    torch.testing.assert_close(loss(), comparison.losses(problem, model(row), row)["sold"].mean())


def test_a_weighting_that_reads_a_reference_can_be_compared_with_others(problem, options):
    options.weighting, options.seeds = ["SLGrad('sold')"], 1  # without a reference it raises
    result = comparison.compare("a title", lambda _: problem, options)
    assert 0 <= result.metric("SLGrad('sold')", TASKS[1])[0] <= 1


def made(price: dict[str, list[float]]) -> Comparison:
    runs = {
        method: [Run({"price": value, "sold": 1 - value}, 1.0, 1) for value in values]
        for method, values in price.items()
    }
    return Comparison("a title", TASKS[:2], runs, [(1.0, 4.0)] * len(price[TUNED]))


def test_better_means_better_with_each_of_the_seeds():
    result = made(
        {**{method: [0.5, 0.6] for method in BASELINES}, "UW()": [0.4, 0.5], "DWA()": [0.4, 0.7], "RLW()": [0.6, 0.7]}
    )
    lines = str(result).splitlines()
    rows = {line[:20].strip(): line[20:].split() for line in lines}
    assert rows["UW()"][:8] == ["0.4500", "±", "0.0707", "+", "0.5500", "±", "0.0707", "+"]
    assert rows["DWA()"][:4] == ["0.5500", "±", "0.2121", "0.4500"]
    assert rows["RLW()"][3] == "-"
    assert "Better than tuned constants in every task: UW()." in lines
    assert "Worse than tuned constants in every task: RLW()." in lines
    assert "Tuned constants, seed by seed: 1:4, 1:4." in lines


def test_one_seed_does_not_tell_better_from_worse():
    text = str(made({**{method: [0.5] for method in BASELINES}, "UW()": [0.1]}))
    assert "One seed does not tell better from worse." in text
    assert "+" not in text
    assert "Better" not in text


def test_a_wrong_weighting_is_refused_before_anything_is_trained(capsys):
    with pytest.raises(SystemExit):
        comparison.parser("what it shows", ["UW()"], "picture.png").parse_args(["--weighting", "PCgrad()"])
    assert "Did you mean PCGrad?" in capsys.readouterr().err
    with pytest.raises(MTLWeightError):
        comparison.parse("PCgrad()")
