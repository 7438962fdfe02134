"""accelerate's checkpoints: a training that is cut in two arrives where the uncut one does."""

import pytest
from accelerate import Accelerator

from tests.optimizer.resumable import HALF, IN_EACH_OTHER
from tests.problems import same


def prepared(trainings):
    accelerator = Accelerator(cpu=True)
    for training in trainings.values():
        accelerator.prepare(training.model, training.optimizer)
    return accelerator


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each training arrives at, uncut and cut; in one checkpoint of all."""
    folder = tmp_path_factory.mktemp("accelerate")
    first, second = ({name: make(seed=seed) for name, make in IN_EACH_OTHER.items()} for seed in (0, 1))
    accelerator = prepared(first)
    for training in first.values():
        training.run(0, HALF)
    accelerator.save_state(folder)
    prepared(second).load_state(folder)
    for training in (*first.values(), *second.values()):
        training.run(HALF, 2 * HALF)
    return first, second


@pytest.mark.parametrize("name", IN_EACH_OTHER)
def test_resumed_from_accelerates_checkpoint_a_training_equals_the_uncut_one_bit_for_bit(name, results):
    uncut, cut = (each[name] for each in results)
    assert cut.optimizer.report.step == 2 * HALF
    assert same(cut.result(), uncut.result())
