"""A training that is cut in two, saved, and taken up in another process arrives where the uncut one does."""

import copy
import functools
import io
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from mtlweight import RLW, UW, MTLWeightError, MultiTaskOptimizer, SLGrad
from mtlweight._checkpoint import ADDED, VERSION
from tests.optimizer.resumable import HALF, TRAININGS, first_half
from tests.problems import Problem, own, same, step
from tests.zoo import Halve

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each training arrives at: uncut, and by each way of saving. One new process for all of them."""
    folder = tmp_path_factory.mktemp("checkpoints")
    trainings = first_half(folder)
    for training in trainings.values():
        training.run(HALF, 2 * HALF)
    # Another seed of hashes: nothing may hang on the order of a set.
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    command = [sys.executable, "-m", "tests.optimizer.resumable", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    cut = {way: torch.load(folder / f"{way}.result", weights_only=True) for way in WAYS}
    return {name: training.result() for name, training in trainings.items()}, cut


WAYS = ["torch.save", "torch.distributed.checkpoint"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", TRAININGS)
def test_resumed_in_a_new_process_every_training_equals_the_uncut_one_bit_for_bit(name, way, results):
    uncut, cut = results
    assert cut[way][name]["optimizer"]["mtlweight"]["step"] == 2 * HALF
    for part, value in uncut[name].items():
        assert same(cut[way][name][part], value), part


# Which engine is in use


class Late(nn.Module):
    """Has no forward derivative until it is told to have one, as kernels have that are chosen by what a batch is."""

    forward_mode = False

    def forward(self, x):
        return x / 2 if self.forward_mode else Halve.apply(x)


class Fell:
    """A training that falls back in its first step, though the engine could run in all later ones."""

    def __init__(self, weighting=None, engine="auto"):
        self.problem = Problem(dtype=torch.float32)
        self.late = Late()
        self.problem.encoder.append(self.late)
        adam = torch.optim.Adam(self.problem.model.parameters(), lr=0.01)
        weighting = weighting or SLGrad("left")
        self.optimizer = MultiTaskOptimizer(adam, weighting, shared=self.problem.encoder, engine=engine)

    def run(self, first, last):
        p = self.problem
        for k in range(first, last):
            self.late.forward_mode = k > 0
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "mtlweight: the forward engine cannot run here")
                step(self.optimizer, functools.partial(p.samples, k), reference=functools.partial(p.reference, k + 50))

    def saved(self):
        file = io.BytesIO()
        torch.save([self.problem.model.state_dict(), self.optimizer.state_dict()], file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def load(self, saved):
        model, optimizer = copy.deepcopy(saved)  # torch's own optimizers go on with the tensors that they are given
        self.problem.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)

    def result(self):
        report = self.optimizer.report
        engines = dict(report.fallbacks), report.engine, own(self.optimizer)
        return [self.problem.parameters(), report.alignment, report.weights, *engines]


@pytest.mark.parametrize("engine", ["auto", "forward"])
def test_a_resumed_training_stays_on_the_engine_that_the_uncut_one_fell_back_to(engine):
    uncut, resumed = Fell(engine=engine), Fell(engine=engine)
    uncut.run(0, 3)
    resumed.load(uncut.saved())
    for training in (uncut, resumed):
        training.run(3, 6)
    assert uncut.optimizer.report.engine == "pullback"
    assert [*uncut.optimizer.report.fallbacks.values()] == [6]
    assert same(uncut.result(), resumed.result())


def test_engines_are_confirmed_in_the_steps_in_which_the_uncut_training_confirms_them():
    uncut, resumed = Fell(), Fell()
    uncut.run(1, 4)
    resumed.load(uncut.saved())
    for training in (uncut, resumed):
        training.run(4, 6)
        assert training.optimizer._record.uses["forward"] == 5
    assert uncut.optimizer._record.uses == resumed.optimizer._record.uses


def test_loading_brings_back_the_engines_of_the_checkpoint_whatever_has_happened_since():
    training, other = Fell(), Fell()
    training.run(1, 2)
    saved = training.saved()
    training.run(0, 1)
    assert training.optimizer._record.broken
    training.load(saved)
    other.load(saved)
    for each in (training, other):
        each.run(2, 4)
    assert training.optimizer.report.engine == "forward"
    assert same(training.result(), other.result())


@pytest.mark.parametrize("elsewhere", ["torch", "device", "emptied"])
def test_under_another_torch_or_on_another_device_engines_are_tried_again(elsewhere):
    training, other = Fell(), Fell()
    training.run(0, 2)
    saved = training.saved()
    engines = saved[1]["mtlweight"]["engines"]
    assert [*engines["broken"]] == ["forward"]
    if elsewhere == "emptied":
        saved[1]["mtlweight"]["engines"] = {}
    else:
        engines["torch" if elsewhere == "torch" else "devices"] = "another"
    other.load(saved)
    other.run(2, 3)
    assert other.optimizer.report.engine == "forward"
    assert [*other.optimizer.report.fallbacks.values()] == [2]  # what happened is not forgotten


# Checkpoints of earlier versions

OLD = {
    "version": 2,
    "weighting": "Chain(UW, RLW)",
    "seed": 7,
    "step": 2,
    "tasks": ["right", "left"],
    "skipped": 1,
    "dropped": {"left": 1},
    "state": {
        "0": {"log_variance": {"right": torch.tensor(0.25).double(), "left": torch.tensor(-0.5).double()}},
        "1": {},
    },
    "memory": {},
}
"""What version 2 saved after two steps."""
RLW_AT_SEED_7_STEP_2 = torch.tensor([0.4915997379290213, 0.5084002620709787], dtype=torch.float64)
"""As that version drew them."""


def test_a_checkpoint_of_version_2_goes_on_as_it_would_have():
    file = io.BytesIO()
    training = Fell(UW() >> RLW())
    torch.save({**training.optimizer.optimizer.state_dict(), "mtlweight": OLD}, file)
    file.seek(0)
    training.optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert same(
        {**own(training.optimizer), "version": 2},
        {**OLD, **{name: own(training.optimizer)[name] for name in ADDED}},
    )
    training.run(2, 3)
    report = training.optimizer.report
    assert report.tasks == ("right", "left")
    assert (report.step, report.skipped, report.dropped, report.fallbacks) == (3, 1, {"left": 1}, {})
    # Its draws are those of its seed and step, by its order of tasks; its variances are those that it had learnt.
    draws = RLW_AT_SEED_7_STEP_2
    variances = torch.tensor([-0.25, 0.5], dtype=torch.float64).exp()
    torch.testing.assert_close(report.weights, draws * variances)
    assert own(training.optimizer)["version"] == VERSION == 3


def test_a_checkpoint_of_version_3_without_its_engines_is_damaged():
    training = Fell()
    training.run(1, 2)
    saved = training.saved()
    del saved[1]["mtlweight"]["engines"]
    with pytest.raises(MTLWeightError, match="damaged: expected engines under the key"):
        training.load(saved)
