"""Lightning's automatic optimization: the step is that of a plain loop."""

import functools
import logging

import lightning.pytorch as pl
import pytest
import torch

from mtlweight import FAMO, MGDA, UW, MTLWeightError, SLGrad
from tests.problems import Problem, own, same_numbers, step, wrap

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
SIZES = [2, 1, 3, 2, 4, 1, 2, 3]  # of the micro-batches
EPOCHS = 2


def sample_losses(p, x, y):
    outputs = p.model(x)
    return {task: (outputs[task] - target).square() for task, target in zip(p.tasks, y.unbind(1), strict=True)}


def batches(p, sizes):
    x, y = p.batch(size=sum(sizes))
    return [*zip(x.split(sizes), torch.stack([*y.values()], dim=1).split(sizes), strict=True)]


def plain(p, optimizer, sizes, **options):
    for batch in batches(p, sizes):
        step(optimizer, functools.partial(sample_losses, p, *batch), reference=p.reference, **options)


class Module(pl.LightningModule):
    """A module whose training step weighs the losses, in every form that a test asks for."""

    def __init__(self, problem, weighting, count=1, **options):
        super().__init__()
        self.problem, self.model = problem, problem.model
        self.weighting, self.count, self.options = weighting, count, options

    def configure_optimizers(self):
        return wrap(self.problem, self.weighting, shared=self.problem.encoder, model=self.model)

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        given = dict(self.options)
        if given.pop("told", False):
            given["last"] = (index + 1) % self.count == 0 or index + 1 == self.trainer.num_training_batches
        with optimizer.accumulate(self.count, **given):
            return optimizer.combine(lambda: sample_losses(self.problem, *batch), reference=self.problem.reference)


def fit(module, sizes, **options):
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        accumulate_grad_batches=module.count,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches(module.problem, sizes), batch_size=None))
    return trainer.optimizers[0]


@pytest.mark.parametrize("by", [UW(step_size=0.5) >> MGDA(), SLGrad("left"), FAMO()], ids=repr)
def test_accumulated_batches_are_weighed_as_one(by):
    p, q = Problem(), Problem()
    optimizer, other = fit(Module(p, by, 4), SIZES), wrap(q, by, shared=q.encoder, model=q.model)
    for _ in range(EPOCHS):
        plain(q, other, [sum(SIZES[:4]), sum(SIZES[4:])])
    same_numbers(p.parameters(), q.parameters(), rtol=1e-9)
    same_numbers(own(optimizer)["state"], own(other)["state"], rtol=1e-9)
    assert optimizer.report.step == 2 * EPOCHS


def test_the_last_batches_of_an_epoch_may_be_fewer_if_the_training_step_says_so():
    p, q = Problem(), Problem()
    optimizer, other = fit(Module(p, MGDA(), 3, told=True), SIZES), wrap(q, MGDA(), shared=q.encoder)
    for _ in range(EPOCHS):
        plain(q, other, [sum(SIZES[:3]), sum(SIZES[3:6]), sum(SIZES[6:])])
    same_numbers(p.parameters(), q.parameters(), rtol=1e-9)
    assert optimizer.report.step == 3 * EPOCHS
    with pytest.raises(MTLWeightError, match="after 3 micro-batches, found it after 2"):
        fit(Module(Problem(), MGDA(), 3), SIZES)


def test_each_batch_may_be_weighed_by_itself():
    p, q = Problem(), Problem()
    optimizer, other = fit(Module(p, UW(step_size=0.5), 4, weigh="each"), SIZES), wrap(q, UW(step_size=0.5))
    for _ in range(EPOCHS):
        for group in (batches(q, SIZES)[:4], batches(q, SIZES)[4:]):
            other.zero_grad()
            for batch in group:
                with other.accumulate(4, weigh="each"):
                    (other.combine(sample_losses(q, *batch)) / 4).backward()
            other.step()
    same_numbers(p.parameters(), q.parameters(), rtol=1e-9)
    same_numbers(own(optimizer)["state"], own(other)["state"], rtol=1e-9)


def test_gradients_are_clipped_after_they_are_weighted():
    p, q = Problem(), Problem()
    fit(Module(p, MGDA(), 4), SIZES, gradient_clip_val=0.01)
    other = wrap(q, MGDA(), shared=q.encoder)
    for _ in range(EPOCHS):
        for batch in batches(q, [sum(SIZES[:4]), sum(SIZES[4:])]):
            other.zero_grad()
            other.combine(sample_losses(q, *batch)).backward()
            torch.nn.utils.clip_grad_norm_(q.model.parameters(), 0.01)
            other.step()
    same_numbers(p.parameters(), q.parameters(), rtol=1e-9)
