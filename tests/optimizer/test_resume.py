"""A training that is cut in two, saved, and taken up in another process arrives where the uncut one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.optimizer.problems import same
from tests.optimizer.resumable import HALF, TRAININGS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each training arrives at, uncut and cut; one new process for all of them."""
    folder = tmp_path_factory.mktemp("checkpoints")
    uncut = {}
    for i, (name, make) in enumerate(TRAININGS.items()):
        training = make()
        training.run(0, HALF)
        torch.save(training.checkpoint(), folder / f"{i}.pt")
        training.run(HALF, 2 * HALF)
        uncut[name] = training.result()
    # Another seed of hashes: nothing may hang on the order of a set.
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    command = [sys.executable, "-m", "tests.optimizer.resumable", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = enumerate(TRAININGS)
    cut = {name: torch.load(folder / f"{i}.result", weights_only=True) for i, name in names}
    return uncut, cut


@pytest.mark.parametrize("name", TRAININGS)
def test_resumed_in_a_new_process_every_training_equals_the_uncut_one_bit_for_bit(name, results):
    uncut, cut = (each[name] for each in results)
    assert cut["optimizer"]["mtlweight"]["step"] == 2 * HALF
    for part, value in uncut.items():
        assert same(cut[part], value), part
