"""The gradient engines, against one ordinary backward a task."""

import functools
import re

import pytest
import torch

import mtlweight
from mtlweight import (
    MGDA,
    AutoLambda,
    Constant,
    GradDrop,
    MTLWeightError,
    MultiTaskOptimizer,
    Needs,
    NonFiniteError,
    SLGrad,
)
from mtlweight._statistics import all_finite, gramian_of
from mtlweight.engines import jacobian as kept
from tests.benchmarks._measure import MIB, peak_memory
from tests.zoo import BAG, NETWORKS, SEED, Problem, close, jacobian, problem, written

# Some operators' backward has no batching rule: torch loops over it and says so, once in a process.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet:UserWarning")

ENGINES = ("auto", "rows", "batched", "samples")
WEIGHTS = (0.3, -1.7)
FORMS = {
    "mapping": lambda losses: losses(),
    "tensor": lambda losses: torch.stack([*losses().values()]),
    "callable": lambda losses: losses,
}

networks = pytest.mark.parametrize("network", NETWORKS)
engines = pytest.mark.parametrize("engine", ENGINES)


def seeded(call):
    """Dropout draws the same masks each time."""
    torch.manual_seed(SEED)
    return call()


class Reader:
    """A weighting that keeps what it reads and answers with fixed weights."""

    def __init__(self, needs=Needs.JACOBIAN | Needs.GRAMIAN, weights=WEIGHTS, writes="task"):
        self.views = []

        @mtlweight.weighting(needs, writes=writes)
        def fixed(view):
            read = (n.name for n in Needs if n.value and n in needs and n is not Needs.SAMPLES)
            self.views.append({name: getattr(view, name.lower()) for name in read})
            return torch.as_tensor(weights, dtype=view.dtype, device=view.device)

        self.weighting = fixed

    def read(self, p: Problem, losses, **options):
        """What the view shows; ``.grad`` holds what the backward wrote."""
        optimizer = MultiTaskOptimizer(
            torch.optim.SGD(p.model.parameters(), lr=0.0), self.weighting, **{"shared": p.model.encoder, **options}
        )
        seeded(lambda: optimizer.combine(losses() if callable(losses) else losses)).backward()
        optimizer.step()
        self.report = optimizer.report
        return self.views[-1]


def of_equal(network, losses, device):
    """The Jacobians over shared parameters and over heads, of an equal problem."""
    p = problem(NETWORKS[network], device=device)
    found = seeded(getattr(p, losses))
    means = {task: loss.mean() for task, loss in found.items()}
    return jacobian(means, p.shared), jacobian(means, p.heads)


def has_the_rows_of_ordinary_backwards(network, engine, form, device):
    p = problem(NETWORKS[network], device=device)
    view = Reader().read(p, lambda: FORMS[form](p.task_losses), engine=engine)
    expected, _ = of_equal(network, "task_losses", device)
    return close(view["JACOBIAN"], expected) and close(view["GRAMIAN"], expected @ expected.T)


@networks
@engines
def test_jacobian_and_gramian_are_those_of_one_backward_a_task(network, engine, device):
    assert has_the_rows_of_ordinary_backwards(network, engine, "callable", device)


@engines
@pytest.mark.parametrize("form", ["mapping", "tensor"])
def test_jacobian_and_gramian_of_computed_losses_are_the_same(form, engine, device):
    assert has_the_rows_of_ordinary_backwards("convolutions and BatchNorm", engine, form, device)


@networks
@engines
def test_a_loss_for_each_sample_counts_by_its_mean(network, engine, device):
    p = problem(NETWORKS[network], device=device)
    view = Reader().read(p, p.sample_losses, engine=engine)
    assert close(view["JACOBIAN"], of_equal(network, "sample_losses", device)[0])


@pytest.mark.parametrize(
    ("network", "engine"),
    [(n, e) for n in NETWORKS for e in (*ENGINES, "features") if (n, e) != ("tied parameters", "features")],
)
@pytest.mark.parametrize("heads", ["weighted", "unweighted"])
def test_backward_writes_the_weighted_rows_and_the_heads_gradient_of_the_chosen_kind(network, engine, heads, device):
    p = problem(NETWORKS[network], device=device)
    reader = Reader(Needs.GRAMIAN)
    reader.read(p, p.task_losses, engine=engine, heads=heads)
    shared, others = of_equal(network, "task_losses", device)
    weights = torch.tensor(WEIGHTS, dtype=torch.float64, device=device)
    assert close(written(p.shared), weights @ shared)
    assert close(written(p.heads), (weights if heads == "weighted" else torch.ones_like(weights)) @ others)
    assert reader.report.engine == ("rows" if engine == "auto" else engine)


@networks
@engines
def test_weights_for_gradient_entries_multiply_the_rows_and_leave_the_heads_alone(network, engine, device):
    p = problem(NETWORKS[network], device=device)
    shared, others = of_equal(network, "task_losses", device)
    weights = torch.linspace(-1, 1, shared.numel(), dtype=torch.float64, device=device).reshape(shared.shape)
    Reader(Needs.JACOBIAN, weights, "entry").read(p, p.task_losses, engine=engine)
    assert close(written(p.shared), (weights * shared).sum(dim=0))
    assert close(written(p.heads), others.sum(dim=0))


def test_a_weighting_per_entry_may_read_the_gramian_alone():
    p = problem(NETWORKS["linear"])
    rows, _ = of_equal("linear", "task_losses", "cpu")
    weights = torch.linspace(-1, 1, rows.numel(), dtype=torch.float64).reshape(rows.shape)
    Reader(Needs.GRAMIAN, weights, "entry").read(p, p.task_losses)
    assert close(written(p.shared), (weights * rows).sum(dim=0))


@networks
@engines
def test_behind_weights_for_samples_the_rows_are_those_of_the_weighted_totals(network, engine, device):
    p = problem(NETWORKS[network], device=device)
    on_samples = torch.linspace(0.5, 2, 12, dtype=torch.float64, device=device).reshape(2, 6)
    first, then = Reader(Needs.NOTHING, on_samples, "sample"), Reader()
    both = Reader()
    both.weighting, both.views = first.weighting >> then.weighting, then.views
    view = both.read(p, p.sample_losses, engine=engine)
    other = problem(NETWORKS[network], device=device)
    losses = torch.stack([*seeded(other.sample_losses).values()])
    totals = dict(enumerate((on_samples * losses).sum(dim=1)))
    assert close(view["JACOBIAN"], jacobian(totals, other.shared))
    weights = torch.tensor(WEIGHTS, dtype=torch.float64, device=device)
    assert close(written(p.shared), weights @ jacobian(totals, other.shared))
    assert close(written(p.heads), weights @ jacobian(totals, other.heads))


@pytest.mark.parametrize("network", [name for name in NETWORKS if name != "tied parameters"])
def test_features_measures_the_gramian_at_the_shared_representation(network, device):
    p = problem(NETWORKS[network], device=device)
    view = Reader(Needs.GRAMIAN).read(p, lambda: p.task_losses, engine="features")
    other = problem(NETWORKS[network], device=device)
    represented = seeded(lambda: other.model.encoder(other.x))
    losses = {task: loss.mean() for task, loss in other.score(other.model.decode(represented)).items()}
    rows = jacobian(losses, list(represented) if isinstance(represented, tuple) else [represented])
    assert close(view["GRAMIAN"], rows @ rows.T)


def test_features_bounds_the_gramian_of_the_parameters_by_the_norm_of_the_encoder(device):
    p = problem(NETWORKS["linear"], device=device)
    gramians = [
        Reader(Needs.GRAMIAN).read(p, p.task_losses, engine=engine)["GRAMIAN"] for engine in ("rows", "features")
    ]
    encoder = torch.autograd.functional.jacobian(
        lambda weight, bias: torch.func.functional_call(p.model.encoder, {"0.weight": weight, "0.bias": bias}, (p.x,)),
        tuple(p.shared),
    )
    norm = torch.linalg.matrix_norm(torch.cat([part.reshape(24, -1) for part in encoder], dim=1), 2)
    gap = norm**2 * gramians[1] - gramians[0]
    assert torch.linalg.eigvalsh(gap).min() >= -1e-12 * gap.abs().max()


class Pyramid(torch.nn.Module):
    """Puts out what it has after each of three layers."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(3, 3, dtype=torch.float64) for _ in range(3))

    def forward(self, x):
        levels = []
        for layer in self.layers:
            x = torch.tanh(layer(x))
            levels.append(x)
        return levels


def features_of(encoder, losses, shared=None):
    """The Gramian at the outputs of the encoder's modules."""
    optimizer = MultiTaskOptimizer(
        torch.optim.SGD(encoder.parameters(), lr=0.0), MGDA(), shared=shared or encoder, engine="features"
    )
    optimizer.combine(losses)
    optimizer.step()
    return optimizer.report.gramian


@pytest.mark.parametrize("uses", [("01", "12", "02"), ("0", "1", "2"), ("012", "2", "1")], ids=str)
def test_features_takes_tasks_that_use_some_levels_of_a_pyramid_each(uses):
    encoder, x = Pyramid(), torch.randn(4, 3, dtype=torch.float64)
    found = []

    def losses():
        levels = encoder(x)
        found.append(levels)
        return {use: sum(((t + 1) * levels[int(k)]).sin().mean() for k in use) for t, use in enumerate(uses)}

    gramian = features_of(encoder, losses)
    rows = jacobian(losses(), found[-1])
    assert close(gramian, rows @ rows.T)


def test_features_knows_the_representation_of_losses_that_the_forward_engine_computed():
    p = problem(NETWORKS["linear"])
    both = Reader(Needs.GRAMIAN | Needs.ALIGNMENT)
    optimizer = MultiTaskOptimizer(
        torch.optim.SGD(p.model.parameters(), lr=0.0),
        both.weighting,
        shared=p.model.encoder,
        model=p.model,
        engine="features",
    )
    optimizer.combine(p.task_losses, reference=p.reference)
    optimizer.step()
    assert optimizer.report.engine == "forward+features"
    alone = Reader(Needs.GRAMIAN).read(p, p.task_losses, engine="features")["GRAMIAN"]
    assert close(both.views[-1]["GRAMIAN"], alone)


def each_with_its_own_input(encoder):
    return lambda: {str(t): encoder(torch.randn(4, 3))[-1].square().mean() for t in range(2)}


def towers(encoder):
    x = torch.randn(4, 3)
    return lambda: {str(t): layer(x).square().mean() for t, layer in enumerate(encoder.layers)}


def physics_informed(encoder):
    """The derivative of the output in the input is no function of the output."""
    x = torch.randn(4, 3, requires_grad=True)

    def losses():
        u = encoder(x)[-1]
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return {"boundary": u.square().mean(), "residual": (slope - u).square().mean()}

    return losses


def decayed(encoder):
    def losses():
        z = encoder(torch.ones(4, 3))[-1]
        return {"a": z.square().mean() + encoder.layers[0].weight.square().sum(), "b": z.sin().mean()}

    return losses


def past_the_module(encoder):
    """Its parts are called, and not it."""

    def losses():
        z = encoder(torch.ones(4, 3))[-1]
        return {"a": z.square().mean(), "b": encoder.layers[0](torch.ones(4, 3)).sin().mean()}

    return losses


def one_without(encoder):
    head = torch.nn.Linear(3, 1)
    return lambda: {"a": encoder(torch.ones(4, 3))[-1].square().mean(), "b": head(torch.ones(4, 3)).square().mean()}


REFUSED = {
    "each task its own input": (
        each_with_its_own_input,
        r"any two tasks have one in common, found none for '0' and '1'",
    ),
    "each task its own module": (towers, r"any two tasks have one in common, found none for '0' and '1'"),
    "a derivative in the input": (physics_informed, r"found that task 'residual' uses '\w+\.0\.weight' .* past them"),
    "a penalty on weights": (decayed, r"found that task 'a' uses 'layers\.0\.weight' of shape \[3, 3\] past them"),
    "a part of the module": (past_the_module, r"found that task 'b' uses 'layers\.0\.\w+' .* past them"),
    "a task without them": (one_without, r"every task uses one, found that 'b' does not"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_features_says_where_the_representation_tells_nothing_or_not_all_of_the_tasks_gradients(case):
    losses, message = REFUSED[case]
    encoder = Pyramid().float()
    shared = [*encoder.layers] if losses is towers else encoder
    with pytest.raises(MTLWeightError, match=rf"engine='features' compares .*{message}.*Use engine='rows'"):
        features_of(encoder, losses(encoder), shared)


def test_features_refuses_tied_parameters_that_a_head_uses():
    p = problem(NETWORKS["tied parameters"])
    with pytest.raises(
        MTLWeightError, match=r"'left' uses '0\.weight' of shape \[7, 4\] past them, as with tied weights"
    ):
        Reader(Needs.GRAMIAN).read(p, p.task_losses, engine="features")


def test_features_has_no_jacobian_over_the_parameters():
    p = problem(NETWORKS["linear"])
    with pytest.raises(mtlweight.MTLWeightError, match=r"found the features engine.* Use engine='rows'"):
        Reader().read(p, p.task_losses, engine="features")


@engines
def test_embedding_bag_gives_the_same_rows_on_each_gradient_engine(engine):
    p, other = problem(BAG), problem(BAG)
    view = Reader().read(p, p.task_losses, engine=engine)
    assert close(view["JACOBIAN"], jacobian(other.task_losses(), other.shared))


def test_rows_makes_sparse_gradients_dense():
    p, other = problem(NETWORKS["embedding"]), problem(NETWORKS["embedding"])
    p.model.encoder[0].sparse = True
    assert torch.autograd.grad(p.reference(), p.shared)[0].is_sparse
    assert close(Reader().read(p, p.task_losses)["JACOBIAN"], jacobian(other.task_losses(), other.shared))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("m", [1, 33, 70])
def test_any_number_of_tasks_fits_into_the_chunks(engine, m):
    torch.manual_seed(SEED)
    weight, x = torch.randn(3, dtype=torch.float64, requires_grad=True), torch.randn(m, 3, dtype=torch.float64)
    seen = []

    @mtlweight.weighting(Needs.JACOBIAN)
    def equal(view):
        seen.append(view.jacobian)
        return torch.ones(m)

    optimizer = MultiTaskOptimizer(torch.optim.SGD([weight], lr=0.1), equal, shared=weight, engine=engine)
    optimizer.combine((x @ weight).square()).backward()
    expected = 2 * (x @ weight)[:, None] * x
    assert close(seen[0], expected)
    assert close(weight.grad, expected.sum(dim=0))


@engines
def test_a_head_of_an_absent_task_gets_no_gradient(engine):
    p = problem(NETWORKS["linear"])
    Reader(Needs.GRAMIAN, WEIGHTS[:1]).read(p, lambda: {**p.task_losses(), "right": None}, engine=engine)
    assert all(q.grad is None for q in p.model.heads["right"].parameters())
    assert all(q.grad is not None for q in p.model.heads["left"].parameters())


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_keep_the_parameters_memory_format(engine):
    p = problem(NETWORKS["channels last"])
    Reader().read(p, p.task_losses, engine=engine)
    weight = p.model.encoder[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert weight.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("scale", [1.0, 1e-15])
def test_gramians_are_symmetric_to_the_last_bit_so_that_no_order_of_tasks_matters(scale):
    for seed in range(20):
        rows = scale * torch.randn(2 + seed % 7, 20 + seed, generator=torch.Generator().manual_seed(seed))
        gramian = gramian_of(rows)
        assert torch.equal(gramian, gramian.T)
        assert close(gramian, rows.double() @ rows.double().T, rounding=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_of_low_precision_parameters_the_statistics_are_those_of_float32_within_the_dtypes_rounding(engine, dtype):
    low = problem(NETWORKS["linear"], dtype=dtype)
    view = Reader().read(low, low.sample_losses, engine=engine)
    high = problem(NETWORKS["linear"], dtype=dtype)
    high.model.float()
    high.x, high.y["left"] = high.x.float(), high.y["left"].float()
    expected = jacobian({t: loss.mean() for t, loss in high.sample_losses().items()}, high.shared)
    assert view["JACOBIAN"].dtype == torch.float32
    assert close(view["JACOBIAN"], expected, rounding=4 * torch.finfo(dtype).eps)
    weights = [mtlweight.MGDA()(jacobian=J) for J in (view["JACOBIAN"], expected)]
    assert close(weights[0], weights[1], rounding=16 * torch.finfo(dtype).eps)
    assert all(p.grad.dtype == dtype for p in low.shared)


def test_samples_sums_bfloat16_gradients_in_float32():
    # 2^-9 is lost beside 1 in bfloat16: summed there, the total would stay 1.
    weight = torch.ones((), dtype=torch.bfloat16, requires_grad=True)
    scale = torch.cat([torch.ones(1), torch.full((511,), 2.0**-9)]).bfloat16()
    seen = []

    @mtlweight.weighting(Needs.JACOBIAN)
    def equal(view):
        seen.append(view.jacobian)
        return torch.ones(1)

    optimizer = MultiTaskOptimizer(torch.optim.SGD([weight], lr=0.1), equal, shared=weight, engine="samples")
    optimizer.combine({"a": scale * weight})
    assert close(512 * seen[0], torch.tensor([[1 + 511 * 2.0**-9]]), rounding=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_measuring_leaves_the_random_state_and_the_buffers_as_the_forward_pass_left_them(engine):
    p = problem(NETWORKS["dropout"])
    losses = seeded(p.task_losses)
    state = torch.get_rng_state()
    optimizer = MultiTaskOptimizer(
        torch.optim.SGD(p.model.parameters(), lr=0.0), Reader().weighting, shared=p.shared, engine=engine
    )
    optimizer.combine(losses).backward()
    assert torch.equal(torch.get_rng_state(), state)


class Added(torch.nn.Module):
    """Two parameters that are added: autograd gives both the same gradient."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))

    def forward(self, x):
        return x + (self.first + self.second)


@pytest.mark.parametrize("heads", ["weighted", "unweighted"])
@pytest.mark.parametrize("engine", ["forward", "pullback", "samples", "rows", "batched", "features"])
def test_a_gradient_that_is_changed_in_place_changes_no_other(engine, heads):
    model, x = Added(), torch.ones(4, 3)
    weighting = mtlweight.MGDA() if engine in ("batched", "features") else mtlweight.SLGrad("a")
    optimizer = MultiTaskOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), weighting, shared=model, engine=engine, heads=heads
    )

    def losses():
        y = model(x)
        return {"a": y.square().mean(dim=1), "b": (y - 1).square().mean(dim=1)}

    for _ in range(2):  # the second backward adds to what is there
        optimizer.combine(losses, reference=lambda: losses()["a"]).backward()
        torch.testing.assert_close(model.first.grad, model.second.grad)
        before = model.second.grad.clone()
        model.first.grad.mul_(0.5)
        assert torch.equal(model.second.grad, before)
        model.second.grad.mul_(0.5)


@pytest.mark.parametrize("numbers", [1, 64])
@pytest.mark.parametrize("beside", [False, True])
def test_what_is_not_finite_is_seen_among_few_numbers_and_among_many(numbers, beside):
    values = torch.ones(1, numbers)
    for last, finite in ((1.0, True), (torch.inf, False), (-torch.inf, False), (torch.nan, False)):
        values[0, -1] = last
        assert all_finite([values, torch.ones(2)] if beside else [values]) == finite
    assert all_finite([torch.ones(1, numbers).to_sparse()])
    nothing = torch.ones(0)
    assert all_finite([nothing, torch.full((numbers,), 3e38)])
    assert not all_finite([nothing, torch.full((numbers,), torch.nan)])


def test_complex_numbers_are_finite_if_both_their_parts_are():
    for numbers in (1, 65):
        values = torch.ones(numbers, dtype=torch.complex128)
        assert all_finite([values, values])
        values[-1] = complex(0.0, torch.inf)
        assert not all_finite([values, torch.ones(2)])


@pytest.mark.parametrize("long", [0, 20, 1000])
@pytest.mark.parametrize("engine", ["rows", "batched", "samples"])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_step_does_not_depend_on_which_gradients_are_joined(long, engine, parts, monkeypatch):
    """Some of two layers' gradients are long; one task is dropped, and one reaches the first layer alone."""
    found = []
    for length in (kept.LONG, long):
        monkeypatch.setattr(kept, "LONG", length)
        torch.manual_seed(SEED)
        first, second = torch.nn.Linear(3, 7).double(), torch.nn.Linear(7, 4).double()
        heads = torch.nn.ModuleDict(
            {task: torch.nn.Linear(k, 1).double() for task, k in {"a": 4, "b": 7, "c": 4}.items()}
        )
        data = torch.randn(6, 3, dtype=torch.float64)

        def losses(x, first=first, second=second, heads=heads):
            z = torch.tanh(first(x))
            values = {"a": heads["a"](second(z)), "b": heads["b"](z), "c": heads["c"](second(z)).sqrt()}  # c: NaN
            return {task: value.squeeze(1).square() for task, value in values.items()}

        model = torch.nn.ModuleList([first, second, heads])
        optimizer = MultiTaskOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.0),
            MGDA(),
            shared=[first, second],
            engine=engine,
            on_nonfinite="drop",
        )
        given = [functools.partial(losses, x) for x in data.split(6 // parts)]
        optimizer.combine(given if parts > 1 else given[0]).backward()
        optimizer.step()
        assert optimizer.report.dropped == {"c": 1}
        found.append([optimizer.report.gramian, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1])
    assert all(close(a, b, 1e-12) for a, b in zip(*found, strict=True))


class Poisoned(torch.autograd.Function):
    """The same values; their gradient is not a number."""

    @staticmethod
    def forward(_ctx, x):
        return x.clone()

    @staticmethod
    def backward(_ctx, incoming):
        return incoming * torch.nan


def test_a_bad_gradient_is_found_among_those_that_are_joined_and_among_the_others(monkeypatch):
    monkeypatch.setattr(kept, "LONG", 4)
    for bad in ("0.weight", "0.bias"):  # 6 numbers, and 2
        encoder = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh())
        optimizer = MultiTaskOptimizer(torch.optim.SGD(encoder.parameters(), lr=0.1), MGDA(), shared=encoder)
        poisoned = {bad: Poisoned.apply(encoder.get_parameter(bad))}
        z = torch.func.functional_call(encoder, poisoned, (torch.ones(4, 3),))
        with pytest.raises(NonFiniteError, match=re.escape(repr(bad))):
            optimizer.combine({"a": z[:, 0].sum(), "b": z[:, 1].sum()})


def test_a_leaf_that_all_tasks_reach_has_one_gradient_at_a_time_in_the_backward():
    """The trunk below ``shared``: as much memory for each task again would be the memory of a Jacobian."""
    m, n = 8, 1 << 18
    trunk, last = torch.nn.Parameter(torch.ones(n)), torch.nn.Linear(4, m)
    optimizer = MultiTaskOptimizer(torch.optim.SGD([trunk, *last.parameters()], lr=0.0), MGDA(), shared=last)

    def backward():
        optimizer.zero_grad()
        outputs = last(trunk.view(-1, 4)).mean(dim=0)
        scalar = optimizer.combine({str(t): (outputs[t] - t).square() for t in range(m)})
        return peak_memory(scalar.backward, trunk.device)

    assert backward() < 4 * n * 4 / MIB


def test_a_tensor_that_is_output_twice_is_one_representation():
    """By a module and by the one that it is part of; as a parameter that a module returns."""
    inner = torch.nn.Linear(3, 4)
    outer = torch.nn.Sequential(inner)
    found = []
    for shared in ([outer], [outer, inner]):
        optimizer = MultiTaskOptimizer(
            torch.optim.SGD(outer.parameters(), lr=0.0), MGDA(), shared=shared, engine="features"
        )
        z = outer(torch.ones(2, 3))
        optimizer.combine({str(t): (t + z[:, t % 4]).square().mean() for t in range(6)}).backward()
        optimizer.step()
        found.append(optimizer.report.gramian)
    assert close(*found)


@pytest.mark.parametrize("weighting", [MGDA(), GradDrop(), AutoLambda("a"), SLGrad("a", scope="all")], ids=repr)
def test_complex_parameters_are_refused_where_gradients_are_compared(weighting):
    w = torch.nn.Parameter(torch.tensor([1j, 2j]))
    optimizer = MultiTaskOptimizer(torch.optim.SGD([w], lr=0.1), weighting, shared=[w])
    with pytest.raises(MTLWeightError, match=r"expected real parameters, found parameter 0 .* complex\. Keep"):
        optimizer.combine(lambda: {"a": w.abs().square()}, reference=lambda: w.imag.sum() * 2)
    plain = MultiTaskOptimizer(torch.optim.SGD([w], lr=0.1), Constant(0.5), shared=[w])
    plain.combine({"a": w.imag.sum()}).backward()
    assert torch.equal(w.grad, torch.tensor([0.5j, 0.5j]))


@pytest.mark.parametrize(
    ("engine", "weighting"), [("batched", MGDA()), ("samples", MGDA()), ("samples", SLGrad("a"))], ids=str
)
def test_vectorised_engines_say_that_they_take_no_sparse_gradients(engine, weighting):
    table = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = MultiTaskOptimizer(torch.optim.SGD(table.parameters(), lr=0.1), weighting, shared=table, engine=engine)
    losses = {"a": table(torch.tensor([1, 3])).square().sum(dim=1), "b": table(torch.tensor([1, 2])).sum(dim=1)}
    with pytest.raises(MTLWeightError, match=r"expected dense ones, found those of Embedding.* Use engine='rows'"):
        optimizer.combine(losses, reference=lambda: table(torch.tensor([1])).square().sum())


# However the model uses its weights and its data.

WIDTH = 6
BATCH = torch.randn(4, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED))


def layers(count=1):
    torch.manual_seed(SEED)
    return torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(count))).double()


def thirds(outputs):
    return torch.stack([part.square().mean() for part in outputs.chunk(3, dim=-1)])


def measured(model, losses, **options):
    """The report of a step, and the gradients that its backward wrote."""
    optimizer = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), MGDA(), shared=model, **options)
    optimizer.zero_grad()
    optimizer.combine(losses).backward()
    optimizer.step()
    return optimizer.report, written(model.parameters())


USES = {
    "once": lambda layer, x: layer(x),
    "twice": lambda layer, x: layer(layer(x).tanh()),
    "as data as well": lambda layer, x: layer(x) * layer.weight.sum(dim=0),
    "transposed, twice": lambda layer, x: (lambda w: x.tanh() @ w + (x @ w).tanh())(layer.weight.t()),
    "scaled": lambda layer, x: torch.addmm(layer.bias, x.view(-1, WIDTH), layer.weight.t(), alpha=0.5),
    "not transposed": lambda layer, x: x @ layer.weight,
    "to make another weight": lambda layer, x: torch.nn.functional.linear(x, layer.weight * 2),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("shape", [(WIDTH,), (2, 2, WIDTH)], ids=["a vector", "a stack of batches"])
def test_gramian_and_step_are_those_of_one_backward_a_task_however_a_weight_is_used(use, shape):
    (layer,) = model = layers()
    x = BATCH[0] if len(shape) == 1 else BATCH.view(shape)

    def losses():
        return thirds(USES[use](layer, x).tanh())

    rows = jacobian(dict(enumerate(losses())), list(model.parameters()))
    report, gradient = measured(model, losses())
    assert close(report.gramian, rows @ rows.T)
    assert close(gradient, report.weights @ rows)


def test_the_next_batch_may_be_copied_in_before_the_backward():
    model, buffer = layers(), torch.zeros_like(BATCH)
    _, expected = measured(model, thirds(model(BATCH)))
    optimizer = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), MGDA(), shared=model)
    model.zero_grad()
    scalar = optimizer.combine(thirds(model(buffer.copy_(BATCH))))
    buffer.zero_()
    scalar.backward()
    assert close(written(model.parameters()), expected)


def test_a_backward_may_run_twice_where_its_graph_is_kept():
    model = layers(2)
    _, once = measured(model, thirds(model(BATCH)))
    optimizer = MultiTaskOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), MGDA(), shared=model)
    model.zero_grad()
    scalar = optimizer.combine(thirds(model(BATCH)))
    scalar.backward(retain_graph=True)
    scalar.backward()
    assert close(written(model.parameters()), 2 * once)


@pytest.mark.parametrize("engine", ["rows", "features"])
def test_sparse_gradients_at_the_output_are_made_dense(engine):
    model = torch.nn.Linear(WIDTH, WIDTH, bias=False).double()
    places = torch.tensor([[0, 5, 5], [1, 2, 0], [3, 3, 3], [4, 0, 1]])

    def losses(sparse):
        y = model(BATCH)
        return {"a": torch.gather(y, 1, places, sparse_grad=sparse).square().sum(), "b": y.sin().mean()}

    (found, gradient), (expected, right) = (
        measured(model, lambda sparse=sparse: losses(sparse), engine=engine) for sparse in (True, False)
    )
    assert close(found.gramian, expected.gramian)
    assert close(gradient, right)


def test_the_last_task_that_reaches_the_shared_parameters_may_be_dropped():
    model, heads = layers(), torch.nn.ParameterList([torch.ones(3, dtype=torch.float64) for _ in range(2)])
    loss = model(BATCH).square().mean()
    losses = {"a": loss + 0 * (loss - loss.detach()).sqrt(), "b": heads[0].sum(), "c": heads[1].square().sum()}
    optimizer = MultiTaskOptimizer(
        torch.optim.SGD([*model.parameters(), *heads], lr=0.0), MGDA(), shared=model, on_nonfinite="drop"
    )
    optimizer.combine(losses).backward()
    optimizer.step()
    assert optimizer.report.tasks == ("b", "c")
    assert not optimizer.report.gramian.any()


def test_the_default_device_is_nothing_to_inner_products():
    rows = [torch.arange(1.0, 4.0).repeat(1 << 16), torch.ones(3 << 16)]
    expected = gramian_of(rows)
    with torch.device("meta"):
        assert torch.equal(gramian_of(rows), expected)
        assert torch.equal(gramian_of(torch.stack(rows)), expected)
