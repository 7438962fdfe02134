"""Bad input: for each, one error that says what was expected, what was found and what to do. Nothing has changed."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from mtlweight import (
    CRMOGM,
    DWA,
    FAMO,
    MGDA,
    PCD,
    STCH,
    UW,
    Constant,
    Equal,
    GradDrop,
    GradNorm,
    GradVac,
    MTLWeightError,
    MultiTaskOptimizer,
    Needs,
    NonFiniteError,
    PCGrad,
    SLGrad,
    SoftAdapt,
    Weighting,
    chain,
    clip,
    ema,
    every,
    normalize,
    weighting,
)
from mtlweight._checkpoint import CONTENT, KEY, VERSION
from tests.problems import Problem, own, poison, same, step, wrap

EQUAL = Equal()
SLGRAD = SLGrad("left")


@dataclass
class Case:
    """One row of the table.

    Args:
        name: what is wrong.
        act: what the user does, given a problem and an optimizer that has taken ``steps`` steps.
        message: what the error says.
        error: its type.
        weighting: of the optimizer.
        options: further arguments of the optimizer.
        steps: good steps before.
        range: whether it is about a number's range, which is itself what to do.
    """

    name: str
    act: Callable[[Problem, MultiTaskOptimizer], Any]
    message: str
    error: type[Exception] = MTLWeightError
    weighting: Weighting = EQUAL
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 1
    range: bool = False


def losses(name, make, message, each=EQUAL, **options):
    """A row where the losses are wrong: as they are, and from a callable."""
    case = {"message": message, "weighting": each, **options}
    return [
        Case(name, lambda p, o: o.combine(make(p)), **case),
        Case(f"{name}, from a callable", lambda p, o: o.combine(lambda: make(p)), **case),
    ]


def reference(name, make, message, each=SLGRAD, **options):
    """A row where the reference is wrong: as it is, and from a callable."""
    case = {"message": message, "weighting": each, "steps": 0, **options}
    return [
        Case(name, lambda p, o: o.combine(p.samples(), reference=make(p)), **case),
        Case(f"{name}, from a callable", lambda p, o: o.combine(p.samples, reference=lambda: make(p)), **case),
    ]


def constructor(name, make, message, **options):
    """A row where an argument of the optimizer is wrong."""
    return [Case(name, lambda p, _: make(p), message, **options)]


def other():
    """A network that has nothing to do with the problem's."""
    return Problem(seed=1)


def constants(p):
    with torch.no_grad():
        return p.losses()


@weighting(Needs.LOSSES)
def undeclared(view):
    return view.gramian.diagonal()


class Forgetful(Equal):
    def weigh(self, view, state):
        return super().weigh(view, state)[0]


class Misspelt(Equal):
    writes = "tasks"


class Counting(Equal):
    def weigh(self, view, state):
        return super().weigh(view, state)[0], {"steps": 1}


@weighting(Needs.NOTHING)
def one_weight_too_many(view):
    return torch.ones(len(view.tasks) + 1)


@weighting(Needs.LOSSES, writes="sample")
def not_per_sample(view):
    return view.losses


@weighting(Needs.NOTHING, writes="sample")
def per_sample(view):
    return torch.ones(len(view.tasks), 6)


def width(n, writes):
    """Weights with a wrong number of columns."""
    return weighting(Needs.JACOBIAN if writes == "entry" else Needs.NOTHING, writes=writes)(
        lambda view: view.jacobian[:, :n] if writes == "entry" else torch.ones(len(view.tasks), n)
    )


@weighting(Needs.NOTHING, writes="entry")
def blind_entries(view):
    return torch.ones(len(view.tasks), 25)


@weighting(Needs.NOTHING)
def as_a_list(view):
    return [1.0] * len(view.tasks)


def checkpoint_of(each):
    q = Problem()
    optimizer = wrap(q, each, shared=q.encoder)
    q.train(optimizer, 2)
    return optimizer.state_dict()


CASES = [
    # No tasks
    *losses("no tasks, as a mapping", lambda _: {}, r"at least one task, found none\. Pass None"),
    *losses("no tasks, as a tensor", lambda _: torch.zeros(0), r"m >= 1 tasks, found \[0\]\. Stack"),
    # Not losses
    *losses("a scalar tensor alone", lambda p: p.reference(), r"shape \[m\] or \[m, b\].* found \[\]\. Stack"),
    *losses("a list", lambda p: list(p.losses().values()), r"as a mapping.* found list\. Pass"),
    *losses("nothing", lambda _: None, r"as a mapping.* found NoneType\. Pass"),
    *losses("a task whose name is no string", lambda p: {0: p.reference()}, r"as strings, found 0\. Rename .*'0'"),
    *losses("a number for a loss", lambda _: {"left": 1.5}, r"task 'left' as a tensor.* found float"),
    *losses("a complex loss", lambda p: {"left": p.reference() * 1j}, r"as a real number, found torch.complex128"),
    *losses("an integer loss", lambda _: {"left": torch.tensor(1)}, r"'left' as a real number, found torch.int64"),
    # Shapes
    *losses(
        "a loss that is neither a scalar nor [b]",
        lambda p: {"left": p.samples()["left"][:, None]},
        r"'left' as a scalar or one value a sample \[b\], found shape \[6, 1\]\. Reduce .* a mean or a sum as",
    ),
    *losses(
        "a tensor [m, b, c]",
        lambda _: torch.zeros(2, 3, 4, requires_grad=True),
        r"found \[2, 3, 4\]\. Stack .* a mean or a sum",
    ),
    *losses(
        "losses of pixels",
        lambda p: {"left": p.samples()["left"].expand(3, 2, 6).movedim(2, 0)},
        r"one value a sample \[b\], found shape \[6, 3, 2\]\. Reduce .* with a mean or a sum",
    ),
    *losses("no samples", lambda p: {"left": p.samples()["left"][:0]}, r"'left' .* found shape \[0\].* pass None"),
    *losses(
        "another number of samples in each task",
        lambda p: {"left": p.samples()["left"], "right": p.samples()["right"][:4]},
        r"one shape, .* found left \[6\], right \[4\]\. Reduce",
    ),
    *losses(
        "a scalar beside losses per sample",
        lambda p: {"left": p.samples()["left"], "right": p.losses()["right"]},
        r"one shape, .* found left \[6\], right \[\]\. Reduce",
    ),
    # No graph
    *losses(
        "losses without a graph",
        constants,
        r"'left' has no graph: expected .* found a constant\. Pass None if the task is absent.* compute",
    ),
    *losses(
        "one loss without a graph",
        lambda p: {**p.losses(), "right": p.losses()["right"].detach()},
        r"'right' has no graph: expected .* found a constant\. Pass None if .* compute",
    ),
    # Shared parameters
    *losses(
        "shared parameters that no loss reaches",
        lambda _: other().losses(),
        r"No loss reaches the shared parameters: expected .* found none .* Pass",
        MGDA(),
        options={"shared": True},
    ),
    *losses(
        "a Gramian weighting without shared parameters",
        lambda p: p.losses(),
        r"^MGDA reads gradients, but no shared parameters are known: expected shared=",
        MGDA(),
        steps=0,
    ),
    *losses(
        "a Jacobian weighting without shared parameters",
        lambda p: p.losses(),
        r"^GradDrop reads gradients, but no shared parameters are known: expected shared=",
        GradDrop(),
        steps=0,
    ),
    *losses(
        "an empty list of shared parameters",
        lambda p: p.losses(),
        r"^PCGrad reads gradients, but no shared parameter requires grad",
        PCGrad(),
        options={"shared": []},
        steps=0,
    ),
    *losses(
        "the features engine and shared modules that were not called",
        lambda _: other().losses(),
        r"engine='features' found no shared representation .*: expected .* Call them through",
        MGDA(),
        options={"shared": True, "engine": "features"},
    ),
    *losses(
        "the features engine and a weighting that reads the Jacobian",
        lambda p: p.losses(),
        r"reads the Jacobian .* found\s+the features engine.* Use\s+engine='rows'",
        GradDrop(),
        options={"shared": True, "engine": "features"},
        steps=0,
    ),
    Case(
        "losses whose graph is gone",
        lambda p, o: [x := p.losses(), sum(x.values()).backward(), o.zero_grad(), o.combine(x)],
        r"graph was freed.* expected a fresh graph, found .* Compute the losses again",
        weighting=MGDA(),
        options={"shared": True},
    ),
    # Samples and reference
    Case(
        "a sample-level weighting given scalar losses",
        lambda p, o: o.combine(p.losses(), reference=p.reference()),
        r"expected a \[b\] loss for each task, found scalars for left, right\. Compute .* reduction='none'",
        weighting=SLGrad("left"),
        options={"shared": True},
        steps=0,
    ),
    Case(
        "no reference",
        lambda p, o: o.combine(p.samples()),
        r"SLGrad compares .* expected combine\(losses, reference=...\), found no reference\. Pass",
        weighting=SLGrad("left"),
        options={"shared": True},
        steps=0,
    ),
    *reference(
        "a reference weighting without shared parameters",
        lambda p: p.reference(),
        r"^SLGrad reads the alignment, but no shared parameters are known: expected shared=",
    ),
    *reference(
        "a reference without shared parameters in its graph",
        lambda _: other().reference(),
        r"No shared parameter is in the reference's graph: expected .* found other parameters only\. Use",
        options={"shared": True},
    ),
    *reference(
        "a reference without any of the optimizer's parameters in its graph",
        lambda _: other().reference(),
        r"is in the reference's graph: expected .* found other.* Use",
        SLGrad("left", scope="all"),
        options={"shared": True},
    ),
    *reference(
        "a reference without a graph",
        lambda p: p.reference().detach(),
        r"The reference has no graph: expected .* found a constant\. Compute",
        options={"shared": True},
    ),
    *reference(
        "a reference [b, c]",
        lambda p: p.samples()["left"][:, None],
        r"reference as a scalar or \[b\] tensor.* found \[6, 1\]\. Pass .* Reduce .* a mean or a sum",
        options={"shared": True},
    ),
    *reference(
        "a reference for tasks that are not main ones",
        lambda p: p.losses(),
        r"a reference for each main task, left; found left, right\. Name the same tasks",
        options={"shared": True},
    ),
    Case(
        "the forward engine and losses that are computed already",
        lambda p, o: o.combine(p.samples(), reference=p.reference()),
        r"engine='forward' .*: expected losses as a callable, found computed ones\. Pass",
        weighting=SLGrad("left"),
        options={"shared": True, "engine": "forward"},
        steps=0,
    ),
    Case(
        "the forward engine and parameters that no named module holds",
        lambda p, o: o.combine(p.samples, reference=p.reference),
        r"engine='forward' .*: expected model=.* found some elsewhere\. Pass model=",
        weighting=SLGrad("left", scope="all"),
        options={"shared": True, "engine": "forward"},
        steps=0,
    ),
    # Not finite
    *losses(
        "NaN in one task's loss",
        lambda p: {**p.losses(), "right": p.losses()["right"] * torch.nan},
        r"The loss of task right is not finite: expected .* found NaN.* Look",
        error=NonFiniteError,
    ),
    *losses(
        "infinity in one sample",
        lambda p: {task: x / torch.arange(6) for task, x in p.samples().items()},
        r"The loss of task left, right is not finite: expected .* found NaN or infinity.* Look",
        error=NonFiniteError,
    ),
    *losses(
        "NaN in one task's gradient",
        lambda p: {**p.losses(), "right": p.losses()["right"] + poison(p.encoder[0].weight)},
        r"The gradient of task right is not finite: expected .* found NaN.* Look",
        MGDA(),
        options={"shared": True},
        error=NonFiniteError,
    ),
    Case(
        "NaN in the gradient of a step",
        lambda p, o: [p.model.heads["left"].bias.grad.fill_(torch.nan), o.combine(p.losses()), o.step()],
        r"A gradient is not finite after backward: expected .* found NaN .* of shape \[1\]\..* Look",
        error=NonFiniteError,
    ),
    *reference(
        "NaN in the reference",
        lambda p: p.reference() * torch.nan,
        r"The gradient of the reference is not finite: expected .* found NaN.* Look",
        options={"shared": True},
        error=NonFiniteError,
    ),
    # Another number of tasks
    *losses(
        "a tensor of another number of tasks than the state knows",
        lambda p: torch.stack([*p.losses().values(), p.reference()]),
        r"of the 2 tasks that the state knows \(left, right\), found a tensor of 3\. .* pass a mapping",
        UW(),
    ),
    *losses(
        "a tensor where the state knows the tasks by name",
        lambda p: torch.stack([*p.losses().values()]),
        r"of the 2 tasks that the state knows \(left, right\), found a tensor of 2\. .* pass a mapping",
        UW(),
    ),
    Case(
        "a tensor of another number of tasks after loading",
        lambda p, o: [o.load_state_dict(o.state_dict()), o.combine(p.reference()[None])],
        r"of the 2 tasks that the state knows \(left, right\), found a tensor of 1\. .* pass a mapping",
        weighting=UW(),
    ),
    *losses(
        "another number of tasks than weights",
        lambda p: p.losses(),
        r"Constant: expected 3 tasks, .* found 2 \(left, right\)\. .* mapping",
        Constant([1.0, 2.0, 3.0]),
        steps=0,
    ),
    *losses(
        "a task without a weight",
        lambda p: p.losses(),
        r"Constant: expected .*, found none for right\. Add",
        Constant({"left": 1.0}),
        steps=0,
    ),
    # Domains
    *losses(
        "a negative loss for UW",
        lambda p: {task: -x for task, x in p.losses().items()},
        r"UW: expected losses >= 0.* found .*left = -.*\. \w",
        UW(),
    ),
    *losses(
        "a negative loss for GradNorm",
        lambda p: {task: -x for task, x in p.losses().items()},
        r"GradNorm: expected losses >= 0.* found .*\. \w",
        GradNorm(),
        options={"shared": True},
    ),
    # Checkpoints
    Case(
        "a checkpoint of another weighting",
        lambda _, o: o.load_state_dict(checkpoint_of(DWA())),
        r"another weighting: expected UW, found DWA\. Build",
        weighting=UW(),
    ),
    Case(
        "a checkpoint of another chain",
        lambda _, o: o.load_state_dict(checkpoint_of(DWA() >> UW())),
        r"another weighting: expected Chain\(UW, DWA\), found Chain\(DWA, UW\)\. Build",
        weighting=UW() >> DWA(),
    ),
    *(
        Case(
            f"a checkpoint of {saved!r} for {weighting!r}",
            lambda p, o, saved=saved: o.load_state_dict(wrap(p, saved, shared=p.encoder).state_dict()),
            r"another weighting: expected " + re.escape(expected) + r", found " + re.escape(found) + r"\. Build",
            weighting=weighting,
            options={"shared": True},
            steps=0,
        )
        for saved, weighting, expected, found in [
            (FAMO(rule="gradient"), FAMO(), "FAMO(rule='adam')", "FAMO(rule='gradient')"),
            (
                SLGrad("left"),
                SLGrad("left", lookahead=True),
                "SLGrad(lookahead=True, replay=None)",
                "SLGrad(lookahead=False, replay=None)",
            ),
            (SoftAdapt(), SoftAdapt(order=3), "SoftAdapt(order=3)", "SoftAdapt(order=1)"),
            (CRMOGM(), CRMOGM(GradVac()), "CRMOGM(GradVac)", "CRMOGM(MGDA)"),
            (STCH(form="official"), ema(STCH()), "_EMA(STCH(form='paper'))", "STCH(form='official')"),
            (PCD("left"), PCD("right"), "PCD(main='right')", "PCD(main='left')"),
        ]
    ),
    *(
        Case(
            f"a checkpoint of {which} version",
            lambda _, o, version=version: o.load_state_dict(
                {**checkpoint_of(UW()), "mtlweight": {**own(o), "version": version}}
            ),
            rf"of another version: expected {VERSION}, found {version}\. Load",
            weighting=UW(),
        )
        for which, version in (("an earlier", 1), ("a later", VERSION + 1))
    ),
    Case(
        "a checkpoint whose part of this library is something else",
        lambda _, o: o.load_state_dict({**checkpoint_of(UW()), "mtlweight": 0}),
        rf"of another version: expected {VERSION}, found 0\. Load",
        weighting=UW(),
    ),
    Case(
        "a checkpoint that lacks a part",
        lambda _, o: o.load_state_dict(
            {**checkpoint_of(UW()), "mtlweight": {k: v for k, v in own(o).items() if k not in ("state", "step")}}
        ),
        r"damaged: expected step, state under the key 'mtlweight', found none\. Load",
        weighting=UW(),
    ),
    Case(
        "a checkpoint of other parameters",
        lambda _, o: o.load_state_dict({**o.state_dict(), "param_groups": []}),
        r"loaded state dict has a different number of parameter groups",
        weighting=UW(),
        error=ValueError,  # torch's own
    ),
    # The optimizer's arguments
    *constructor(
        "arguments in the wrong order",
        lambda p: MultiTaskOptimizer(UW(), p.sgd()),
        r"expected optimizer to be a torch.optim.Optimizer, found UW",
    ),
    *constructor(
        "parameters for an optimizer",
        lambda p: MultiTaskOptimizer(p.model.parameters(), UW()),
        r"expected optimizer to be a torch.optim.Optimizer, found generator",
    ),
    *constructor(
        "a class for a weighting", lambda p: wrap(p, UW), r"expected weighting to be a weighting such as UW\(\), found"
    ),
    *constructor("a name for a weighting", lambda p: wrap(p, "uw"), r"expected weighting to be .*, found str"),
    *constructor("a number for shared", lambda p: wrap(p, MGDA(), shared=3), r"expected shared to be .*, found int"),
    *constructor(
        "named parameters for shared",
        lambda p: wrap(p, MGDA(), shared=p.encoder.named_parameters()),
        r"expected shared to be parameters, a module, or several of either, found tuple",
    ),
    *constructor(
        "a name for shared", lambda p: wrap(p, MGDA(), shared="encoder"), r"expected shared to be .*, found str"
    ),
    *constructor(
        "parameters for a model",
        lambda p: wrap(p, UW(), model=list(p.model.parameters())),
        r"expected model to be a torch.nn.Module, found list",
    ),
    *constructor(
        "an unknown engine",
        lambda p: wrap(p, UW(), engine="fast"),
        r"expected engine to be one of auto, rows, .*; found 'fast'",
    ),
    *constructor(
        "unknown heads",
        lambda p: wrap(p, UW(), heads="none"),
        r"expected heads to be one of weighted, unweighted; found 'none'",
    ),
    *constructor(
        "unweighted heads without shared parameters",
        lambda p: wrap(p, UW(), heads="unweighted"),
        r"heads='unweighted' .*: expected shared=..., found None\. Pass",
    ),
    *constructor(
        "an unknown policy",
        lambda p: wrap(p, UW(), on_nonfinite="ignore"),
        r"expected on_nonfinite to be one of raise, skip, drop; found 'ignore'",
    ),
    *constructor(
        "the features engine without shared modules",
        lambda p: wrap(p, MGDA(), engine="features"),
        r"engine='features' .* expected shared=... as a module or several, found nothing\. Pass the encoder",
    ),
    *constructor(
        "the features engine with shared parameters",
        lambda p: wrap(p, MGDA(), engine="features", shared=p.encoder.parameters()),
        r"engine='features' .* expected shared=... as a module or several, found parameters\. Pass the encoder",
    ),
    # Weightings of one's own
    *losses(
        "a weighting that reads what it does not declare",
        lambda p: p.losses(),
        r"reads view.gramian but does not declare it\. Expected Needs.GRAMIAN .* found .*LOSSES.*\. Add",
        undeclared,
        options={"shared": True},
        steps=0,
    ),
    *losses(
        "weights of a wrong shape",
        lambda p: p.losses(),
        r"writes weights per task: expected shape \[2\], found \[3\]\. Return",
        one_weight_too_many,
        steps=0,
    ),
    *losses(
        "a weighting that forgets to return its state",
        lambda p: p.losses(),
        r"Forgetful\.weigh: expected the weights and the next state, found Tensor\. End it with",
        Forgetful(),
        steps=0,
    ),
    *losses(
        "a weighting that writes at no level",
        lambda p: p.losses(),
        r"Misspelt\.writes: expected one of task, sample, entry; found 'tasks'\. Choose",
        Misspelt(),
        steps=0,
    ),
    *losses(
        "a state that is not made of tensors",
        lambda p: p.losses(),
        r"state as nested mappings of tensors, found int under 'steps'\. Keep",
        Counting(),
        steps=0,
    ),
    *losses(
        "weights of another level than declared",
        lambda p: p.samples(),
        r"writes weights per sample: expected shape \[2, b\], found \[2\]\. Return",
        not_per_sample,
        steps=0,
    ),
    *losses(
        "one weight for all samples of a task",
        lambda p: p.samples(),
        r"writes weights per sample: expected shape \[2, 6\], found \[2, 1\]\. Return",
        width(1, "sample"),
        steps=0,
    ),
    *losses(
        "weights for too few samples",
        lambda p: p.samples(),
        r"writes weights per sample: expected shape \[2, 6\], found \[2, 3\]\. Return",
        width(3, "sample"),
        steps=0,
    ),
    *losses(
        "weights per sample for losses per task",
        lambda p: p.losses(),
        r"per sample needs losses per sample: expected a \[b\] loss .* found scalars for left, right\. Compute",
        per_sample,
        steps=0,
    ),
    *losses(
        "one weight for all entries",
        lambda p: p.losses(),
        r"writes weights per entry: expected shape \[2, 25\], found \[2, 1\]\. Return",
        width(1, "entry"),
        options={"shared": True},
        steps=0,
    ),
    *losses(
        "weights per entry without a look at the Jacobian",
        lambda p: p.losses(),
        r"writes weights per entry: expected it to read view\.jacobian, found that it did not\. Declare",
        blind_entries,
        options={"shared": True},
        steps=0,
    ),
    *losses(
        "weights in a list",
        lambda p: p.losses(),
        r"writes weights per task: expected a tensor of shape \[2\], found list\. Return",
        as_a_list,
        steps=0,
    ),
    # Combinators and hyperparameters
    *constructor(
        "a chain of weights per sample and per entry",
        lambda _: per_sample >> GradDrop(),
        r"cannot be chained.* found both\. Use",
    ),
    *constructor("an empty chain", lambda _: chain(), r"at least one weighting in a chain, found none\. Use"),
    *constructor("a chain with a class", lambda _: UW() >> DWA, r"xpected weightings in a chain, found .*\. Pass"),
    *constructor("ema of weights per sample", lambda _: ema(per_sample), r"ema .* found .* one per sample"),
    *constructor(
        "ema with decay 1", lambda _: ema(UW(), decay=1.0), r"ema: expected decay in \[0, 1\), found 1.0\.", range=True
    ),
    *constructor("every 0 steps", lambda _: every(0, UW()), r"every: expected k >= 1, found 0\.", range=True),
    *constructor(
        "a total of 0", lambda _: normalize(UW(), total=0.0), r"normalize: expected .*, found 0.0\.", range=True
    ),
    *constructor("a clip upside down", lambda _: clip(UW(), 2.0, 1.0), r"clip: expected .*, found .*\.", range=True),
    *constructor(
        "a weight of NaN", lambda _: Constant([1.0, torch.nan]), r"Constant: expected .* found .*nan.*\.", range=True
    ),
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def attempt(case):
    """Does what the row says: the error, and everything before and after it."""
    p = Problem()
    options = {**case.options, **({"shared": p.encoder} if case.options.get("shared") is True else {})}
    optimizer = wrap(p, case.weighting, **options)
    for k in range(case.steps):
        step(optimizer, p.losses(k))
    before = p.everything(optimizer)
    with pytest.raises(case.error) as info:
        case.act(p, optimizer)
    return info.value, before, p.everything(optimizer), (p, optimizer)


@cases
def test_bad_input_is_an_error_of_its_own_type_that_says_what_is_wrong(case):
    error, *_ = attempt(case)
    assert type(error) is case.error
    assert re.search(case.message, str(error), re.DOTALL), str(error)


@cases
def test_bad_input_leaves_parameters_and_state_untouched(case):
    _, before, after, (p, optimizer) = attempt(case)
    if case.name == "NaN in the gradient of a step":  # the gradient itself was the bad input
        before["gradients"] = after["gradients"]
    if case.name == "losses whose graph is gone":  # its own backward wrote gradients
        before["gradients"] = after["gradients"]
    assert same(after, before)
    if case.steps:  # and training goes on
        p.train(optimizer, 1, start=1)
        assert optimizer.report.step == case.steps + 1


@pytest.mark.parametrize(
    "case", [case for case in CASES if issubclass(case.error, MTLWeightError)], ids=lambda case: case.name
)
def test_the_message_says_what_was_expected_what_was_found_and_what_to_do(case):
    message = str(attempt(case)[0])
    assert re.search("expected", message, re.IGNORECASE), message
    assert re.search("found", message, re.IGNORECASE), message
    assert case.range or re.search(r"\bfound\b.*?[.;?] \w.*[.?]$", message, re.IGNORECASE | re.DOTALL), message


def test_the_table_names_each_case_once():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)


def test_a_checkpoint_has_everything_that_loading_asks_for():
    assert {*checkpoint_of(UW())[KEY]} == {*CONTENT}


def test_a_wrapped_optimizer_is_not_wrapped_again():
    optimizer = wrap(Problem(), UW())
    with pytest.raises(MTLWeightError, match=r"wrapped already.*Wrap its \.optimizer.*UW\(.*\) >> MGDA\(\)"):
        MultiTaskOptimizer(optimizer, MGDA())


@pytest.mark.parametrize("what", ["losses", "references"])
def test_a_list_of_callables_that_all_look_at_the_loops_variable_is_an_error_that_names_it(what):
    p = Problem()
    optimizer = wrap(p, UW(), shared=p.encoder)
    before = p.everything(optimizer)
    call = p.samples if what == "losses" else p.reference
    late = [lambda: call(k) for k in range(3)]  # noqa: B023  # the fault itself
    bound = [lambda k=k: p.samples(k) for k in range(3)]
    given = {"losses": late} if what == "losses" else {"losses": bound, "reference": late}
    with pytest.raises(MTLWeightError, match=r"look for the same outside \(call, k\).*lambda rows=rows"):
        optimizer.combine(**given)
    assert same(p.everything(optimizer), before)
    optimizer.combine(bound, reference=[lambda k=k: p.reference(k) for k in range(3)])


@pytest.mark.parametrize("policy", ["skip", "drop"])
@pytest.mark.parametrize("by", [UW(), MGDA()], ids=repr)
def test_steps_that_a_nan_under_a_mask_costs_are_warned_of_once_with_the_remedy(by, policy):
    p = Problem()
    optimizer = wrap(p, by, shared=p.encoder, on_nonfinite=policy)
    mask = {"right": torch.tensor([True, False, True, True, True, True])}

    def losses(k):
        found = p.samples(k)
        return {**found, "right": torch.where(mask["right"], found["right"], found["right"] * torch.nan)}

    with pytest.warns(UserWarning, match=r"skipped, or a task dropped.*without a label.*right.*torch\.where"):
        step(optimizer, losses(0), mask=mask)
    step(optimizer, losses(1), mask=mask)  # and no warning, since warnings are errors
