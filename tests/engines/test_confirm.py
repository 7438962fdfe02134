"""What an engine measures is what ordinary backwards say, or another engine takes over with a warning."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import mtlweight
from mtlweight import MultiTaskOptimizer, Needs, SLGrad
from mtlweight.engines.confirm import coefficients
from tests.zoo import close

pytestmark = pytest.mark.filterwarnings(
    "ignore:There is a performance drop because we have not yet:UserWarning",
    "ignore:index_reduce.. is in beta:UserWarning",
    "ignore:The PyTorch API of:UserWarning",
    "ignore:std.. degrees of freedom is <= 0:UserWarning",
)

SAMPLES = 6
RANDOM = torch.Generator().manual_seed(1)
X, TANGENT, IMAGES = (torch.randn(*shape, dtype=torch.float64, generator=RANDOM) for shape in [(6, 4), (8, 4), (8, 4)])
WORDS = torch.tensor([[0, 1, 2], [3, 0, 3], [2, 2, 2], [1, 5, 6], [4, 3, 2], [6, 6, 0]])
PLACES = torch.tensor([[0, 0, 1, 1, 2, 2, 0, 1], [2, 1, 0, 2, 1, 0, 2, 2], [0, 1, 2, 0, 1, 2, 0, 1]]).repeat(2, 1)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
TARGETS = (X[:, :1] > 0).double().expand(-1, 8)


def y(w):
    """``[6, 8]``, with both signs."""
    return X @ w.T


def image(w):
    return y(w).view(SAMPLES, 2, 2, 2)


def matrix(w):
    return y(w)[:, :4].view(SAMPLES, 2, 2)


def tied(w, **options):
    """An embedding whose table is the head's weight too."""
    return (functional.embedding(WORDS, w, **options).mean(dim=1) @ w.T).sin().sum(dim=1)


def bag(w, **options):
    return (functional.embedding_bag(WORDS, w, **options) @ w.T).sin().sum(dim=1)


def reduced(w, how, include_self):
    base = 0.5 + y(w)[:, :3].relu()
    return base.scatter_reduce(1, PLACES, y(w).relu(), how, include_self=include_self).sin().sum(dim=1)


def grid(w):
    places = torch.linspace(-1.2, 1.2, 9, dtype=w.dtype).view(1, 3, 3, 1).expand(SAMPLES, 3, 3, 2)
    return places + 0.05 * y(w)[:, :1].view(SAMPLES, 1, 1, 1)


def ctc(w):
    scores = functional.log_softmax(y(w).view(SAMPLES, 4, 2), dim=2).transpose(0, 1)
    lengths = torch.full((SAMPLES,), 4), torch.ones(SAMPLES, dtype=torch.long)
    return functional.ctc_loss(scores, torch.ones(SAMPLES, 1, dtype=torch.long), *lengths, reduction="none")


def recurrent(kind):
    def of(w):
        layer = kind(4, 8, batch_first=True, dtype=w.dtype)
        options = {name: torch.full_like(p, 0.3) for name, p in layer.named_parameters()}
        options["weight_ih_l0"] = w.repeat(len(layer.weight_ih_l0) // 8, 1)
        return torch.func.functional_call(layer, options, (torch.stack([X, X.sin()], 1),))[0].sum(dim=(1, 2))

    return of


def seeded(function):
    def of(w):
        torch.manual_seed(3)
        return function(w)

    return of


def put(w):
    places = torch.arange(SAMPLES)[:, None].expand_as(PLACES), PLACES
    return torch.zeros(SAMPLES, 3, dtype=w.dtype).index_put(places, y(w)).sin().sum(dim=1)


OPERATORS = {
    "embedding, tied": tied,
    "embedding with padding, tied": lambda w: tied(w, padding_idx=2),
    "embedding with padding counted from the end, tied": lambda w: tied(w, padding_idx=-2),
    "embedding scaled by frequency, tied": lambda w: tied(w, scale_grad_by_freq=True),
    "embedding with padding, scaled, tied": lambda w: tied(w, padding_idx=2, scale_grad_by_freq=True),
    "embedding of limited norm, tied": lambda w: tied(w, max_norm=1.0),
    **{f"bag, {mode}, tied": lambda w, mode=mode: bag(w, mode=mode) for mode in ("sum", "mean", "max")},
    "bag with padding": lambda w: bag(w, mode="sum", padding_idx=2),
    "bag scaled by frequency": lambda w: bag(w, mode="sum", scale_grad_by_freq=True),
    **{
        f"scatter_reduce {how}, {include}": lambda w, how=how, include=include: reduced(w, how, include)
        for how in ("sum", "prod", "mean", "amax", "amin")
        for include in (True, False)
    },
    "scatter onto one place": lambda w: torch.zeros(6, 3, dtype=w.dtype).scatter(1, PLACES, y(w)).sin().sum(dim=1),
    "index_put onto one place": put,
    "cdist at 0": lambda w: torch.cdist(y(w), y(w)).sum(dim=1),
    "cdist of order 3 at 0": lambda w: torch.cdist(y(w), y(w), p=3).sum(dim=1),
    "product with zeros": lambda w: y(w).relu().prod(dim=1) + y(w)[:, :2].relu().prod(dim=1),
    "product with one zero": lambda w: (y(w) * (torch.arange(8) > 0)).prod(dim=1),
    "cumulated product with zeros": lambda w: (y(w) * (torch.arange(8) % 3 > 0)).cumprod(dim=1).sum(dim=1),
    "cumulated maximum with ties": lambda w: y(w).relu().cummax(dim=1)[0].sum(dim=1),
    "logcumsumexp": lambda w: y(w).relu().logcumsumexp(dim=1).sum(dim=1),
    "maximum with ties": lambda w: y(w).relu().neg().max(dim=1)[0] + y(w).sum(dim=1),
    "largest value with ties": lambda w: y(w).relu().neg().amax(dim=1) + y(w).sum(dim=1),
    "largest of all with ties": lambda w: y(w).relu().neg().max() + y(w).sum(dim=1),
    "median with ties": lambda w: y(w).relu().median(dim=1)[0] + y(w).relu().sort(dim=1)[0][:, -2],
    "norm at 0": lambda w: torch.linalg.vector_norm(0 * y(w), dim=1) + y(w).sum(dim=1),
    "norm of order 3 at 0": lambda w: torch.linalg.vector_norm(0 * y(w), 3, dim=1) + y(w).sum(dim=1),
    "norm of order 1 at 0": lambda w: torch.linalg.vector_norm(y(w).relu(), 1, dim=1),
    "standard deviation at 0": lambda w: (0 * y(w)).std(dim=1) + y(w).sum(dim=1),
    "root at 0": lambda w: y(w).relu().sqrt().sum(dim=1),
    "power at 0": lambda w: (y(w).relu() ** 0.5).sum(dim=1),
    "power of a power at 0": lambda w: (y(w).relu() ** y(w).relu()).sum(dim=1),
    "atan2 at 0": lambda w: torch.atan2(y(w).relu(), y(w).relu()).sum(dim=1),
    "hypot at 0": lambda w: torch.hypot(y(w).relu(), y(w).relu()).sum(dim=1),
    "sinc at 0": lambda w: torch.sinc(y(w).relu()).sum(dim=1),
    "entropy at 0": lambda w: torch.special.entr(y(w).relu()).sum(dim=1),
    "logarithm at 0, replaced": lambda w: y(w).relu().log().nan_to_num(neginf=0.0).sum(dim=1),
    "clamp at its bounds": lambda w: y(w).clamp(y(w).detach().amin(), y(w).detach().median()).sum(dim=1),
    "saturated sigmoid": lambda w: functional.binary_cross_entropy(
        (1e3 * y(w)).sigmoid(), TARGETS, reduction="none"
    ).sum(dim=1),
    "saturated softmax": lambda w: functional.cross_entropy(1e3 * y(w), LABELS, reduction="none"),
    "labels to ignore": lambda w: functional.cross_entropy(y(w), LABELS, reduction="none", ignore_index=1),
    "hinge": lambda w: functional.multi_margin_loss(y(w), LABELS, reduction="none"),
    "CTC": ctc,
    "pooling with ties": lambda w: functional.max_pool2d(image(w).relu(), 2).flatten(1).sum(dim=1),
    "pooling by a norm": lambda w: functional.lp_pool2d(image(w).relu(), 2, 2).flatten(1).sum(dim=1),
    **{
        f"grid_sample, {mode}": lambda w, mode=mode: (
            functional.grid_sample(image(w), grid(w), mode=mode, align_corners=False).sin().flatten(1).sum(dim=1)
        )
        for mode in ("bilinear", "nearest", "bicubic")
    },
    **{
        f"interpolate, {mode}": lambda w, mode=mode: (
            functional.interpolate(image(w), size=(5, 3), mode=mode).sin().flatten(1).sum(dim=1)
        )
        for mode in ("nearest", "bilinear", "bicubic", "area")
    },
    "determinant": lambda w: torch.linalg.det(matrix(w)),
    "singular values": lambda w: torch.linalg.svdvals(matrix(w)).sum(dim=1),
    "inverse": lambda w: torch.linalg.inv(matrix(w)).sum(dim=(1, 2)),
    "overlapping view": lambda w: y(w).as_strided((6, 3, 2), (8, 1, 1)).sin().sum(dim=(1, 2)),
    "dropout of everything": seeded(lambda w: functional.dropout(y(w), 1.0).sum(dim=1) + y(w).sin().sum(dim=1)),
    "straight-through gumbel": seeded(lambda w: (functional.gumbel_softmax(y(w), hard=True) * y(w)).sum(dim=1)),
    "sample of a gamma": seeded(lambda w: torch.distributions.Gamma(y(w).exp(), 1.0).rsample().sum(dim=1)),
    "sample of a Dirichlet": seeded(lambda w: torch.distributions.Dirichlet(y(w).exp()).rsample()[:, 0]),
    "GRU": recurrent(nn.GRU),
    "LSTM": recurrent(nn.LSTM),
}


class Weights(nn.Module):
    def __init__(self):
        super().__init__()
        values = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        self.w = nn.Parameter(values)


def ordinary(losses, w):
    """Each sample's gradient, by a backward of its own."""
    found = [torch.autograd.grad(sample, w, retain_graph=True)[0] for row in losses.values() for sample in row]
    return torch.stack(found).view(len(losses), -1, *w.shape)


@mtlweight.weighting(Needs.ALIGNMENT | Needs.SAMPLES, writes="sample")
def aligned(view):
    return torch.ones_like(view.sample_alignment)


@mtlweight.weighting(Needs.JACOBIAN)
def read(view):
    return view.jacobian.sum(dim=1)


def step(model, losses, weighting, engine, optimizer=None):
    """The report of one step, and what it warned of."""
    optimizer = optimizer or optimizer_of(model, weighting, engine)

    def reference():
        return (TANGENT.to(model.w.dtype) * model.w).sum()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.combine(losses, reference=reference).backward()
        optimizer.step()
    return optimizer.report, [str(each.message) for each in caught if str(each.message).startswith("mtlweight: ")]


def optimizer_of(model, weighting, engine, **options):
    return MultiTaskOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), weighting, shared=model, engine=engine, **options
    )


@pytest.mark.parametrize("engine", ["forward", "pullback", "samples", "batched"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_engine_finds_what_ordinary_backwards_find_or_says_that_another_one_ran(operator, engine):
    model = Weights()

    def losses():
        return {"one": OPERATORS[operator](model.w), "two": y(model.w).sin().sum(dim=1)}

    expected = ordinary(losses(), model.w)
    assert expected.isfinite().all()
    report, messages = step(model, losses, read if engine == "batched" else aligned, engine)
    found = report.weights if engine == "batched" else report.alignment
    expected = expected.mean(dim=1).sum(dim=(1, 2)) if engine == "batched" else (expected * TANGENT).sum(dim=(2, 3))
    assert close(found, expected, 1e-7)
    assert bool(messages) == bool(report.fallbacks) == (report.engine != engine)


@pytest.mark.parametrize("engine", ["samples", "batched"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_engine_finds_the_rows_of_ordinary_backwards_or_says_that_another_one_ran(operator, engine):
    model, seen = Weights(), []

    @mtlweight.weighting(Needs.JACOBIAN)
    def reads(view):
        seen.append(view.jacobian)
        return torch.ones(2)

    def losses():
        return {"one": OPERATORS[operator](model.w), "two": y(model.w).sin().sum(dim=1)}

    report, messages = step(model, losses, reads, engine)
    assert close(seen[0], ordinary(losses(), model.w).mean(dim=1).flatten(1), 1e-7)
    assert bool(messages) == bool(report.fallbacks) == (report.engine != engine)


@pytest.mark.parametrize("padding", [2, -2])
@pytest.mark.parametrize("scaled", [False, True])
def test_forward_itself_has_the_derivative_of_an_embedding_that_its_backward_has(padding, scaled):
    model = Weights()
    options = {"padding_idx": padding, "scale_grad_by_freq": scaled}
    report, _ = step(model, lambda: {"one": tied(model.w, **options)}, aligned, "forward")
    assert (report.engine, dict(report.fallbacks)) == ("forward", {})
    expected = (ordinary({"one": tied(model.w, **options)}, model.w) * TANGENT).sum(dim=(2, 3))
    assert close(report.alignment, expected)


@pytest.mark.parametrize("engine", ["forward", "pullback"])
def test_a_rare_branch_is_confirmed_when_it_first_appears(engine):
    """Two samples of many take it, at the 6th use; the same operator with another option has long been confirmed."""
    model, x = Weights(), torch.randn(64, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    optimizer, places = optimizer_of(model, aligned, engine), torch.tensor([[0, 0, 1, 1, 2, 2, 0, 1]])

    def losses(how):
        z = 1.5 + 0.1 * (x @ model.w.T).tanh()
        sums = torch.zeros(64, 3, dtype=z.dtype).scatter_reduce(1, places.expand(64, 8), z, "sum")
        rare = torch.ones(2, 3, dtype=z.dtype).scatter_reduce(1, places.expand(2, 8), z[:2], how)
        return {"one": torch.cat([0.01 * rare + sums[:2], sums[2:]]).sum(dim=1)}

    for how in 5 * ["sum"] + ["prod"]:
        report, messages = step(model, lambda how=how: losses(how), None, engine, optimizer)
        assert bool(messages) == (how == "prod" and engine == "forward")  # the other one has this derivative
        assert close(report.alignment, (ordinary(losses(how), model.w) * TANGENT).sum(dim=(2, 3)))


def test_an_embedding_that_pullback_has_wrong_for_repeated_words_is_confirmed_each_time():
    model = Weights()
    optimizer = optimizer_of(model, aligned, "pullback")

    def losses(words):
        table = functional.embedding(words, model.w, scale_grad_by_freq=True)
        return {"one": (table.mean(dim=1) @ model.w.T).sin().sum(dim=1)}

    once, often = torch.arange(8).view(4, 2), torch.zeros(4, 2, dtype=torch.long)
    for words in [*5 * [once], often]:
        report, messages = step(model, lambda words=words: losses(words), None, "pullback", optimizer)
        assert bool(messages) == (words is often)
        assert close(report.alignment, (ordinary(losses(words), model.w) * TANGENT).sum(dim=(2, 3)))


class Wrong(torch.autograd.Function):
    """The identity, whose forward derivative is multiplied by given factors."""

    @staticmethod
    def forward(ctx, x, factors):
        ctx.factors = factors
        return x.clone()

    @staticmethod
    def backward(_ctx, incoming):
        return incoming, None

    @staticmethod
    def jvp(ctx, tangent, _factors):
        return ctx.factors * tangent


def wrong_by(factors, dtype=torch.float64, scale=1.0):
    """The step's report where one task's forward derivatives are wrong by these factors, beside a larger task."""
    model = Weights().to(dtype)
    x = torch.randn(len(factors), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).to(dtype)

    def losses():
        outputs = (x @ model.w.T).tanh().sum(dim=1)
        return {"one": scale * Wrong.apply(outputs, factors.to(dtype)), "two": (x @ model.w.T).square().sum(dim=1)}

    return step(model, losses, aligned, "forward")[0]


RIGHT = wrong_by(torch.ones(64)).alignment[0]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-6), (torch.float32, 0.1)])
@given(st.integers(0, 63))
def test_an_error_in_a_single_sample_of_a_single_task_is_noticed(dtype, error, scale, sample):
    """Relative to the task's largest alignment, where there are 64 samples and two tasks."""
    factors = torch.ones(64, dtype=torch.float64)
    factors[sample] += error * RIGHT.abs().max() / RIGHT[sample]
    assert wrong_by(factors, dtype, scale).engine == "pullback"


@given(st.integers(0, 63), st.integers(0, 62))
@example(0, 0)
def test_errors_that_cancel_in_the_sum_of_all_alignments_are_noticed(sample, offset):
    other = (sample + 1 + offset) % 64
    factors = torch.ones(64, dtype=torch.float64)
    factors[sample] += 1e-3 / RIGHT[sample]
    factors[other] -= 1e-3 / RIGHT[other]
    assert wrong_by(factors).engine == "pullback"


@pytest.mark.parametrize("scale", [1e-8, 1.0])
def test_a_task_whose_derivatives_are_lost_is_noticed_however_small_it_is(scale):
    assert wrong_by(torch.zeros(64), scale=scale).engine == "pullback"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("engine", ["forward", "pullback", "samples"])
@given(st.integers(0, 2**32))
def test_rounding_alone_makes_no_engine_fall_back(dtype, engine, seed):
    generator = torch.Generator().manual_seed(seed)
    model = Weights().to(dtype)
    x = torch.randn(16, 4, generator=generator).to(dtype)
    deep = torch.randn(4, 8, 8, generator=generator).to(dtype) / 3

    def losses():
        z = x @ model.w.T
        for weight in deep:
            z = functional.layer_norm(torch.tanh(z @ weight), (8,))
        labels = torch.arange(16) % 8
        return {"one": functional.cross_entropy(z.float(), labels, reduction="none"), "two": z.square().mean(dim=1)}

    report, messages = step(model, losses, aligned, engine)
    assert (report.engine, messages) == (engine, [])


class Batched(torch.autograd.Function):
    """The identity, whose backward is another one where several run at once: as by a wrong batching rule."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, incoming):
        functorch = torch._C._functorch
        several = functorch.peek_interpreter_stack() is not None or functorch.is_legacy_batchedtensor(incoming)
        return incoming * ctx.factor if several else incoming, None


@pytest.mark.parametrize("factor", [1.01, torch.nan, torch.inf])
@pytest.mark.parametrize("engine", ["samples", "batched"])
@pytest.mark.parametrize("scale", [1e-6, 1.0])
def test_rows_that_are_not_those_of_ordinary_backwards_are_measured_again(engine, factor, scale):
    model, seen = Weights(), []
    weighting = mtlweight.weighting(Needs.JACOBIAN)(lambda view: seen.append(view.jacobian) or torch.ones(2))

    def losses(factor):
        return {"one": scale * Batched.apply(y(model.w).sin(), factor).mean(dim=1), "two": y(model.w).square().mean(1)}

    optimizer = optimizer_of(model, weighting, engine)
    for count in (1, 2):
        report, messages = step(model, lambda: losses(factor), None, engine, optimizer)
        assert (report.engine, [*report.fallbacks.values()], len(messages)) == ("rows", [count], 2 - count)
    for rows in seen:
        assert close(rows[0], ordinary(losses(1.0), model.w)[0].mean(dim=0).flatten())


def test_what_is_not_finite_in_ordinary_backwards_either_is_no_fault_of_the_engine():
    model = Weights()

    def losses():
        return {"one": y(model.w).sin().sum(dim=1), "two": (0 * y(model.w)).sqrt().sum(dim=1)}

    for weighting, engine in [(aligned, "forward"), (aligned, "pullback"), (aligned, "samples"), (read, "batched")]:
        optimizer = optimizer_of(model, weighting, engine)
        with pytest.raises(mtlweight.NonFiniteError, match="of task two is not finite"):
            step(model, losses, None, engine, optimizer)
        # Where several backwards run at once, NaN of one task spreads to the other.
        assert bool(optimizer.report.fallbacks) == (engine in ("samples", "batched"))


BATCHES = [1e4 * X[:3], 0.1 * X[3:]]
SATURATED = {
    "at once": (
        SLGrad("main"),
        lambda parts: lambda: {t: torch.cat([part()[t] for part in parts]) for t in parts[0]()},
    ),
    "in parts": (SLGrad("main"), lambda parts: parts),
    "one step ahead": (SLGrad("main", lookahead="both"), lambda parts: parts[0]),
}


@pytest.mark.parametrize("case", SATURATED)
@pytest.mark.parametrize("engine", ["auto", "pullback", "samples"])
@pytest.mark.parametrize("policy", ["raise", "drop"])
def test_a_saturated_sigmoid_trains_on_as_by_ordinary_backwards(case, engine, policy):
    found = []
    for each in (engine, "rows"):
        weighting, form = SATURATED[case]
        model = Weights()
        optimizer = MultiTaskOptimizer(
            torch.optim.SGD(model.parameters(), lr=1e-3), weighting, shared=model, engine=each, on_nonfinite=policy
        )

        def part(x, model=model):
            def losses():
                p = (x @ model.w.T).sigmoid()
                wrong = (p.detach() < 0.5).double()
                main = functional.binary_cross_entropy(p[:, :4], 1 - wrong[:, :4], reduction="none").mean(dim=1)
                return {"main": main, "other": (x @ model.w.T).tanh().mean(dim=1)}

            return losses

        for _ in range(3):
            report, _ = step(model, form([part(x) for x in BATCHES]), None, each, optimizer)
        assert (report.step, report.skipped, dict(report.dropped)) == (3, 0, {})
        found.append((report.alignment, model.w.detach().clone()))
    assert all(close(a, b, 1e-7) for a, b in zip(*found, strict=True))


def test_confirming_draws_no_random_numbers_and_the_coefficients_have_both_signs():
    state = torch.get_rng_state()
    found = coefficients(1000, 7)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found, coefficients(1000, 7))
    assert not torch.equal(found, coefficients(1000, 8))
    assert 400 < int((found > 0).sum()) < 600
    assert ((found.abs() >= 0.5) & (found.abs() <= 1)).all()
