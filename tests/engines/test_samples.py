"""The samples engine: chunks, randomness, samples that interact."""

import pytest
import torch
from torch import nn

from mtlweight.engines import samples
from tests.zoo import (
    NETWORKS,
    SAMPLES,
    SEED,
    Recipe,
    TwoTasks,
    alignment,
    close,
    combined,
    gradient,
    numbers,
    on_samples,
    optimizer_for,
    problem,
)

# Some operators' backward has no batching rule: torch loops over it and says so, once in a process.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet:UserWarning")


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("chunk_size", [1, 4, 2 * SAMPLES, 64])
def test_the_chunk_size_changes_nothing(network, chunk_size, device):
    p = problem(NETWORKS[network], device=device)
    losses = [*p.sample_losses().values()]
    rows = [torch.cat([part.flatten(1) for part in c], dim=1) for c in samples.jacobian(losses, p.shared, chunk_size=1)]
    found = samples.jacobian(losses, p.shared, chunk_size=chunk_size)
    chunks = [torch.cat([part.flatten(1) for part in columns], dim=1) for columns in found]
    assert {len(chunk) for chunk in chunks[:-1]} <= {chunk_size}
    assert close(torch.cat(chunks), torch.cat(rows))
    assert close(torch.cat(chunks), torch.stack([gradient(loss, p.shared) for row in losses for loss in row]))


@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_all_rows_see_the_dropout_masks_that_gave_the_losses(chunk_size):
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    x = torch.randn(SAMPLES, 8, dtype=torch.float64)
    loss = nn.functional.dropout(x * weight, 0.5).sum(dim=1)
    (rows,) = zip(*samples.jacobian([loss], [weight], chunk_size=chunk_size), strict=True)
    rows = torch.cat(rows)
    # Linear in the weights, whatever the mask: the rows must give back this very draw's losses.
    assert close(rows @ weight, loss)
    assert torch.equal(rows == 0, rows != 2 * x)
    assert len({tuple(row) for row in (rows == 0).tolist()}) > 1


@pytest.mark.parametrize("engine", ["samples", "rows", "pullback"])
def test_measuring_draws_no_random_numbers(engine):
    p = problem(NETWORKS["dropout"])
    losses, reference = p.sample_losses(), p.reference()
    state = torch.get_rng_state()
    optimizer_for(p, on_samples, engine=engine).combine(losses, reference=reference).backward()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("engine", ["samples", "rows", "pullback", "forward"])
def test_every_engine_leaves_the_random_state_and_the_buffers_of_one_plain_forward_pass(engine):
    p, plain = problem(NETWORKS["dropout"]), problem(NETWORKS["dropout"])
    for each in (p, plain):
        each.model.encoder.append(nn.BatchNorm1d(4, device=each.x.device, dtype=each.x.dtype))
    combined(p, optimizer_for(p, on_samples, engine=engine), p.sample_losses)
    state = torch.get_rng_state()
    torch.manual_seed(SEED)
    plain.reference()
    plain.sample_losses()
    assert torch.equal(torch.get_rng_state(), state)
    for name, buffer in plain.model.named_buffers():
        assert torch.equal(buffer, p.model.get_buffer(name)), name


class Noisy(torch.autograd.Function):
    """Draws in its backward."""

    @staticmethod
    def forward(_ctx, x):
        return x.clone()

    @staticmethod
    def backward(_ctx, incoming):
        return incoming + torch.rand_like(incoming)


def test_a_backward_that_draws_random_numbers_is_an_error():
    weight = torch.ones(3, requires_grad=True)
    losses = Noisy.apply(weight * torch.ones(4, 3)).sum(dim=1)
    with pytest.raises(RuntimeError, match="called random operation while in randomness error mode"):
        samples.alignments([losses], [weight], [torch.ones(3)])


@pytest.mark.parametrize("engine", ["forward", "pullback", "samples", "rows"])
def test_under_batchnorm_a_samples_row_is_the_derivative_of_its_loss_as_the_batch_computed_it(engine):
    recipe = Recipe(lambda: TwoTasks(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), 4), numbers(5))
    p, other = problem(recipe), problem(recipe)
    report = combined(p, optimizer_for(p, on_samples, engine=engine), p.sample_losses)
    reference = other.reference()
    assert close(report.alignment, alignment(other.sample_losses(), reference, other.shared))
    other.model.train(False)  # the running statistics: samples do not interact
    alone = alignment(other.sample_losses(), reference, other.shared)
    assert not close(report.alignment, alone, rounding=0.1)
