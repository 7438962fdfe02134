"""A training that is cut in two, saved, and taken up in another process arrives where the uncut one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.optimizer.problems import same
from tests.optimizer.resumable import HALF, TRAININGS, first_half

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
