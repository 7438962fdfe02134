"""replay="official": the published code's arithmetic, against a transcription of it."""

import copy

import pytest
import torch

from mtlweight import MTLWeightError, MultiTaskOptimizer, SLGrad
from tests.oracles.slgrad_official import Official
from tests.problems import Problem, step, wrap

OPTIMIZERS = {
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),  # 0.5 diverges, and rounding grows with it
    "Adam": lambda p: torch.optim.Adam(p, lr=0.02),
}
SIZES = {"full batches": [6] * 20, "a smaller last batch": [6, 6, 6, 2] * 5}


def squared_error(prediction, target):
    return (prediction - target).square()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("engine", ["auto", "pullback", "rows"])
def test_twenty_steps_are_those_of_the_published_code(name, sizes, engine):
    p, q = Problem(("left", "middle", "right")), Problem(("left", "middle", "right"))
    optimizer = MultiTaskOptimizer(
        OPTIMIZERS[name](list(p.model.parameters())),
        SLGrad("left", replay="official"),
        shared=p.encoder,
        model=p.model,
        engine=engine,
    )
    official = Official(
        q.model,
        squared_error,
        list(q.encoder.parameters()),
        OPTIMIZERS[name](list(q.model.parameters())),
        q.tasks,
        batch_size=6,
    )
    start = p.parameters()
    for k, size in enumerate(SIZES[sizes]):
        (x, y), (held_out_x, held_out_y) = p.batch(k, size), p.batch(100 + k, 8)

        def losses(x=x, y=y):
            outputs = p.model(x)
            return {task: squared_error(outputs[task], y[task]) for task in p.tasks}

        def reference(x=held_out_x, y=held_out_y):
            return squared_error(p.model(x)["left"], y["left"])

        optimizer.zero_grad()
        optimizer.combine(losses, reference=reference).backward()
        optimizer.step()
        official.step(x, y, held_out_x, held_out_y)
        torch.testing.assert_close(optimizer.report.weights * size, official.weight[:, :size], rtol=1e-9, atol=1e-12)
    moved = q.parameters()
    torch.testing.assert_close(p.parameters(), moved, rtol=1e-9, atol=1e-9)
    assert max((moved[key] - start[key]).abs().max() for key in moved) > 0.05
    weights = official.weight
    assert (weights == 0).any()
    assert (weights > 0).any()


def replayed(p, batches, optimizer=None):
    optimizer = optimizer or wrap(p, SLGrad("left", replay="official"), shared=p.encoder, model=p.model)
    for k in batches:
        step(optimizer, lambda k=k: p.samples(k), reference=lambda k=k: p.reference(50 + k))
    return optimizer


def test_a_resumed_replay_goes_on_as_if_it_had_not_stopped():
    p, q = Problem(), Problem()
    replayed(p, range(6))
    saved = copy.deepcopy(replayed(q, range(3)).state_dict())
    resumed = replayed(q, ())
    resumed.load_state_dict(saved)
    replayed(q, range(3, 6), resumed)
    torch.testing.assert_close(p.parameters(), q.parameters(), rtol=0.0, atol=0.0)


def test_a_batch_larger_than_the_first_says_what_it_expects():
    p = Problem()

    def losses(size):
        x, y = p.batch(0, size)
        return {task: squared_error(output, y[task]) for task, output in p.model(x).items()}

    optimizer = replayed(p, ())
    step(optimizer, lambda: losses(4), reference=p.reference)
    with pytest.raises(MTLWeightError, match=r"no batch larger than the first, of 4, found one of 5\. Use"):
        optimizer.combine(lambda: losses(5), reference=p.reference)
