"""The host does not wait for the alignment: on a GPU torch would raise, and on ``meta`` there is none to wait for."""

import pytest
import torch

from mtlweight import L2RW, SLGrad, View
from mtlweight._statistics import Given
from mtlweight.autograd import forward_mode
from mtlweight.engines import forward, pullback
from tests.zoo import NETWORKS, problem


@pytest.fixture
def place(device):
    """The chosen GPU, else ``meta``: torch raises for numbers of its tensors wherever the host would wait for them."""
    return "meta" if device == "cpu" else device


@pytest.fixture
def no_waiting(place):
    """From its call on, torch raises where the host would wait for the device."""

    def start():
        if place == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")

    yield start
    if place == "cuda":
        torch.cuda.set_sync_debug_mode("default")


def test_torch_raises_where_the_host_would_wait(place, no_waiting):
    numbers = torch.ones(3, device=place)
    no_waiting()
    with pytest.raises(RuntimeError):
        numbers.sum().item()


def believe(_losses, found):
    """A judge that does not compare: comparing waits."""
    return found


@pytest.mark.parametrize("network", ["linear", "convolutions and BatchNorm", "dropout", "LayerNorm"])
@pytest.mark.parametrize("engine", ["forward", "pullback"])
def test_the_alignment_is_measured_without_waiting_for_the_device(network, engine, place, no_waiting):
    p = problem(NETWORKS[network], device=place, dtype=torch.float32)
    tangents = [torch.ones_like(q) for q in p.shared]
    modules = [p.model]
    no_waiting()
    if engine == "forward":
        forward.losses_and_alignments(
            p.sample_losses, lambda losses: losses, modules, forward_mode.names(modules), p.shared, tangents, believe
        )
    else:
        pullback.alignments([*p.sample_losses().values()], p.shared, tangents)


@pytest.mark.parametrize(
    "weighting", [SLGrad("0"), SLGrad("0", normalize="task"), SLGrad("0", temperature=0.5), L2RW()], ids=repr
)
def test_and_neither_are_the_weights_made_of_it(weighting, place, no_waiting):
    view = View(Given(alignment=torch.randn(2, 64, device=place, dtype=torch.float64)))
    state = weighting.init(view)
    no_waiting()
    weighting.weigh(view, state)
