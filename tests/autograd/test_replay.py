"""Whatever evaluates the losses a second time, within a step, draws the random numbers of the first."""

import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from mtlweight import FAMO, MGDA, UW, AutoLambda, SLGrad
from tests.zoo import Halve, Halving, Recipe, TwoTasks, numbers, optimizer_for, problem

SOURCES = {
    "torch": lambda: float(torch.rand(())),
    "Python": random.random,
    "numpy": np.random.random_sample,
}
NO_JVP = Recipe(lambda: TwoTasks(nn.Sequential(nn.Linear(5, 4), Halving(Halve)), 4), numbers(5))
PLAIN = Recipe(lambda: TwoTasks(nn.Linear(5, 4), 4), numbers(5))
CASES = {
    # recipe, weighting, engine, number of parts
    "parts": (PLAIN, UW(), "auto", 2),
    "parts, and their rows": (PLAIN, MGDA(), "auto", 2),
    "parts, and their alignments": (PLAIN, SLGrad("left"), "pullback", 2),
    "a second look": (PLAIN, FAMO(), "auto", 1),
    "a second look at parts": (PLAIN, FAMO(), "auto", 2),
    "a step ahead": (PLAIN, SLGrad("left", lookahead=True), "auto", 1),
    "everything a step ahead": (PLAIN, SLGrad("left", lookahead=True, samples_at="ahead"), "auto", 1),
    "a step ahead, per task": (PLAIN, AutoLambda("left"), "auto", 1),
    "a fallback": (NO_JVP, SLGrad("left"), "auto", 1),
    "a fallback in parts": (NO_JVP, SLGrad("left"), "auto", 2),
}


def state():
    return torch.get_rng_state().tolist(), random.getstate(), [*map(str, np.random.get_state())]  # noqa: NPY002


def seed():
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002  # the global one, which augmentations draw from


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("case", CASES)
def test_every_evaluation_in_a_step_draws_the_numbers_of_the_first_and_leaves_the_state_of_one(case, source):
    recipe, by, engine, count = CASES[case]
    p, drawn = problem(recipe), [[] for _ in range(count)]
    optimizer = optimizer_for(p, by, engine=engine)

    def part(i):
        drawn[i].append(SOURCES[source]())
        return {task: (1 + drawn[i][-1]) * loss for task, loss in p.sample_losses().items()}

    parts = [lambda i=i: part(i) for i in range(count)]
    seed()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "mtlweight: the forward engine")
        optimizer.combine(parts if count > 1 else parts[0], reference=p.reference).backward()
    optimizer.step()
    after = state()
    assert min(map(len, drawn)) > 1
    seed()
    assert drawn == [[SOURCES[source]()] * len(each) for each in drawn]
    assert after == state()
