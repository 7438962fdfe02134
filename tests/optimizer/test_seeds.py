"""Random weightings follow torch's seed, unless they are given another."""

import copy
import io

import pytest
import torch

from mtlweight import RLW, UW, GradDrop, MTLWeightError, MultiTaskOptimizer, PCGrad, ReLoBRaLo, View, every
from mtlweight._statistics import Given
from tests.problems import Problem, own, same, step, wrap


def weights_of(optimizer, p, steps=3):
    found = []
    for k in range(steps):
        step(optimizer, p.losses(k))
        found.append(optimizer.report.weights)
    return torch.stack(found)


def trained(torchs, *, when="before", **options):
    p = Problem()
    if when == "before":
        torch.manual_seed(torchs)
    optimizer = wrap(p, RLW(), **options)
    if when == "after":
        torch.manual_seed(torchs)
    return weights_of(optimizer, p)


def test_every_seed_of_torch_is_another_run_and_the_same_one_the_same_run():
    runs = [trained(seed) for seed in (0, 1, 2, 2**31)]
    assert len({tuple(run.flatten().tolist()) for run in runs}) == 4
    assert torch.equal(trained(1), runs[1])


def test_torchs_seed_counts_before_the_optimizer_is_made_and_after():
    assert torch.equal(trained(7), trained(7, when="after"))


def test_a_seed_that_is_given_counts_whatever_torchs_is():
    assert torch.equal(trained(0, seed=3), trained(1, seed=3))
    assert not torch.equal(trained(0, seed=3), trained(0, seed=4))


def test_the_seed_is_decided_at_the_first_combine():
    p = Problem()
    torch.manual_seed(1)
    optimizer = wrap(p, every(2, RLW()))
    assert own(optimizer)["seed"] is None
    step(optimizer, p.losses())
    torch.manual_seed(2)
    found = weights_of(optimizer, p)
    assert own(optimizer)["seed"] == 1
    q = Problem()
    torch.manual_seed(1)
    other = wrap(q, every(2, RLW()))
    step(other, q.losses())
    assert torch.equal(found, weights_of(other, q))


@pytest.mark.parametrize("by", [RLW(), PCGrad(), UW(), GradDrop(), ReLoBRaLo()], ids=repr)
def test_to_wrap_and_to_train_draws_no_number_of_the_models(by):
    p = Problem()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    step(wrap(p, by, shared=p.encoder), p.losses())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_checkpoint_keeps_the_seed_wherever_it_is_loaded():
    p, q = Problem(), Problem()
    torch.manual_seed(2**64 - 3)  # the largest ones need more than 63 bits
    optimizer = wrap(p, RLW())
    weights_of(optimizer, p, steps=1)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    torch.manual_seed(5)
    other = wrap(q, RLW())
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(weights_of(optimizer, p), weights_of(other, q))


def test_a_checkpoint_without_a_seed_leaves_the_one_that_was_given():
    p = Problem()
    untrained = wrap(p, RLW()).state_dict()
    optimizer = wrap(p, RLW(), seed=3)
    optimizer.load_state_dict(untrained)
    assert own(optimizer)["seed"] == 3


def test_a_copy_goes_on_with_the_same_seed():
    p = Problem()
    torch.manual_seed(1)
    optimizer = wrap(p, RLW())
    weights_of(optimizer, p, steps=1)
    p, other = copy.deepcopy((p, optimizer))
    torch.manual_seed(2)
    mine = weights_of(other, p)
    q = Problem()
    torch.manual_seed(1)
    assert torch.equal(mine, weights_of(wrap(q, RLW()), q, steps=4)[1:])


def test_weights_from_numbers_given_by_hand_follow_torchs_seed_too():
    def drawn(seed):
        torch.manual_seed(seed)
        return RLW()(losses=torch.ones(3))

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    torch.manual_seed(4)
    given = Given(losses=torch.ones(2))
    assert torch.equal(*(torch.rand(3, generator=View(given, **s).generator) for s in ({}, {"seed": 4})))


@pytest.mark.parametrize("seed", ["1", 1.5, True])
def test_a_seed_is_an_integer_or_none(seed):
    with pytest.raises(MTLWeightError, match=r"expected seed to be an int, or None for torch's seed, found"):
        MultiTaskOptimizer(Problem().sgd(), RLW(), seed=seed)


def test_parts_that_draw_numbers_of_the_model_do_not_move_the_seed():
    p, q = Problem(), Problem()
    torch.manual_seed(1)
    optimizer, other = wrap(p, RLW()), wrap(q, RLW())
    for k in range(2):
        torch.rand(3)
        step(optimizer, p.losses(k))
        step(other, q.losses(k))
    assert same(p.parameters(), q.parameters())
