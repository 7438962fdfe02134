"""How a check runs: batches from hypothesis, one weighting played through them, one sentence per fault."""

from __future__ import annotations

import copy
import functools
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import hypothesis
import numpy as np
import torch
from hypothesis import HealthCheck, Phase, Verbosity
from hypothesis import strategies as st
from torch import Tensor

from mtlweight._view import Needs, State, View
from mtlweight._weighting import Weighting
from mtlweight.testing import arbitrary
from mtlweight.testing._problem import AfterStep, Problem, Statistics, show

TASKS = (1, 2, 3, 8)
"""Numbers of tasks that checks try."""
TOLERANCE = 1e-6
"""Relative difference that counts as equal where rounding may differ."""

Steps = list[Problem]


class ConformanceError(AssertionError):
    """A weighting fails a check: what was expected, what was found, what to do, and the smallest input found.

    Args:
        message: all of that.
        check: name of the check.
        tried: false if the weighting failed before the check could look at it, so that another check is to blame.
        failures: for several checks at once, one error each.
    """

    def __init__(
        self, message: str, check: str, tried: bool = True, failures: tuple[ConformanceError, ...] = ()
    ) -> None:
        super().__init__(message)
        self.check = check
        self.tried = tried
        self.failures = failures or (self,)


def name_of(weighting: Weighting) -> str:
    """Its repr, without addresses: they would differ in each run."""
    return re.sub(r"<[^<>]*?(\w+) object at 0x[0-9a-f]+>", r"\1()", repr(weighting))


class Fault(Exception):  # noqa: N818  # a verdict on the weighting, which becomes a ConformanceError
    """What a property finds.

    Args:
        expected: what every weighting does, or what this one claims.
        found: what it did.
        todo: what its author can do.
    """

    def __init__(self, expected: str, found: str, todo: str) -> None:
        super().__init__(expected, found, todo)
        self.expected, self.found, self.todo = expected, found, todo


@dataclass(frozen=True)
class Check:
    """One property of weightings.

    Args:
        name: ``check_...`` without ``check_``.
        run: takes the weighting and ``tasks=``; raises :class:`ConformanceError`.
        applies: whether the property is asked of a weighting.
    """

    name: str
    run: Callable[..., None]
    applies: Callable[[Weighting], bool]


CHECKS: list[Check] = []
"""All checks, in the order in which a person should look at their failures."""

Run = TypeVar("Run", bound=Callable[..., None])


def always(weighting: Weighting) -> bool:
    """For checks that apply to every weighting."""
    return isinstance(weighting, Weighting)


def registered(applies: Callable[[Weighting], bool] = always) -> Callable[[Run], Run]:
    """Adds a function ``check_...`` to :data:`CHECKS`."""

    def register(run: Run) -> Run:
        CHECKS.append(Check(run.__name__.removeprefix("check_"), run, applies))
        return run

    return register


@dataclass(frozen=True)
class Moment:
    """One step of a weighting: the weights, the state after it, and what it was given.

    ``disturbed`` says whether global random numbers were drawn or seeded.
    """

    weights: Tensor
    state: State
    problem: Problem
    source: Statistics
    disturbed: bool


def batches(
    weighting: Weighting,
    tasks: Sequence[int],
    *,
    extreme: bool = False,
    kinds: Sequence[str] | None = None,
    steps: tuple[int, int] = (1, 3),
    gradients: bool = False,
    zero_losses: bool = True,
) -> st.SearchStrategy[Steps]:
    """What a weighting can be asked to weigh: some steps of one problem.

    Args:
        weighting: its needs, level and domain of losses are respected.
        tasks: numbers of tasks to choose from.
        extreme: all kinds and scales; otherwise small integers with independent gradients.
        kinds: the kinds of gradients, where they matter.
        steps: least and greatest number of steps.
        gradients: whether the gradients matter even if the weighting reads the alignment alone.
        zero_losses: whether a loss may be zero, if the domain allows.
    """
    needs = weighting.needs
    reads_gradients = bool(needs & (Needs.GRAMIAN | Needs.JACOBIAN))
    chosen = kinds or (tuple(arbitrary.KINDS) if extreme else arbitrary.REGULAR)
    fitting = [m for m in tasks if arbitrary.kinds_for(m, chosen)]

    if not fitting:
        return st.nothing()
    problems = functools.partial(
        arbitrary.problems,
        kinds=chosen,
        samples=per_sample(weighting),
        domain=weighting.traits.losses,
        scales=arbitrary.ALL_SCALES if extreme else arbitrary.NO_SCALE,
        spread=6 if extreme and kinds is None else 0,
        only_alignment=Needs.ALIGNMENT in needs and not reads_gradients and not gradients,
        observed=weighting.observes,
        zero_losses=zero_losses,
        least_samples=weighting.traits.samples,
    )
    sizes = [(m, count) for count in range(steps[0], steps[1] + 1) for m in fitting]
    made = {size: problems(size[0], steps=size[1]) for size in sizes}
    if weighting.reference is not None and weighting.reference.unit:
        made = {size: strategy.map(_with_unit_references) for size, strategy in made.items()}
    return st.sampled_from(sizes).flatmap(made.__getitem__)


def _with_unit_references(steps: Steps) -> Steps:
    norms = [torch.linalg.vector_norm(problem.reference) for problem in steps]
    return [replace(problem, reference=problem.reference / (n or 1.0)) for problem, n in zip(steps, norms, strict=True)]


def simple_to_extreme(
    weighting: Weighting, tasks: Sequence[int], *, kinds: Sequence[str] | None = None, gradients: bool = False
) -> list[st.SearchStrategy[Steps]]:
    """Batches of all kinds, or of the given ones: small integers first, so that they are shown if they fail, then all
    scales.
    """  # noqa: D205
    every = tuple(arbitrary.KINDS) if kinds is None else kinds
    return [
        batches(weighting, tasks, kinds=every, gradients=gradients),
        batches(weighting, tasks, kinds=kinds, gradients=gradients, extreme=True),
    ]


def per_sample(weighting: Weighting) -> bool:
    """Whether it needs or writes one value a sample."""
    return Needs.SAMPLES in weighting.needs or weighting.writes == "sample"


def for_all(
    check: str,
    weighting: Weighting,
    inputs: st.SearchStrategy[Any] | Sequence[st.SearchStrategy[Any]],
    holds: Callable[..., None],
    *,
    share: float = 1.0,
    gradients: bool = False,
) -> None:
    """Looks for an input for which a property raises :class:`Fault`, and shows the smallest one.

    The number of examples is a fifth of ``max_examples`` of the active hypothesis profile: a weighting has some
    twenty-five checks.

    Args:
        check: name of the check.
        weighting: the weighting on trial.
        inputs: what the property is given: steps, or a tuple with steps in it. With several strategies, the simplest
            first, they share the examples.
        holds: the property. Any other error of the weighting's is not this check's business.
        share: more or fewer examples.
        gradients: whether to show the Jacobian even if the weighting does not read it.

    Raises:
        ConformanceError: if there is one, or if the weighting runs on no input at all.
    """
    strategies = [inputs] if isinstance(inputs, st.SearchStrategy) else list(inputs)
    strategies = [strategy for strategy in strategies if not strategy.is_empty]
    if not strategies:
        return
    last: list[ConformanceError] = []
    fewest = [0]
    counts = {"tried": 0}
    broken: list[Exception] = []

    def run(given: Any) -> None:
        try:
            holds(given)
            counts["tried"] += 1
        except Fault as fault:
            last[:] = [ConformanceError(_message(check, weighting, fault, given, gradients), check)]
            fewest[:] = [_rows(given)]
        except Exception as error:
            broken[:] = [error]
            return
        else:
            return
        raise last[0]

    def fails(strategy: st.SearchStrategy[Any], share: float) -> bool:
        try:
            _search(run, strategy, share, shrink=True)
        except (ConformanceError, hypothesis.errors.Flaky):  # flaky: it depends on more than its input
            return True
        except hypothesis.errors.Unsatisfiable:  # there is nothing smaller
            return False
        return False

    for strategy in strategies:
        if fails(strategy, share / len(strategies)):
            # Hypothesis shrinks entries better than the number of tasks: look among fewer tasks anew.
            while fewest[0] > 2 and fails(strategy.filter(functools.partial(_fewer, fewest[0])), 1.0):
                pass
            raise last[0]
    if broken and not counts["tried"]:
        raise ConformanceError(
            f"{name_of(weighting)} could not be tried by check_{check}: on every input it failed with "
            f"{type(broken[0]).__name__}: {broken[0]}\nSee check_stays_finite and check_shape first.",
            check,
            tried=False,
        )


def exists(inputs: st.SearchStrategy[Steps], found: Callable[[Steps], bool]) -> bool:
    """Whether there is an input for which ``found`` is true. An error of the weighting's counts as such an input."""
    if inputs.is_empty:
        return True

    def run(given: Any) -> None:
        try:
            hit = found(given)
        except Exception:
            hit = True
        if hit:
            raise _FoundError

    try:
        _search(run, inputs, share=4.0, shrink=False)
    except (_FoundError, hypothesis.errors.Flaky):
        return True
    return False


class _FoundError(Exception):
    """Ends a search."""


def _search(run: Callable[[Any], None], inputs: st.SearchStrategy[Any], share: float, shrink: bool) -> None:
    profile = hypothesis.settings()
    settings = hypothesis.settings(
        profile,
        derandomize=profile.derandomize or not shrink,  # a counterexample is found in every run or in none
        max_examples=max(10, round(profile.max_examples * share / 5)),
        database=None,
        deadline=None,
        verbosity=Verbosity.quiet,
        report_multiple_bugs=False,
        print_blob=False,
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )

    @settings
    @hypothesis.given(inputs)
    def search(given: Any) -> None:
        run(given)

    search()


def _runs(given: Any) -> list[Steps]:
    return [part for part in (given if isinstance(given, tuple) else (given,)) if isinstance(part, list)]


def _rows(given: Any) -> int:
    return max(len(problem.tasks) for steps in _runs(given) for problem in steps)


def _fewer(m: int, given: Any) -> bool:
    return _rows(given) < m


def _message(check: str, weighting: Weighting, fault: Fault, given: Any, gradients: bool) -> str:
    runs = _runs(given)
    lines = [
        f"{name_of(weighting)} fails check_{check}.",
        f"Expected: {fault.expected}",
        f"Found: {fault.found}",
        f"To do: {fault.todo}",
        "Smallest input found:",
    ]
    for k, steps in enumerate(runs):
        run = f"run {k}, " if len(runs) > 1 else ""
        lines += [f"  {run}step {i}: {problem.describe(weighting.needs, gradients)}" for i, problem in enumerate(steps)]
    return "\n".join(lines)


def play(
    weighting: Weighting,
    problems: Sequence[Problem],
    *,
    seed: int = 0,
    state: State | None = None,
    first: int = 0,
    noise: int = 0,
) -> list[Moment]:
    """Runs a weighting through some steps, as the optimizer does, but lets it read everything.

    Every step gets statistics and a state of its own, so that one that changes them harms no other step.

    Args:
        weighting: the weighting.
        problems: one a step.
        seed: seed of the views.
        state: the state before the first step; a fresh one if left out.
        first: number of the first step.
        noise: seed of the global random numbers, which must not matter.

    Raises:
        ElsewhereError: if the weights have a wrong shape or are not finite.
    """
    with torch.random.fork_rng(devices=[]):
        return list(_moments(weighting, problems, seed=seed, state=state, first=first, noise=noise))


def settle(number: int) -> None:
    """Seeds all global random numbers, so that a weighting that draws from them fails one check and not all."""
    torch.default_generator.manual_seed(number)
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002  # the global one is what a weighting may draw from


def _moments(
    weighting: Weighting, problems: Sequence[Problem], *, seed: int, state: State | None, first: int, noise: int
) -> Iterator[Moment]:
    for step, problem in enumerate(problems, first):
        source = Statistics(problem)
        view = View(source, step=step, seed=seed)
        settle(step + noise)
        settled = torch.get_rng_state()
        with torch.no_grad():
            before = weighting.init(view) if state is None else copied(state)
            written = weighting.weigh(view, before)
            if not isinstance(written, tuple) or len(written) != 2:
                fault = Fault("the weights and the next state.", f"{type(written).__name__}.", RETURN)
                raise ElsewhereError("shape", fault)
            weights, state = written
            if weighting.observes_at(step):
                state = weighting.observe(View(AfterStep(problem), step=step, seed=seed), state)
        try:
            expect_shape(weighting, problem, weights)
        except Fault as fault:
            raise ElsewhereError("shape", fault) from fault
        if not weights.isfinite().all():
            raise ElsewhereError(
                "stays_finite",
                Fault("finite weights for finite input.", f"weights {show(weights)} at step {step}.", DIVISION),
            )
        yield Moment(weights.double(), state, problem, source, not torch.equal(torch.get_rng_state(), settled))


class ElsewhereError(Exception):
    """A fault that another check is there for.

    Args:
        check: name of that check.
        fault: what it would say.
    """

    def __init__(self, check: str, fault: Fault) -> None:
        super().__init__(fault.found)
        self.check, self.fault = check, fault


HIDDEN_STATE = (
    "keep all that changes from step to step in the state that `weigh` returns, as tensors; keep nothing on self, on "
    "the class or in a closure."
)
RETURN = "end weigh with: return weights, state"
DIVISION = (
    "look for a division by a sum or norm that can be zero, a logarithm of zero, or an overflow of a product or a "
    "power. Divide with torch.where(x > 0, x, 1.0) below the line; divide large numbers by their maximum first."
)


def expect_shape(weighting: Weighting, problem: Problem, weights: Tensor) -> None:
    """Raises a fault unless the weights have the shape that ``writes`` says."""
    m, n = problem.jacobian.shape
    expected = {"task": (m,), "sample": tuple(problem.losses.shape), "entry": (m, n)}[weighting.writes]
    found = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
    if found != expected:
        raise Fault(
            f"weights of shape {list(expected)}, since writes is {weighting.writes!r}.",
            f"{list(found) if isinstance(found, tuple) else found}.",
            "return one weight for each task (sample, entry), for one task too (squeeze drops it), or set `writes`.",
        )


def fresh(weighting: Weighting) -> Weighting:
    """A copy that has seen nothing, so that checks do not see each other's traces."""
    try:
        return copy.deepcopy(weighting)
    except Exception:  # check_survives_deepcopy reports it
        return weighting


def copied(state: Any) -> Any:
    """A state with tensors of its own."""
    if isinstance(state, Tensor):
        return state.clone()
    if isinstance(state, Mapping):
        return {key: copied(value) for key, value in state.items()}
    return copy.copy(state)


def not_tensors(value: Any, path: str = "state") -> str:
    """What in a state is neither a mapping with string keys nor a tensor; empty if nothing is."""
    if isinstance(value, Tensor):
        return ""
    if not isinstance(value, Mapping):
        return f"{path} is {type(value).__name__}"
    for key, inner in value.items():
        wrong = not_tensors(inner, f"{path}[{key!r}]") if isinstance(key, str) else f"{path} has the key {key!r}"
        if wrong:
            return wrong
    return ""


def same_state(a: Any, b: Any) -> bool:
    """Whether two states are equal to the last bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a.nan_to_num(nan=3.25e7), b.nan_to_num(nan=3.25e7))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in a)
    return type(a) is type(b) and bool(a == b)


def agree(weighting: Weighting, problem: Problem, a: Tensor, b: Tensor, tolerance: float = TOLERANCE) -> bool:
    """Whether two weights are the same, up to rounding.

    Where a weighting reads gradients that are linearly dependent, different weights may be one step: that is enough.
    """
    size = max(float(a.abs().amax()), float(b.abs().amax()))
    if bool((a - b).abs().amax() <= tolerance * size):
        return True
    if not weighting.needs & (Needs.GRAMIAN | Needs.JACOBIAN):
        return False
    unit = max(problem.size(a), problem.size(b))
    return bool(torch.linalg.vector_norm(problem.step(a - b)) <= tolerance * unit)
