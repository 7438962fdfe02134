"""The kit is tried on broken weightings: at least one for each check, and it has to name exactly that fault."""

import ast
import re
import runpy
import sys
import threading
from collections import UserDict
from typing import ClassVar

import hypothesis
import pytest
import torch

from mtlweight import Constant, MTLWeightError, Needs, Traits, Weighting, chain, testing
from mtlweight.testing import Case, ConformanceError, Problem, check_weighting, checks, parametrize_with_checks
from mtlweight.testing._conformance import CHECKS

FAIR = Traits(nonnegative=True, total=1.0, scale_degree=0)
"""What the sound base below claims."""


class Sound(Weighting):
    """Weights by inverse norm, on the simplex, with an average over steps: passes, until a fault is put in."""

    needs = Needs.GRAMIAN
    traits = FAIR

    def init(self, view):
        return {"average": {}}

    def size(self, view):
        return view.gramian.diagonal().sqrt()

    def weigh(self, view, state):
        size = self.size(view)
        floor = 1e-3 * size.amax()
        inverse = 1 / torch.where(size > floor, size, torch.where(floor > 0, floor, 1.0))
        now = inverse / inverse.amax()
        average = 0.5 * view.gather(state["average"], 0.0) + 0.5 * now
        return average / average.sum(), {"average": view.scatter(state["average"], average)}


class Simple(Weighting):
    """Inverse norms without state: the base for faults that have nothing to do with state."""

    needs = Needs.GRAMIAN
    traits = FAIR

    def weigh(self, view, state):
        return softened(view.gramian), state


def softened(gramian):
    size = gramian.diagonal().sqrt()
    share = size / torch.where(size.amax() > 0, size.amax(), 1.0)
    weights = 1 / (0.1 + share)
    return weights / weights.sum()


@pytest.fixture(autouse=True)
def few_and_the_same_examples():
    """Faults here are plain to see: a few examples find them, the same ones in each run."""
    hypothesis.settings.register_profile("before", hypothesis.settings())
    hypothesis.settings.register_profile("meta", hypothesis.settings(), max_examples=50, derandomize=True)
    hypothesis.settings.load_profile("meta")
    yield
    hypothesis.settings.load_profile("before")


BROKEN: dict[str, list] = {}


def breaks(*expected):
    """Registers a weighting that fails exactly these checks; the first is the one that names the fault."""

    def register(kind):
        BROKEN.setdefault(expected[0], []).append((kind, set(expected)))
        return kind

    return register


@breaks("shape")
class SqueezesOneTask(Simple):
    def weigh(self, view, state):
        return softened(view.gramian).squeeze(), state


@breaks("shape")
class ForgetsTheState(Simple):
    def weigh(self, view, state):
        return softened(view.gramian)


@breaks("repeats")
class SeedsTheGlobalNumbers(Simple):
    def weigh(self, view, state):
        torch.manual_seed(0)
        return softened(view.gramian), state


@breaks("stays_finite")
class DividesByAZeroNorm(Simple):
    traits = Traits(nonnegative=True, scale_degree=-1)

    def weigh(self, view, state):
        return 1 / view.gramian.diagonal().sqrt(), state


@breaks("stays_finite")
class IsNaNForDuplicates(Simple):
    def weigh(self, view, state):
        weights = softened(view.gramian)
        G = view.gramian
        cosine = G[0, -1] / (G[0, 0] * G[-1, -1]).sqrt()
        return torch.where((len(G) > 1) & (cosine > 1 - 1e-9), torch.nan, weights), state


@breaks("stays_finite")
class CrashesForAZeroRow(Simple):
    def weigh(self, view, state):
        if (view.gramian.diagonal() == 0).any():
            raise RuntimeError("singular")
        return softened(view.gramian), state


@breaks("stays_finite")
class SolvesASingularSystem(Simple):
    def weigh(self, view, state):
        G = view.gramian
        unit = G / torch.where(G.diagonal().amax() > 0, G.diagonal().amax(), 1.0)
        torch.linalg.cholesky(unit)
        return softened(G), state


@breaks("stays_finite")
class LetsInfinityIntoTheState(Sound):
    def weigh(self, view, state):
        weights, state = super().weigh(view, state)
        return weights, {**state, "log": {"last": torch.log(view.gramian.diagonal().amin())}}


@breaks("dtype")
class WritesHalfTheDigits(Simple):
    def weigh(self, view, state):
        return softened(view.gramian).float(), state


@breaks("leaves_input_alone")
class ChangesTheGramianInPlace(Simple):
    def weigh(self, view, state):
        weights = softened(view.gramian)
        view.gramian.fill_diagonal_(0.0)
        return weights, state


@breaks("keeps_no_graph")
class KeepsAGraph(Sound):
    def weigh(self, view, state):
        weights, state = super().weigh(view, state)
        with torch.enable_grad():
            variable = weights.clone().requires_grad_()
            return weights, {**state, "solution": variable}


@breaks("reads_only_needs")
class ReadsWhatItDoesNotDeclare(Simple):
    def weigh(self, view, state):
        return softened(view.gramian) * (1 + 0 * view.losses), state


@breaks("reads_only_needs")
class ReadsAtAStepThatItCallsFree(Simple):
    def needs_at(self, step):
        return Needs.GRAMIAN if step % 2 == 0 else Needs.NOTHING


@breaks("needs_nothing_unread")
class DeclaresMoreThanItReads(Simple):
    needs = Needs.GRAMIAN | Needs.LOSSES


@breaks("repeats")
class DrawsFromTheGlobalGenerator(Simple):
    traits = Traits(nonnegative=True, total=1.0, scale_degree=0, random=True)

    def weigh(self, view, state):
        keep = torch.rand(len(view.known), generator=view.generator, dtype=view.dtype).softmax(0)
        drawn = (keep + torch.rand(len(view.known)).softmax(0))[list(view.places)]
        return (drawn / drawn.sum() + 0 * view.gramian[0]).double(), state


@breaks("state_of_tensors")
class KeepsAPlainNumber(Sound):
    def weigh(self, view, state):
        weights, new = super().weigh(view, state)
        return weights, {**new, "count": state.get("count", 0) + 1}


@breaks("leaves_state_alone")
class ChangesTheStateInPlace(Sound):
    def weigh(self, view, state):
        weights, new = super().weigh(view, state)
        state["average"].clear()
        return weights, new


@breaks("resumes", "keeps_uses_apart")
class ForgetsItsStateOnResume(Simple):
    def __init__(self):
        self.average = None

    def weigh(self, view, state):
        now = softened(view.gramian)
        if self.average is None or len(self.average) != len(now):
            self.average = now
        self.average = 0.5 * self.average + 0.5 * now
        return self.average, state


@breaks("resumes")
class HasAStateThatDoesNotLoad(Sound):
    def weigh(self, view, state):
        weights, new = super().weigh(view, state)
        return weights, UserDict(new)


@breaks("survives_deepcopy")
class CannotBeCopied(Simple):
    def __init__(self):
        self.lock = threading.Lock()


@breaks("keeps_uses_apart")
class RemembersBetweenUses(Simple):
    def __init__(self):
        self.seen = {}

    def weigh(self, view, state):
        key = (view.step, len(view.tasks))
        return self.seen.setdefault(key, softened(view.gramian)), state


@breaks("absent_tasks")
class KeepsValuesByPosition(Sound):
    def init(self, view):
        return {"average": torch.zeros(len(view.tasks), dtype=view.dtype)}

    def weigh(self, view, state):
        average = 0.5 * state["average"] + 0.5 * softened(view.gramian)
        return average / average.sum(), {"average": average}


@breaks("absent_tasks")
class StartsAfreshWhenATaskIsAbsent(Sound):
    def init(self, view):
        return {"average": torch.zeros(len(view.tasks), dtype=view.dtype)}

    def weigh(self, view, state):
        now = softened(view.gramian)
        old = state["average"] if len(state["average"]) == len(now) else torch.zeros_like(now)
        average = 0.5 * old + 0.5 * now
        return average / average.sum(), {"average": average}


@breaks("absent_tasks")
class DropsTheStateOfAbsentTasks(Sound):
    def weigh(self, view, state):
        weights, new = super().weigh(view, state)
        return weights, {"average": {task: new["average"][task] for task in view.tasks}}


@breaks("claims_nonnegative")
class ClaimsToBeNonnegative(Simple):
    traits = Traits(nonnegative=True, scale_degree=0)

    def weigh(self, view, state):
        return softened(view.gramian) - 0.5, state


@breaks("claims_nonnegative")
class DoesNotSayThatItIsNonnegative(Simple):
    traits = Traits(total=1.0, scale_degree=0)


@breaks("claims_total")
class ClaimsAnotherTotal(Simple):
    traits = Traits(nonnegative=True, total=2.0, scale_degree=0)


@breaks("claims_total")
class DoesNotSayThatItsTotalIsOne(Simple):
    traits = Traits(nonnegative=True, scale_degree=0)


@breaks("claims_total")
class DoesNotSayThatItsTotalIsTheNumberOfTasks(Simple):
    traits = Traits(nonnegative=True, scale_degree=0)

    def weigh(self, view, state):
        return len(view.tasks) * softened(view.gramian), state


@breaks("claims_nonconflicting")
class ClaimsNotToConflict(Simple):
    traits = Traits(nonnegative=True, total=1.0, nonconflicting=True, scale_degree=0)


class Shortest(Weighting):
    """The min-norm point of two gradients, in closed form."""

    needs = Needs.GRAMIAN
    traits = Traits(nonnegative=True, total=1.0, nonconflicting=True, stationary="weak", scale_degree=0)

    def weigh(self, view, state):
        G = view.gramian
        if len(G) == 1:
            return torch.ones(1, dtype=view.dtype), state
        a, b, c = G[0, 0], G[0, 1], G[1, 1]
        scale = torch.maximum(a, c)
        length = a - 2 * b + c
        first = torch.where(length > 1e-12 * scale, (c - b) / torch.where(length > 0, length, 1.0), 0.5).clamp(0, 1)
        return torch.stack([first, 1 - first]), state


@breaks("claims_nonconflicting")
class DoesNotSayThatItDoesNotConflict(Shortest):
    traits = Traits(nonnegative=True, total=1.0, stationary="weak", scale_degree=0)


@breaks("claims_stationary")
class ClaimsToStopAtStationaryPoints(Simple):
    traits = Traits(nonnegative=True, total=1.0, stationary="strong", scale_degree=0)


@breaks("claims_stationary")
class DoesNotSayThatItStopsAtStationaryPoints(Shortest):
    traits = Traits(nonnegative=True, total=1.0, nonconflicting=True, scale_degree=0)


@breaks("claims_scale")
class HasAnAbsoluteEpsilon(Simple):
    traits = Traits(nonnegative=True, scale_degree=-1)

    def weigh(self, view, state):
        return 1 / (view.gramian.diagonal().sqrt() + 1e-8), state


@breaks("claims_scale")
class HasAnAbsoluteEpsilonAndClaimsNothing(HasAnAbsoluteEpsilon):
    traits = Traits(nonnegative=True)


@breaks("claims_scale")
class DoesNotSayThatItIsInvariant(Simple):
    traits = Traits(nonnegative=True, total=1.0)


@breaks("claims_random")
class DoesNotSayThatItIsRandom(Simple):
    def weigh(self, view, state):
        draws = torch.rand(1, generator=view.generator, dtype=view.dtype)
        weights = 1 / (0.1 + draws + softened(view.gramian))
        return weights / weights.sum(), state


@breaks("claims_random")
class ClaimsToBeRandom(Simple):
    traits = Traits(nonnegative=True, total=1.0, scale_degree=0, random=True)


@breaks("claims_losses")
class AcceptsLossesThatItIsNotDefinedFor(Weighting):
    needs = Needs.LOSSES
    traits = Traits(nonnegative=True, scale_degree=-1, losses="positive")

    def weigh(self, view, state):
        return 1 / view.losses, state


@breaks("permutes")
class FavoursTheFirstTask(Simple):
    def weigh(self, view, state):
        weights = softened(view.gramian)
        weights[0] *= 2
        return weights / weights.sum(), state


@breaks("permutes")
class DrawsByRow(Simple):
    traits = Traits(nonnegative=True, total=1.0, scale_degree=0, random=True)

    def weigh(self, view, state):
        drawn = torch.rand(len(view.tasks), generator=view.generator, dtype=view.dtype).softmax(0)
        return drawn + 0 * view.gramian[0], state


@breaks("claims_samples")
class MakesDoWithFewerSamples(Weighting):
    needs = Needs.LOSSES | Needs.SAMPLES
    writes = "sample"
    traits = Traits(nonnegative=True, total=1.0, scale_degree=0, samples=2)

    def weigh(self, view, state):
        return torch.ones_like(view.sample_losses) / view.sample_losses.numel(), state


@breaks("permutes")
class FavoursTheFirstSample(Weighting):
    needs = Needs.ALIGNMENT | Needs.SAMPLES
    writes = "sample"
    traits = Traits(nonnegative=True, scale_degree=0)

    def weigh(self, view, state):
        weights = (view.sample_alignment > 0).to(view.dtype)
        weights[:, 0] *= 2
        return weights, state


@breaks("one_sample")
class LooksBehindTheView(Weighting):
    needs = Needs.LOSSES
    traits = Traits(nonnegative=True, total=1.0, scale_degree=0)

    def weigh(self, view, state):
        size = view.losses.abs()
        share = size / torch.where(size.amax() > 0, size.amax(), 1.0)
        share = share ** (1 + (view._source.losses().ndim == 2))
        weights = 1 + share
        return weights / weights.sum(), state


@breaks("chain")
class ReversesTheChain(Simple):
    def __rshift__(self, then):
        return chain(then, Constant(2.0), self)


@breaks("chain")
class DoesNotSeeTheWeightsBeforeIt(Simple):
    def weigh(self, view, state):
        return softened(view._source.gramian(None)), state


@breaks("combine")
class ReturnsInferenceTensors(Weighting):
    needs = Needs.LOSSES
    traits = Traits(nonnegative=True, scale_degree=0)

    @torch.inference_mode()
    def weigh(self, view, state):
        return 1 + (view.losses > 0).to(view.dtype), state


def failures_of(kind) -> dict[str, ConformanceError]:
    tasks = (1, 2) if issubclass(kind, Shortest) else (1, 2, 3)
    try:
        check_weighting(kind(), tasks=tasks)
    except ConformanceError as error:
        return {failure.check: failure for failure in error.failures}
    return {}


CASES = [(kind, expected) for kinds in BROKEN.values() for kind, expected in kinds]


@pytest.mark.parametrize(("kind", "expected"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_the_kit_names_exactly_the_fault(kind, expected):
    found = failures_of(kind)
    assert set(found) == expected, "\n\n".join(map(str, found.values()))
    for failure in found.values():
        expect_a_readable_message(str(failure))


@pytest.mark.parametrize("kind", [Sound, Simple, Shortest])
def test_the_sound_bases_of_the_broken_ones_pass(kind):
    assert failures_of(kind) == {}


def test_there_is_a_broken_weighting_for_each_check():
    assert set(BROKEN) == {check.name for check in CHECKS}
    assert {f"check_{name}" for name in BROKEN} == set(checks.__all__) - {"check_agrees_with_oracle"}


def expect_a_readable_message(text):
    """Says the check, what was expected and found and what to do, and shows an input that a person can read."""
    labels = ["fails check_", "\nExpected: ", "\nFound: ", "\nTo do: ", "\nSmallest input found:\n", "step 0: "]
    assert [label for label in labels if label not in text] == []
    shown = text.split("Smallest input found:\n")[1]
    assert len(shown.splitlines()) <= 6, text
    for matrix in re.findall(r"jacobian \([^)]*\) = (?:1e-?\d+ \* )?(\[\[.*?\]\])", shown):
        rows = ast.literal_eval(matrix)
        assert len(rows) <= 3, text
        assert all(len(row) <= 4 and all(abs(x) <= 9 for x in row) for row in rows), text


class PlantedEpsilon(Weighting):
    needs = Needs.GRAMIAN

    def weigh(self, view, state):
        return 1 / (view.gramian.diagonal() + 1e-8), state


class PlantedInPlace(Weighting):
    needs = Needs.GRAMIAN

    def weigh(self, view, state):
        G = view.gramian
        G += G.diagonal().mean() * torch.eye(len(G), dtype=G.dtype)
        return torch.linalg.solve(G / G.amax(), torch.ones(len(G), dtype=G.dtype)), state


class PlantedHiddenState(Weighting):
    needs = Needs.LOSSES
    last: ClassVar = None

    def weigh(self, view, state):
        losses, last = view.losses, self.last
        self.last = losses
        return losses / last if last is not None and len(last) == len(losses) else losses * 0 + 1, state


class PlantedZeroNorm(Weighting):
    needs = Needs.JACOBIAN

    def weigh(self, view, state):
        return 1 / view.jacobian.norm(dim=1).to(view.dtype), state


class PlantedOrder(Weighting):
    needs = Needs.LOSSES

    def weigh(self, view, state):
        order = view.losses.argsort(descending=True)
        return 1.0 / (1 + order.to(view.dtype)), state


@pytest.mark.parametrize(
    ("kind", "check", "advice"),
    [
        (PlantedEpsilon, "claims_scale", "make each epsilon and threshold relative"),
        (PlantedInPlace, "leaves_input_alone", "no in-place methods"),
        (PlantedHiddenState, "resumes", "keep all that changes from step to step in the state that `weigh` returns"),
        (PlantedZeroNorm, "stays_finite", "look for a division by a sum or norm that can be zero"),
        (PlantedOrder, "permutes", "treat all tasks alike"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_strangers_bug_is_caught_with_advice_and_a_small_input(kind, check, advice):
    with pytest.raises(ConformanceError) as caught:
        check_weighting(kind())
    failure = {failure.check: failure for failure in caught.value.failures}[check]
    assert advice in str(failure)
    expect_a_readable_message(str(failure))


def test_a_zero_norm_shrinks_to_one_zero():
    with pytest.raises(ConformanceError, match=re.escape("= [[0]]")):
        checks.check_stays_finite(PlantedZeroNorm())


def test_a_false_claim_not_to_conflict_shrinks_to_two_rows():
    with pytest.raises(ConformanceError) as caught:
        checks.check_claims_nonconflicting(ClaimsNotToConflict())
    assert re.search(r"jacobian \([^)]*\) = \[\[[^[]*\], \[[^[]*\]\],", str(caught.value)), caught.value


def test_a_check_that_could_not_be_tried_says_so_rather_than_pass():
    class AlwaysFails(Simple):
        def weigh(self, view, state):
            raise RuntimeError("out of order")

    with pytest.raises(ConformanceError, match=r"could not be tried by check_permutes: .* RuntimeError: out of order"):
        checks.check_permutes(AlwaysFails())
    assert set(failures_of(AlwaysFails)) == {"stays_finite"}


def test_the_oracle_is_compared_with():
    def wrong(steps, _generators):
        return [torch.ones(len(step["losses"]), dtype=torch.float64) for step in steps]

    with pytest.raises(ConformanceError, match="by the oracle"):
        check_weighting(Simple(), oracle=wrong)

    def right(steps, _generators):
        return [softened(step["gramian"]) for step in steps]

    check_weighting(Simple(), oracle=right)


def test_an_expected_failure_is_let_pass():
    check_weighting(FavoursTheFirstTask(), expected_failures={"permutes": "the first task counts twice"})


class Rising(Simple):
    """Negative, but only where one gradient is exactly seven times another one: rarer than what is searched."""

    traits = Traits(scale_degree=0)

    def weigh(self, view, state):
        weights = 1 + softened(view.gramian)
        G = view.gramian.diagonal()
        return torch.where((len(G) == 2) & (G.amin() > 0) & (G.amax() == 49 * G.amin()), -weights, weights), state


def test_a_stored_counterexample_makes_up_for_one_that_is_not_found():
    with pytest.raises(
        ConformanceError, match=re.escape("counterexamples={'claims_nonnegative': [Problem.given(...)]}")
    ):
        check_weighting(Rising())
    check_weighting(Rising(), counterexamples={"claims_nonnegative": [Problem.given([[1.0], [7.0]])]})


def test_a_stored_counterexample_that_is_none_is_an_error():
    with pytest.raises(ConformanceError, match="or in the one that is stored"):
        check_weighting(Rising(), counterexamples={"claims_nonnegative": [Problem.given([[1.0], [2.0]])]})


def test_an_expected_failure_that_passes_is_an_error():
    with pytest.raises(ConformanceError, match="take it out of expected_failures"):
        check_weighting(Simple(), expected_failures={"permutes": "not so"})


@pytest.mark.parametrize(
    ("expected_failures", "message"),
    [({"no_such_check": "x"}, "Choose from shape, stays_finite"), ({"permutes": ""}, "Say why it fails")],
)
def test_an_expected_failure_needs_a_known_check_and_a_reason(expected_failures, message):
    with pytest.raises(MTLWeightError, match=message):
        Case(Simple(), expected_failures=expected_failures)


def test_ids_are_readable_and_the_same_in_each_run():
    @parametrize_with_checks([Simple(), Constant(2.0) >> Simple()])
    def test(weighting, check):
        check(weighting)

    ids = [parameter.id for parameter in test.pytestmark[0].args[1]]
    assert ids[0] == "Simple()-shape"
    assert ids[-1] == "Constant(2.0) >> Simple()-combine"
    assert len(set(ids)) == len(ids)


def test_an_expected_failure_becomes_a_strict_xfail():
    @parametrize_with_checks([Case(FavoursTheFirstTask(), expected_failures={"permutes": "the first counts twice"})])
    def test(weighting, check):
        check(weighting)

    (mark,) = [mark for parameter in test.pytestmark[0].args[1] for mark in parameter.marks]
    assert mark.name == "xfail"
    assert mark.kwargs == {"reason": "the first counts twice", "strict": True, "raises": ConformanceError}


@pytest.mark.parametrize("package", ["hypothesis", "pytest"])
def test_without_its_packages_the_import_says_which_extra_to_install(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError) as caught:
        runpy.run_path(testing.__file__)
    assert str(caught.value) == (
        f"mtlweight.testing needs {package}, which is not installed. Run: pip install 'mtlweight[testing]'"
    )


def test_a_class_in_place_of_a_weighting_is_refused():
    with pytest.raises(MTLWeightError, match="Pass an object"):
        check_weighting(Simple)
