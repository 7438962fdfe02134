"""Loops of accelerate: the step is that of a plain loop."""

import functools

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch.utils.data import DataLoader

from mtlweight import FAMO, MGDA, UW, SLGrad
from tests.problems import Problem, own, same_numbers, wrap

SIZE, COUNT = 2, 3  # samples in a micro-batch, micro-batches in a step
SAMPLES = 15  # 8 micro-batches: 3, 3 and 2, and the last one has one sample


def sample_losses(p, model, x, y):
    outputs = model(x)
    return {task: (outputs[task] - target).square() for task, target in zip(p.tasks, y.unbind(1), strict=True)}


def data(p):
    x, y = p.batch(size=SAMPLES)
    return x, torch.stack([*y.values()], dim=1)


def fit(p, weighting, *, epochs=2, **options):
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=COUNT))
    optimizer = wrap(p, weighting, shared=p.encoder, model=p.model)
    loader = DataLoader([*zip(*data(p), strict=True)], batch_size=SIZE)
    model, prepared, loader = accelerator.prepare(p.model, optimizer, loader)
    for _ in range(epochs):
        for batch in loader:
            with (
                accelerator.accumulate(model),
                optimizer.accumulate(COUNT, last=accelerator.sync_gradients, **options),
            ):
                loss = optimizer.combine(
                    functools.partial(sample_losses, p, model, *batch), reference=functools.partial(p.reference)
                )
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                prepared.step()
                prepared.zero_grad()
    return optimizer


@pytest.mark.parametrize("by", [UW(step_size=0.5) >> MGDA(), SLGrad("left"), FAMO()], ids=repr)
def test_accumulated_batches_are_weighed_as_one_and_so_are_the_fewer_at_the_end(by):
    p, q = Problem(), Problem()
    optimizer, other = fit(p, by), wrap(q, by, shared=q.encoder, model=q.model)
    for _ in range(2):
        for x, y in zip(*(values.split(SIZE * COUNT) for values in data(q)), strict=True):
            other.zero_grad()
            other.combine(functools.partial(sample_losses, q, q.model, x, y), reference=q.reference).backward()
            torch.nn.utils.clip_grad_norm_(q.model.parameters(), 0.5)
            other.step()
    same_numbers(p.parameters(), q.parameters(), rtol=1e-7)
    same_numbers(own(optimizer)["state"], own(other)["state"], rtol=1e-7)
    assert optimizer.report.step == 6


def test_each_batch_may_be_weighed_by_itself():
    p = Problem()
    optimizer = fit(p, UW(step_size=0.5), epochs=1, weigh="each")
    assert optimizer.report.step == 3
    assert optimizer.report.losses.shape == (2, 1)  # of the last micro-batch
