"""Low precision, against the plain float32 run; and gradient scalers, which must not be seen by any weighting."""

import copy
import functools

import pytest
import torch

from mtlweight import MGDA, Equal, MultiTaskOptimizer, SLGrad
from tests.optimizer.registered import (
    TASKS,
    Rounded,
    combined,
    every_engine,
    every_weighting,
    scaled,
    statistics,
    tasks_of,
    wrapped,
)
from tests.problems import same
from tests.zoo import close

LOW = [torch.bfloat16, torch.float16]
every_use = pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "parameters"])


def lowered(tasks, low, autocast, **options):
    """A problem in low precision: under autocast, or with parameters of that dtype."""
    return Rounded(tasks, low, torch.float32 if autocast else low, autocast=autocast, **options)


# What is measured


@every_use
@pytest.mark.parametrize("low", LOW)
@every_engine
def test_statistics_of_low_precision_are_those_of_float32_within_the_dtypes_rounding(engine, low, autocast, device):
    found = statistics(lowered(TASKS, low, autocast, device=device), engine)
    expected = statistics(Rounded(TASKS, low, device=device), engine)
    for name, values in found.items():
        assert close(values, expected[name], rounding=2 * torch.finfo(low).eps), name
    if engine != "features":
        rows = found["jacobian"].double()
        assert close(found["gramian"], rows @ rows.T, rounding=1e-6)


@every_use
@pytest.mark.parametrize(("scale", "reference"), [(-24, 0), (-12, -24), (12, 10), (17, 3)])
@every_engine
def test_no_gradient_in_float16_is_too_small_or_too_large_to_be_measured(engine, scale, reference, autocast, device):
    # Unscaled, float16 makes zero of less than 2^-25, and infinity of 2^16.
    def at(*exponents):
        p = lowered(TASKS, torch.float16, autocast, device=device)
        return statistics(p, engine, *(2.0**exponent for exponent in exponents))

    found, expected = at(scale, reference), at(0, 0)
    powers = {
        "losses": scale,
        "jacobian": scale,
        "gramian": 2 * scale,
        "alignment": scale + reference,
        "gradient": scale,
    }
    for name, values in expected.items():
        assert close(found[name], 2.0 ** powers[name] * values, rounding=2 * torch.finfo(torch.float16).eps), name


def halves(p, scale):
    """The losses in two parts."""
    return [
        lambda rows=rows: {t: scaled(x[rows], scale) for t, x in p.samples().items()} for rows in ([0, 1, 2, 3], [4, 5])
    ]


def whole(p, scale):
    return lambda: {t: scaled(x, scale) for t, x in p.samples().items()}


ROUTES = {
    "rows": (MGDA(), whole, {}),
    "rows of parts": (MGDA(), halves, {}),
    "sums of parts": (Equal(), halves, {}),
    "unweighted heads": (Equal(), whole, {"heads": "unweighted"}),
    "unweighted heads of parts": (Equal(), halves, {"heads": "unweighted"}),
    "outer parameters": (Equal(), whole, {"outer": "1"}),
    "the reference's own gradient": (SLGrad("0", learn_reference=True) >> MGDA(), whole, {}),
    "a step ahead": (SLGrad("0", lookahead=True), whole, {}),
}


@pytest.mark.parametrize(("weighting", "losses", "options"), ROUTES.values(), ids=ROUTES)
def test_what_combine_differentiates_itself_is_not_too_small_for_float16(weighting, losses, options, device):
    def run(scale):
        p = Rounded(TASKS, torch.float16, autocast=True, device=device)
        named = {key: p.model.heads[value] if key == "outer" else value for key, value in options.items()}
        optimizer = wrapped(p, weighting, lr=0.1 / scale, **named)
        scalar = optimizer.combine(losses(p, scale), reference=lambda: scaled(sum(p.samples(50).values()), scale))
        (scalar / scale).backward()
        optimizer.step()
        return [optimizer.report.weights, *p.gradients().values()]

    for found, expected in zip(run(2.0**-24), run(1.0), strict=True):
        assert close(found, expected, rounding=3 * torch.finfo(torch.float16).eps)


@every_use
def test_tiny_weights_of_samples_make_no_tiny_gradients_in_float16(autocast, device):
    weights = []
    for total in (1.0, 2.0**-20):
        p = lowered(TASKS, torch.float16, autocast, device=device)
        optimizer = wrapped(p, SLGrad("0", total=total) >> MGDA())
        optimizer.combine(p.samples, reference=p.reference).backward()
        optimizer.step()
        weights.append(optimizer.report.weights / total)
    assert close(*weights, rounding=4 * torch.finfo(torch.float16).eps)


@pytest.mark.parametrize("low", LOW)
def test_the_average_of_references_is_not_rounded_to_the_parameters_low_precision(low, device):
    # In bfloat16, steps towards 2 would be rounded to nothing from 1.6 on.
    weight = torch.ones((), dtype=low, device=device, requires_grad=True)
    optimizer = MultiTaskOptimizer(torch.optim.SGD([weight], lr=0.0), SLGrad("0", ema=0.99), shared=weight)
    for k in range(200):
        optimizer.combine({"0": weight.expand(2)}, reference=weight * (2 if k else 1)).backward()
        optimizer.step()
    expected = torch.full((1, 2), 2 - 0.99**199, device=device)
    assert close(optimizer.report.alignment, expected, rounding=torch.finfo(low).eps)


# The step


def taken(case, p, steps=2, scale=1.0, loss_scale=1.0, reference_scale=1.0, **options):
    """Weights and gradients of some steps. The loss scale is taken back by the scaler."""
    optimizer = wrapped(p, case.weighting, **options)
    scaler = torch.amp.GradScaler(p.device, init_scale=loss_scale, enabled=loss_scale != 1)
    found = []
    for k in range(steps):
        scaler.scale(combined(optimizer, p, k, scale, reference_scale)).backward()
        scaler.unscale_(optimizer)
        gradients = {name: g for name, g in p.gradients().items() if g is not None}
        scaler.step(optimizer)
        scaler.update()
        flat = torch.cat([g.flatten() for g in gradients.values()])
        found.append((optimizer.report.weights, flat.double()))
    return found


def distances(found, expected):
    """The largest difference of each step's weights, and of its gradient."""
    pairs = [pair for steps in zip(found, expected, strict=True) for pair in zip(*steps, strict=True)]
    return torch.tensor([float((a - b).abs().max()) for a, b in pairs])


@pytest.mark.parametrize("low", LOW)
@every_weighting
def test_weights_and_gradients_of_low_precision_are_those_of_float32_within_the_dtypes_rounding(case, low, device):
    # What rounding may do is what a change of all numbers by four roundings does to the float32 run.
    eps, tasks = torch.finfo(low).eps, tasks_of(case)
    # Tiny losses, which float16 needs a scaler for, at a loss scale that such a scaler would arrive at; and a step that
    # is as long all the same where it can be, for those that look at the losses after it.
    use, degree = case.weighting.reference, case.weighting.traits.scale_degree
    power = 16 * (1 + (degree or 0))
    tiny = {"scale": 2.0**-16, "loss_scale": 2.0 ** (power - 6), "lr": 0.1 if degree is None else 0.1 * 2.0**power}
    tiny["reference_scale"] = 2.0**-16 if use and use.learn else 1.0

    @functools.cache
    def plain(scaling):
        options = tiny if scaling else {}
        exact, *noisy = (
            taken(case, Rounded(tasks, low, device=device, noise=noise * eps, seed=seed), **options)
            for seed, noise in enumerate((0, 4, 4))
        )
        sizes = distances(exact, [[0 * value for value in step] for step in exact])
        return exact, 3 * torch.stack([distances(run, exact) for run in noisy]).amax(dim=0) + 4 * eps * sizes

    for autocast in (True, False):
        scaling = autocast and low == torch.float16
        exact, bounds = plain(scaling)
        found = taken(case, lowered(tasks, low, autocast, device=device), **(tiny if scaling else {}))
        assert (distances(found, exact) <= bounds).all(), autocast


# Loss scales


@pytest.mark.parametrize(("low", "power"), [(None, 24), (torch.bfloat16, 11)], ids=["float32", "bfloat16 autocast"])
@every_weighting
def test_a_loss_scale_scales_the_gradient_alone_and_leaves_weights_state_and_step_as_they_are(case, low, power):
    def run(scale):
        p = Rounded(tasks_of(case), low or torch.float32, autocast=low is not None)
        optimizer, gradients = wrapped(p, case.weighting), []
        for k in range(2):
            (scale * combined(optimizer, p, k)).backward()
            gradients.append(p.gradients())
            for parameter in p.model.parameters():
                if parameter.grad is not None:
                    parameter.grad /= scale
            optimizer.step()
        return gradients, optimizer, p.parameters()

    plain, optimizer, parameters = run(1.0)
    large, other, others = run(2.0**power)
    back = [{name: None if g is None else g / 2.0**power for name, g in step.items()} for step in large]
    assert same(back, plain)  # powers of two are exact
    assert same(other.state_dict(), optimizer.state_dict())
    assert same(other.report.weights, optimizer.report.weights)
    assert same(others, parameters)


def everything(optimizer, p):
    """All that a skipped step must leave alone; the gradients are not among it."""
    use = optimizer.weighting.reference
    # SLGrad's replay of its official code takes a real step ahead while it measures, which nobody takes back.
    parameters = None if use and use.lookahead == "stay" else p.parameters()
    return copy.deepcopy({"parameters": parameters, "state": optimizer.state_dict(), "report": vars(optimizer.report)})


@every_weighting
def test_a_step_that_the_gradient_scaler_skips_changes_nothing(case, device):
    p = Rounded(tasks_of(case), torch.float16, autocast=True, device=device)
    optimizer = wrapped(p, case.weighting)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**8)

    def step(k, scale=1.0):
        scaler.scale(scale * combined(optimizer, p, k)).backward()
        scaler.step(optimizer)
        scaler.update()

    step(0)
    assert optimizer.report.step == 1
    before = everything(optimizer, p)
    step(1, 2.0**127)  # infinite in the backward alone
    assert scaler.get_scale() == 2.0**7
    assert same(everything(optimizer, p), before)
    other, model, skipping = copy.deepcopy((optimizer, p, scaler))
    step(2)
    assert optimizer.report.step == 2
    skipping.scale(combined(other, model, 2)).backward()
    skipping.unscale_(other)
    other.step()
    assert same(everything(optimizer, p), everything(other, model))
