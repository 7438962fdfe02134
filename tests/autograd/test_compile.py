"""Compiled models: an engine gives what it gives for the eager model, or falls back, or says why it cannot."""

import contextlib
import itertools
import os
import re
import shutil
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch import config as settings
from torch._functorch.aot_autograd import make_boxed_func

from mtlweight import (
    DWA,
    FAMO,
    MGDA,
    RLW,
    SLAW,
    STCH,
    UW,
    Constant,
    Equal,
    GradDrop,
    MTLWeightError,
    MultiTaskOptimizer,
    Needs,
    PCGrad,
    SLGrad,
)
from tests.registry import CASES
from tests.zoo import Recipe, TwoTasks, close, numbers, on_samples, problem


@pytest.fixture(autouse=True)
def afresh():
    torch._dynamo.reset()
    with settings.patch(donated_buffer=False):
        yield
    torch._dynamo.reset()


RECIPE = Recipe(lambda: TwoTasks(nn.Sequential(nn.Linear(5, 4), nn.Sigmoid(), nn.Dropout(0.0)), 4), numbers(5))

DROPPING = Recipe(lambda: TwoTasks(nn.Sequential(nn.Linear(5, 40), nn.Dropout(0.5), nn.Linear(40, 4)), 4), numbers(5))


def compiled_problem(what="model", **options):
    """A problem of which a part is compiled, and the same one without."""
    p, eager = problem(RECIPE), problem(RECIPE)
    options = {"backend": "aot_eager", **options}
    if what == "model":
        p.run = torch.compile(p.model, **options)
    elif what == "encoder":
        encoder = torch.compile(p.model.encoder, **options)
        p.run = lambda x: p.model.decode(encoder(x))
    else:
        p.sample_losses = torch.compile(p.sample_losses, **options)
    return p, eager


def optimizer_of(p, by, **options):
    inner = torch.optim.SGD(p.model.parameters(), lr=0.1)
    return MultiTaskOptimizer(inner, by, shared=p.model.encoder, model=p.model, **options)


def train(p, optimizer, form="sample_losses", steps=2, computed=False):
    for _ in range(steps):
        optimizer.zero_grad()
        losses = getattr(p, form)
        optimizer.combine(losses() if computed else losses, reference=p.reference).backward()
        optimizer.step()
    return [parameter.detach() for parameter in p.model.parameters()]


PULLBACK = "the pullback engine cannot run here .*aot_autograd does not currently support double backward"
RUNS = {
    # weighting, engine asked for, engine that runs, what each warning says
    "rows": (MGDA(), "rows", "rows", []),
    "batched": (MGDA(), "batched", "batched", []),
    "alignment": (on_samples, "auto", "forward", []),
    "forward": (SLGrad("left"), "forward", "forward", []),
    "pullback": (SLGrad("left"), "pullback", "pullback", []),
    "computed losses": (SLGrad("left"), "auto", "rows", [PULLBACK]),
    "alignment by rows": (SLGrad("left"), "rows", "rows", []),
    "one step ahead": (SLGrad("left", lookahead=True), "rows", "rows", []),
    "losses": (UW(), "auto", "", []),
    "unweighted heads": (UW(), "auto", "", []),
}


def test_a_second_look_runs_a_compiled_model_as_it_was_written_where_the_first_one_did():
    runs = []

    def backend(graph, _inputs):
        def run(*arguments):
            runs.append("compiled")
            return graph.forward(*arguments)

        return run

    p, _ = compiled_problem(backend=backend)
    optimizer = optimizer_of(p, FAMO() >> on_samples)
    reference = p.reference()  # compiled, and once
    del runs[:]
    optimizer.combine(p.sample_losses, reference=reference).backward()
    optimizer.step()
    assert optimizer.report.engine == "forward"
    assert runs == []


@pytest.mark.parametrize(
    ("case", "what"),
    [*((case, "model") for case in RUNS), *itertools.product(["rows", "alignment"], ["encoder", "losses"])],
)
def test_a_step_is_that_of_the_eager_model_after_one_warning_for_each_engine_that_cannot(case, what):
    by, engine, ran, messages = RUNS[case]
    p, eager = compiled_problem(what)
    options = {"heads": "unweighted"} if case == "unweighted heads" else {}
    optimizer = optimizer_of(p, by, engine=engine, **options)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        found = train(p, optimizer, computed=case == "computed losses")
    caught = [str(warning.message) for warning in record if str(warning.message).startswith("mtlweight: ")]
    assert len(caught) == len(messages)
    for text, message in zip(caught, messages, strict=True):
        assert re.search(message, text)
    expected = train(eager, optimizer_of(eager, by, engine="auto" if ran == "" else "rows", **options))
    assert optimizer.report.engine == ran
    assert all(close(a, b) for a, b in zip(found, expected, strict=True))
    if isinstance(by, SLGrad) or by is on_samples:
        assert optimizer.report.alignment.any()


@pytest.mark.parametrize("fails", [False, True])
def test_forward_runs_a_compiled_model_as_it_was_written_and_leaves_it_compiled_for_all_others(fails):
    runs = []

    def backend(graph, _inputs):
        def run(*arguments):
            runs.append(1)
            return graph.forward(*arguments)

        return run

    p, _ = compiled_problem(backend=backend)
    p.run(p.x)
    assert len(runs) == 1
    optimizer = optimizer_of(p, SLGrad("left"))
    reference = p.reference()

    def losses():
        found = p.sample_losses()
        if fails:
            raise KeyError("the user's own")
        return found

    before = len(runs)
    with pytest.raises(KeyError, match="own") if fails else contextlib.nullcontext():
        optimizer.combine(losses, reference=reference).backward()
        optimizer.step()
        assert optimizer.report.engine == "forward"
    assert len(runs) == before
    p.run(p.x)
    assert len(runs) == before + 1


@pytest.mark.parametrize(
    ("engine", "by", "message"),
    [
        ("samples", MGDA(), "engine='samples' runs several backwards at once.*Use engine='rows'"),
        ("samples", SLGrad("left"), "engine='samples' runs several backwards at once"),
        ("features", MGDA(), "no shared representation.*a compiled model does not show it"),
    ],
)
def test_an_engine_that_cannot_run_a_compiled_model_says_so(engine, by, message):
    p, _ = compiled_problem()
    with pytest.raises(MTLWeightError, match=message):
        train(p, optimizer_of(p, by, engine=engine))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own
def test_the_features_engine_measures_compiled_heads():
    p, eager = problem(RECIPE), problem(RECIPE)
    heads = {task: torch.compile(head, backend="aot_eager") for task, head in p.model.heads.items()}
    p.run = lambda x: (lambda z: {task: head(z) for task, head in heads.items()})(p.model.encoder(x))
    optimizer = optimizer_of(p, MGDA(), engine="features")
    found = train(p, optimizer)
    assert optimizer.report.engine == "features"
    expected = train(eager, optimizer_of(eager, MGDA(), engine="features"))
    assert all(close(a, b) for a, b in zip(found, expected, strict=True))


NAMED = r"donated_buffer = False.*before the model first runs.*TORCHINDUCTOR_CACHE_DIR"
MEASURED = [
    ("rows", MGDA(), "weighted"),
    ("pullback", SLGrad("left"), "weighted"),
    ("auto", Equal(), "unweighted"),
]


@pytest.mark.parametrize(("engine", "by", "heads"), MEASURED)
def test_donated_buffers_are_named_with_what_to_set_and_that_helps(engine, by, heads):
    settings.donated_buffer = True
    p, eager = compiled_problem()
    sum(p.task_losses().values()).backward()  # compiles a backward that need not keep what was saved
    before = [parameter.detach().clone() for parameter in p.model.parameters()]
    optimizer = optimizer_of(p, by, engine=engine, heads=heads)
    with pytest.raises(MTLWeightError, match=NAMED):
        train(p, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(p.model.parameters(), before, strict=True))
    assert optimizer.report.step == 0
    settings.donated_buffer = False
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "mtlweight: the pullback engine")
        found = train(p, optimizer)
    expected = train(eager, optimizer_of(eager, by, engine="rows" if by != Equal() else "auto", heads=heads))
    assert all(close(a, b) for a, b in zip(found, expected, strict=True))


def overwriting(graph, inputs):
    """A backward as kernels with donated buffers are: right, and what was saved is gone."""
    intermediate = [isinstance(x, torch.Tensor) and x.shape == (6, 4) for x in inputs]

    def run(*args):
        found = graph(*[x.clone() if isinstance(x, torch.Tensor) else x for x in args])
        for x, saved in zip(args, intermediate, strict=True):
            if saved:
                x.data.fill_(0.3)  # unseen by autograd, as kernels are
        return found

    return make_boxed_func(run)


def as_it_is(graph, _inputs):
    return make_boxed_func(graph)


OVERWRITING = aot_autograd(fw_compiler=as_it_is, bw_compiler=overwriting)


@pytest.mark.parametrize(("engine", "by", "heads"), MEASURED)
def test_a_backward_that_overwrites_what_was_saved_is_noticed_where_torch_does_not(engine, by, heads):
    p, _ = compiled_problem("encoder", backend=OVERWRITING)
    optimizer = optimizer_of(p, by, engine=engine, heads=heads)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "mtlweight: the pullback engine")
        with pytest.raises(MTLWeightError, match=NAMED):
            train(p, optimizer)
    assert optimizer.report.step == 0


def test_an_ordinary_backward_may_overwrite_what_was_saved():
    p, eager = compiled_problem("encoder", backend=OVERWRITING)
    found, expected = (train(each, optimizer_of(each, UW())) for each in (p, eager))
    assert all(close(a, b) for a, b in zip(found, expected, strict=True))


def test_each_compiled_backward_is_run_once_more_at_the_first_step_alone():
    runs = [0]

    def counting(graph, _inputs):
        def run(*args):
            runs[0] += 1
            return graph(*args)

        return make_boxed_func(run)

    p, _ = compiled_problem("encoder", backend=aot_autograd(fw_compiler=as_it_is, bw_compiler=counting))
    optimizer = optimizer_of(p, MGDA())
    counts = []
    for _ in range(3):
        runs[0] = 0
        train(p, optimizer, steps=1)
        counts.append(runs[0])
    assert counts == [3, 2, 2]  # one a task


def test_outputs_that_a_cuda_graph_overwrote_are_named():
    class Overwritten(torch.autograd.Function):
        @staticmethod
        def forward(_ctx, x):
            return x.clone()

        @staticmethod
        def backward(_ctx, _incoming):
            raise RuntimeError(
                "Error: accessing tensor output of CUDAGraphs that has been overwritten by a subsequent run."
            )

    p = problem(RECIPE)
    p.model.encoder.register_forward_hook(lambda _module, _args, output: Overwritten.apply(output))
    with pytest.raises(MTLWeightError, match=r"CUDA graph of a compiled model.*mode='default'"):
        train(p, optimizer_of(p, MGDA()))


def numbered(p):
    return dict(zip("01", p.sample_losses().values(), strict=True))


LOSS_LEVEL = [case.weighting for case in CASES if not case.weighting.needs & ~(Needs.LOSSES | Needs.SAMPLES)]


def test_losses_that_are_weighed_by_their_values_compile_without_a_break_and_once():
    p, eager = problem(RECIPE), problem(RECIPE)
    counter = CompileCounterWithBackend("aot_eager")
    p.compute = torch.compile(lambda: numbered(p), backend=counter, fullgraph=True)
    eager.compute = lambda: numbered(eager)
    for by in LOSS_LEVEL:
        found, expected = (train(each, optimizer_of(each, by), "compute", steps=1) for each in (p, eager))
        assert all(close(a, b) for a, b in zip(found, expected, strict=True)), by
        assert counter.frame_count == 1, by  # a second look, such as FAMO's, runs the same code


@pytest.mark.parametrize("by", [Constant([2.0, 0.5]), DWA(), Equal(), SLAW(), STCH()], ids=repr)
def test_weightings_that_neither_check_losses_nor_draw_numbers_are_called_inside_a_compiled_function(by):
    p = problem(RECIPE)

    def weighted():
        losses = torch.stack([*p.task_losses().values()])
        return (by(losses=losses) * losses).sum()

    assert close(torch.compile(weighted, fullgraph=True, backend="eager")(), weighted())


COMPILED_STEPS = {
    "gradients": MGDA(),
    "computed losses": PCGrad(),
    "alignments": SLGrad("left"),
    "entries": GradDrop(),
    "losses": UW(),
    "seen again": FAMO(),
    "draws": RLW(),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's, of its own reading
@pytest.mark.parametrize(
    ("case", "how"),
    [(case, "step") for case in COMPILED_STEPS]
    + [(case, how) for case in ("gradients", "alignments", "draws") for how in ("closure", "accumulate")],
)
def test_a_training_step_may_be_compiled_with_combine_in_it(case, how):
    def trained(compiled):
        p = problem(RECIPE)
        optimizer = optimizer_of(p, COMPILED_STEPS[case], engine="rows" if case == "alignments" else "auto")

        def combine():
            given = p.sample_losses() if case == "computed losses" else p.sample_losses
            return optimizer.combine(given, reference=p.reference)

        def backward():
            optimizer.zero_grad()
            loss = combine()
            loss.backward()
            return loss

        def step():
            if how == "closure":
                return optimizer.step(backward)
            if how == "accumulate":
                optimizer.zero_grad()
                for _ in range(2):
                    with optimizer.accumulate(2, weigh="each"):
                        (combine() / 2).backward()
            else:
                backward()
            return optimizer.step()

        run = torch.compile(step, backend="aot_eager") if compiled else step
        for _ in range(3):
            run()
        assert optimizer.report.step == 3
        return [parameter.detach() for parameter in p.model.parameters()]

    assert all(close(a, b) for a, b in zip(trained(True), trained(False), strict=True))


@pytest.mark.filterwarnings("ignore")  # of torch's own
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="there is no C++ compiler")
def test_rows_runs_models_that_inductor_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # a folder may have kernels of other settings
    p, eager = compiled_problem("encoder", backend="inductor", options={"compile_threads": 1})
    found, expected = (train(each, optimizer_of(each, MGDA())) for each in (p, eager))
    assert all(close(a, b, 1e-9) for a, b in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore")  # of torch's own
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("engine", ["auto", "pullback"])
def test_both_passes_over_losses_in_parts_draw_the_same_masks_though_inductor_draws_others(
    engine, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    p = problem(DROPPING)
    p.run = torch.compile(p.model, backend="inductor", options={"compile_threads": 1})
    optimizer = optimizer_of(p, SLGrad("left"), engine=engine)
    halves = slice(0, 3), slice(3, 6)
    parts = [lambda half=half: {t: loss[half] for t, loss in p.sample_losses().items()} for half in halves]
    optimizer.combine(parts, reference=p.reference).backward()
    optimizer.step()
    assert optimizer.report.weights.shape == (2, 6)


@pytest.mark.filterwarnings("ignore")  # of torch's own
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="there is no C++ compiler")
def test_all_that_is_evaluated_ahead_draws_the_masks_of_the_step_though_inductor_draws_others(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    dropping = Recipe(
        lambda: TwoTasks(nn.Sequential(nn.Linear(5, 40), nn.Dropout(0.5), nn.Linear(40, 4)), 4), numbers(5)
    )
    p = problem(dropping)
    p.run = torch.compile(p.model, backend="inductor", options={"compile_threads": 1})
    for group in (optimizer := optimizer_of(p, SLGrad("left", lookahead=True, samples_at="ahead"))).param_groups:
        group["lr"] = 1e-12
    seen = []

    def losses():
        found = p.sample_losses()
        seen.append(found["left"].detach())
        return found

    optimizer.combine(losses, reference=p.reference)
    assert len(seen) == 3
    assert close(seen[0], seen[1], 1e-6)
    assert close(seen[0], seen[2], 1e-6)
