"""Rules for forward derivatives: torch's own numbers, and nothing of the tangents in the graph."""

import itertools

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional

from mtlweight.autograd import forward_mode
from mtlweight.autograd.forward_mode import Corrections
from mtlweight.autograd.forward_rules import RULES

RUNNING = torch.tensor([0.3, -0.2]), torch.tensor([0.5, 2.0])


def running(training):
    return [value.double() for value in RUNNING] if training is not None else [None, None]


def batch_norm(training, **options):
    def layer(x, weight=None, bias=None):
        return functional.batch_norm(x, *running(training), weight, bias, training is not False, **options)

    return layer


LAYERS = {
    "linear": (functional.linear, (4, 3), (5, 3), (5,)),
    "linear with a keyword": (lambda x, w, b: functional.linear(x, w, bias=b), (4, 3), (5, 3), (5,)),
    "linear by keywords": (lambda x, w: functional.linear(input=x, weight=w), (4, 3), (5, 3)),
    "conv1d": (lambda *given: torch.conv1d(*given, 2, 1), (2, 3, 7), (4, 3, 3), (4,)),
    "conv2d": (lambda x, w: functional.conv2d(x, w, padding="same"), (2, 3, 5, 4), (4, 3, 3, 1)),
    "conv3d with groups": (lambda x, w, b: torch.conv3d(x, w, b, groups=2), (2, 2, 3, 3, 3), (4, 1, 2, 2, 2), (4,)),
    "batch norm": (batch_norm(True), (4, 2), (2,), (2,)),
    "batch norm of images": (batch_norm(True, momentum=0.5), (4, 2, 3, 3), (2,), (2,)),
    "batch norm without statistics": (batch_norm(None, eps=0.1), (4, 2, 3), (2,), (2,)),
    "batch norm in evaluation": (batch_norm(False, eps=0.1), (4, 2, 3, 3), (2,), (2,)),
    "batch norm without parameters": (batch_norm(True), (4, 2, 3)),
    "batch norm with one parameter": (batch_norm(True), (4, 2, 3), (2,)),
    "group norm": (lambda x, *affine: functional.group_norm(x, 2, *affine), (3, 4, 5), (4,), (4,)),
    "group norm without parameters": (lambda x: functional.group_norm(x, 2), (3, 4, 5)),
    "layer norm": (lambda x, *affine: functional.layer_norm(x, (3, 5), *affine), (4, 3, 5), (3, 5), (3, 5)),
    "layer norm with one parameter": (lambda x, w: functional.layer_norm(x, (5,), w, eps=0.1), (4, 5), (5,)),
    "embedding": (lambda table: functional.embedding(torch.tensor([[0, 3], [3, 1]]), table), (4, 2)),
}


def drawn(layer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in LAYERS[layer][1:]]


def dual(layer, values, tangents):
    """The layer's dual number; without a tangent where there is none."""
    pairs = zip(values, tangents, strict=True)
    duals = [value if tangent is None else forward_ad.make_dual(value, tangent) for value, tangent in pairs]
    with Corrections():
        return forward_ad.unpack_dual(LAYERS[layer][0](*duals))


SUBSETS = [
    pytest.param(layer, which, id=f"{layer}-{''.join('01'[k] for k in which)}")
    for layer in LAYERS
    for which in itertools.product([True, False], repeat=len(LAYERS[layer]) - 1)
    if any(which)
]


@pytest.mark.parametrize(("layer", "which"), SUBSETS)
def test_value_tangent_and_gradient_are_torchs_own_whichever_inputs_have_tangents(layer, which):
    function, values = LAYERS[layer][0], drawn(layer)
    tangents = [tangent if has else None for tangent, has in zip(drawn(layer, seed=1), which, strict=True)]
    zeros = [torch.zeros_like(v) if t is None else t for v, t in zip(values, tangents, strict=True)]
    expected = torch.func.jvp(function, tuple(values), tuple(zeros))
    leaves = [value.requires_grad_() for value in values]
    with forward_ad.dual_level():
        value, tangent = dual(layer, leaves, tangents)
    torch.testing.assert_close((value.detach(), tangent), expected, rtol=1e-9, atol=1e-9)
    unit = torch.randn(value.shape, generator=torch.Generator().manual_seed(2), dtype=value.dtype)
    gradients = torch.autograd.grad(value, leaves, unit)
    torch.testing.assert_close(gradients, torch.autograd.grad(function(*leaves), leaves, unit), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_updates_its_running_statistics_once(training):
    plain, module = (torch.nn.BatchNorm2d(2, momentum=0.3).double().train(training) for _ in range(2))
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    plain(x)
    with forward_ad.dual_level(), Corrections():
        module(forward_ad.make_dual(x, torch.ones_like(x)))
    torch.testing.assert_close(dict(module.named_buffers()), dict(plain.named_buffers()))


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 2, 1), {"training": True}, "more than 1 value per channel"),
        ((3, 2), {"training": False}, "running_mean must be defined"),
        ((3, 2), {"training": True, "eps": 0.0}, "eps"),
        ((3, 2), {"training": True, "running_mean": torch.zeros(3)}, "running_mean should contain 2 elements"),
        ((3,), {"training": True}, "2D|range"),
    ],
)
def test_what_batch_norm_cannot_normalize_is_torchs_error(shape, options, message):
    x, options = torch.randn(shape, dtype=torch.float64), {"running_mean": None, "running_var": None, **options}
    errors = ValueError, RuntimeError, IndexError
    with pytest.raises(errors, match=message) as expected:
        functional.batch_norm(x, **options)
    with forward_ad.dual_level(), Corrections(), pytest.raises(errors) as found:
        functional.batch_norm(forward_ad.make_dual(x, x), **options)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_of_an_empty_batch_is_empty(training):
    layer = torch.nn.BatchNorm1d(2).train(training)
    x = torch.zeros(0, 2)
    with forward_ad.dual_level(), Corrections():
        value, tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x)))
    assert value.shape == tangent.shape == (0, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_far_from_zero_the_tangent_of_batch_norm_is_rounded_once(dtype, training):
    x, weight, dx, dw = (torch.randn(shape, generator=torch.Generator().manual_seed(k)) for k, shape in enumerate(FAR))
    x = (x + 300.0).to(dtype)

    def normalized(x, weight):
        return functional.batch_norm(x, torch.full_like(weight, 300.0), torch.ones_like(weight), weight, None, training)

    _, expected = torch.func.jvp(normalized, (x.double(), weight.double()), (dx.to(dtype).double(), dw.double()))
    with forward_ad.dual_level(), Corrections():
        duals = forward_ad.make_dual(x, dx.to(dtype)), forward_ad.make_dual(weight, dw)
        _, tangent = forward_ad.unpack_dual(normalized(*duals))
    assert (tangent.double() - expected).abs().max() <= 2 * torch.finfo(dtype).eps * expected.abs().max()


FAR = (64, 3), (3,), (64, 3), (3,)


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if "evaluation" in layer or "layer" in layer])
def test_within_vmap_torchs_own_rules_apply(layer):
    values, tangents = drawn(layer), drawn(layer, seed=1)
    stacks = [torch.stack([value, 2 * value]) for value in values]
    with forward_ad.dual_level(), Corrections():
        duals = [forward_ad.make_dual(s, torch.stack([t, t])) for s, t in zip(stacks, tangents, strict=True)]
        found = forward_ad.unpack_dual(torch.vmap(LAYERS[layer][0])(*duals))
    expected = torch.func.jvp(LAYERS[layer][0], tuple(values), tuple(tangents))
    torch.testing.assert_close((found.primal[0], found.tangent[0]), expected)


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if "keywords" not in layer])
def test_the_graph_holds_on_to_no_tangent(layer):
    leaves = [value.requires_grad_() for value in drawn(layer)]
    with forward_ad.dual_level():
        first, *tangents = drawn(layer, seed=1)
        given = leaves[0] * 1.0  # an intermediate value, as inside a network
        with torch.no_grad():
            tangent = first.clone()
        held = StorageWeakRef(tangent.untyped_storage())
        value, made = dual(layer, [given, *leaves[1:]], [tangent, *tangents])
        assert value.requires_grad
        assert not made.requires_grad
        del tangent
        assert held.expired()


def test_each_rule_has_a_layer_here(monkeypatch):
    used = set()

    class Noted(dict):
        def get(self, func):
            used.add(func)
            return super().get(func)

    monkeypatch.setattr(forward_mode, "RULES", Noted(RULES))
    with forward_ad.dual_level():
        for layer in LAYERS:
            dual(layer, drawn(layer), drawn(layer, seed=1))
    assert used >= {*RULES}


def test_torchs_own_rule_would_hold_on_to_it():
    given = torch.randn(4, 2, requires_grad=True) * 1.0
    with forward_ad.dual_level():
        tangent = torch.ones(4, 2)
        held = StorageWeakRef(tangent.untyped_storage())
        value = functional.batch_norm(forward_ad.make_dual(given, tangent), None, None, training=True)
        del tangent
        assert not held.expired()
    assert value.requires_grad
