"""Lightning's checkpoints: a training that is cut in two arrives where the uncut one does."""

import logging

import lightning.pytorch as pl
import pytest
from torch.utils.data import DataLoader

from tests.optimizer.resumable import HALF, IN_EACH_OTHER
from tests.problems import same

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Module(pl.LightningModule):
    """A module whose batches are numbers: of the batch to train on."""

    def __init__(self, training):
        super().__init__()
        self.training_, self.model = training, training.model

    def configure_optimizers(self):
        return self.training_.optimizer

    def training_step(self, k, _index):
        return self.training_.combined(k)


def fit(training, first, last, folder, checkpoint=None):
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=last // HALF,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(training), DataLoader(range(first, last), batch_size=None), ckpt_path=checkpoint)
    return trainer


@pytest.mark.parametrize("name", IN_EACH_OTHER)
def test_resumed_from_lightnings_checkpoint_a_training_equals_the_uncut_one_bit_for_bit(name, tmp_path):
    uncut, cut, resumed = IN_EACH_OTHER[name](), IN_EACH_OTHER[name](), IN_EACH_OTHER[name](seed=1)
    uncut.run(0, 2 * HALF)
    fit(cut, 0, HALF, tmp_path).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, HALF, 2 * HALF, tmp_path, tmp_path / "half.ckpt")
    assert resumed.optimizer.report.step == 2 * HALF
    assert same(resumed.result(), uncut.result())
