"""Claims in both directions: what a weighting claims holds, and what it does not claim has a counterexample.

A combinator's claims are computed from its parts' and may be cautious: only the first direction is asked of weightings
that have ``parts``.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight._view import Needs
from mtlweight._weighting import Weighting
from mtlweight.testing import arbitrary
from mtlweight.testing._conformance import (
    TASKS,
    TOLERANCE,
    Fault,
    Steps,
    agree,
    batches,
    exists,
    for_all,
    fresh,
    per_sample,
    play,
    registered,
    simple_to_extreme,
)
from mtlweight.testing._problem import Problem, show

CANCELLED = 1e-4
"""Share of its greatest length to which a step vanishes: the square root of what rounding leaves of the Gramian."""
KINDS_THAT_OPPOSE = ("conflicting", "opposed", "weakly stationary", "strongly stationary", "rank deficient", "m > n")


@registered()
def check_claims_nonnegative(
    weighting: Weighting, *, tasks: Sequence[int] = TASKS, counterexample: Sequence[Problem] = ()
) -> None:
    """``nonnegative``: no weight is below zero; unclaimed, one is for some input.

    Args:
        weighting: the weighting on trial.
        tasks: numbers of tasks to try.
        counterexample: steps that refute the claim if it is not made; looked for if left out.

    Raises:
        ConformanceError: if the claim is false or timid.
    """
    inputs = simple_to_extreme(weighting, tasks)

    def negative(steps: Steps) -> Tensor | None:
        found = [moment.weights for moment in play(fresh(weighting), steps)]
        return next((weights for weights in found if bool((weights < 0).any())), None)

    def holds(steps: Steps) -> None:
        found = negative(steps)
        if found is not None:
            raise Fault(
                "no weight below zero, as traits.nonnegative claims.",
                f"weights {show(found)}.",
                _take_back("nonnegative"),
            )

    _both_ways(
        "claims_nonnegative", weighting, inputs, holds, weighting.traits.nonnegative, "nonnegative=True", counterexample
    )


@registered(lambda weighting: weighting.writes != "entry" or weighting.traits.total is not None)
def check_claims_total(
    weighting: Weighting, *, tasks: Sequence[int] = TASKS, counterexample: Sequence[Problem] = ()
) -> None:
    """``total``: the sum of weights that are not all zero, while no task has been absent; unclaimed, it varies.

    Args:
        weighting: the weighting on trial.
        tasks: numbers of tasks to try.
        counterexample: steps that refute the claim if it is not made; looked for if left out.

    Raises:
        ConformanceError: if the claim is false or timid.
    """
    inputs = simple_to_extreme(weighting, tasks)
    claimed = weighting.traits.total

    def sums(steps: Steps) -> list[tuple[float, float, int]]:
        every = [moment.weights for moment in play(fresh(weighting), steps)]
        return [(float(w.sum()), float(w.abs().sum()), len(w)) for w in every if bool((w != 0).any())]

    def holds(steps: Steps) -> None:
        for total, size, m in sums(steps):
            expected = float(m if claimed == "m" or claimed is None else claimed)
            if abs(total - expected) > TOLERANCE * max(size, abs(expected)):
                raise Fault(
                    f"weights with the sum {expected:g}, as traits.total claims.", f"{total:g}.", _take_back("total")
                )

    if claimed is not None:
        for_all("claims_total", weighting, inputs, holds)
        return
    first: list[float] = []

    def not_its_first_sum(steps: Steps) -> bool:
        found = sums(steps)
        first.extend(total for total, _, _ in found[:1] if not first)
        return any(abs(total - first[0]) > TOLERANCE * max(size, abs(first[0])) for total, size, _ in found)

    def not_m(steps: Steps) -> bool:
        return any(abs(total - m) > TOLERANCE * size for total, size, m in sums(steps))

    search = st.just(list(counterexample)) if counterexample else st.one_of(inputs)
    if _cautious(weighting):
        return
    if not exists(search, not_its_first_sum) and first:
        _timid("claims_total", weighting, search, f"total={first[0]:g}")
    if not exists(search, not_m):
        _timid("claims_total", weighting, search, 'total="m"')


@registered()
def check_claims_nonconflicting(
    weighting: Weighting, *, tasks: Sequence[int] = TASKS, counterexample: Sequence[Problem] = ()
) -> None:
    """``nonconflicting``: the step ``d = Σ w · J`` has ``J d >= 0``; unclaimed, some task's loss rises.

    Args:
        weighting: the weighting on trial.
        tasks: numbers of tasks to try.
        counterexample: steps that refute the claim if it is not made; looked for if left out.

    Raises:
        ConformanceError: if the claim is false or timid.
    """
    inputs = simple_to_extreme(weighting, tasks, gradients=True)

    def worst(problem: Problem, weights: Tensor) -> float:
        norms = torch.linalg.vector_norm(problem.jacobian, dim=1)
        unit = norms * problem.size(weights)
        gain = problem.jacobian @ problem.step(weights)
        return float(torch.where(unit > 0, gain / torch.where(unit > 0, unit, 1.0), 0.0).min())

    def holds(steps: Steps) -> None:
        for moment in play(fresh(weighting), steps):
            found = worst(moment.problem, moment.weights)
            if found < -TOLERANCE:
                raise Fault(
                    "a step that raises no task's loss to first order, as traits.nonconflicting claims.",
                    f"weights {show(moment.weights)}, whose step has J d = "
                    f"{show(moment.problem.jacobian @ moment.problem.step(moment.weights))}.",
                    _take_back("nonconflicting"),
                )

    _both_ways(
        "claims_nonconflicting",
        weighting,
        inputs,
        holds,
        weighting.traits.nonconflicting,
        "nonconflicting=True",
        counterexample,
        gradients=True,
        search=batches(weighting, [m for m in tasks if m > 1], kinds=KINDS_THAT_OPPOSE, gradients=True),
    )


@registered()
def check_claims_stationary(
    weighting: Weighting, *, tasks: Sequence[int] = TASKS, counterexample: Sequence[Problem] = ()
) -> None:
    """``stationary``: the step vanishes where a convex combination of the gradients does; unclaimed, it does not.

    Args:
        weighting: the weighting on trial.
        tasks: numbers of tasks to try.
        counterexample: steps that refute the claim if it is not made; looked for if left out.

    Raises:
        ConformanceError: if the claim is false or timid.
    """
    claimed = weighting.traits.stationary
    kinds = {"weak": ("weakly stationary", "strongly stationary"), "strong": ("strongly stationary",)}

    def holds(steps: Steps) -> None:
        for moment in play(fresh(weighting), steps):
            step = moment.problem.step(moment.weights)
            if torch.linalg.vector_norm(step) > CANCELLED * moment.problem.size(moment.weights):
                raise Fault(
                    "no step where the gradients balance, as traits.stationary claims.",
                    f"weights {show(moment.weights)}, whose step is {show(step)}.",
                    _take_back("stationary"),
                )

    if claimed is not None:
        inputs = simple_to_extreme(weighting, tasks, kinds=kinds[claimed], gradients=True)
        for_all("claims_stationary", weighting, inputs, holds, gradients=True)
    if claimed != "weak":
        more = "strong" if claimed is None else "weak"
        search = batches(weighting, [m for m in tasks if m > 1], kinds=kinds[more], gradients=True)
        _expect_counterexample("claims_stationary", weighting, search, holds, f'stationary="{more}"', counterexample)


@registered()
def check_claims_scale(
    weighting: Weighting, *, tasks: Sequence[int] = TASKS, counterexample: Sequence[Problem] = ()
) -> None:
    """``scale_degree``: all losses and gradients times ``c`` multiply the weights by ``c ** scale_degree``.

    Tried over c from 1e-8 to 1e8, where no loss is zero. Unclaimed, no power of ``c`` fits even for ``c`` near 1: a
    power that fits there alone is the trace of an absolute epsilon.

    Args:
        weighting: the weighting on trial.
        tasks: numbers of tasks to try.
        counterexample: steps that refute the claim if it is not made; looked for if left out.

    Raises:
        ConformanceError: if the claim is false or timid.
    """
    every = batches(weighting, tasks, kinds=tuple(arbitrary.KINDS), zero_losses=False)
    regular = st.just(list(counterexample)) if counterexample else batches(weighting, tasks, zero_losses=False)

    def scaled(steps: Steps, exponent: int) -> list[tuple[Problem, Tensor, Tensor]]:
        plain = play(fresh(weighting), steps)
        # A power of two: products are exact, so that ties stay ties.
        times = play(fresh(weighting), [problem.scaled(2.0**exponent) for problem in steps])
        return [(a.problem, a.weights, b.weights) for a, b in zip(plain, times, strict=True)]

    def expect(degree: int, why: str, todo: str) -> Any:
        def holds(given: tuple[int, Steps]) -> None:
            exponent, steps = given
            for problem, weights, found in scaled(steps, exponent):
                expected = weights * 2.0 ** (degree * exponent)
                if not agree(weighting, problem, expected, found):
                    raise Fault(
                        f"weights {show(expected)} for all losses and gradients times 2**{exponent}: {why}.",
                        f"{show(found)}; unscaled they are {show(weights)}.",
                        todo,
                    )

        return holds

    # From the extremes inwards: what shrinks is then the batch, and the difference is plain to see.
    factors = st.sampled_from([sign * size for size in (27, 20, 13, 7, 3, 1) for sign in (-1, 1)])
    claimed = weighting.traits.scale_degree
    relative = (
        "make each epsilon and threshold relative to the scale of what it is added to or compared with, such as 1e-8 "
        "times the mean of the Gramian's diagonal"
    )
    if claimed is not None:
        holds = expect(claimed, f"traits.scale_degree claims {claimed}", f"{relative}; or take back the claim.")
        for_all("claims_scale", weighting, st.tuples(factors, every), holds, share=2)
        return
    degrees: set[int | None] = set()

    def unlike_a_power(steps: Steps) -> bool:
        for problem, weights, found in scaled(steps, 1):
            size = float(weights.abs().amax())
            if size == 0:
                continue
            ratio = float(found.abs().amax()) / size
            degree = round(math.log2(ratio)) if ratio > 0 else 99
            degrees.add(degree)
            if len(degrees) > 1 or not agree(weighting, problem, weights * 2.0**degree, found, 1e-5):
                return True
        return False

    if _cautious(weighting) or exists(regular, unlike_a_power) or not degrees:
        return
    degree = next(iter(degrees)) or 0
    holds = expect(degree, f"for factors near 1 the weights follow c**{degree}", f"{relative}.")
    for_all("claims_scale", weighting, st.tuples(factors, regular), holds, share=2)
    _timid("claims_scale", weighting, regular, f"scale_degree={degree}")


@registered()
def check_claims_random(weighting: Weighting, *, tasks: Sequence[int] = TASKS) -> None:
    """``random``: for some input the seed changes the weights; unclaimed, it never does.

    Args:
        weighting: the weighting on trial.
        tasks: numbers of tasks to try.

    Raises:
        ConformanceError: if the claim is false or timid.
    """
    inputs = batches(weighting, tasks, kinds=tuple(arbitrary.KINDS))

    def differ(steps: Steps) -> bool:
        one, other = (play(fresh(weighting), steps, seed=seed) for seed in (0, 1))
        return any(not torch.equal(a.weights, b.weights) for a, b in zip(one, other, strict=True))

    if not weighting.traits.random:

        def holds(steps: Steps) -> None:
            if differ(steps):
                expected, found = "the same weights for any seed, since traits.random is false.", "others for seed 1."
                raise Fault(expected, found, "claim Traits(random=True).")

        for_all("claims_random", weighting, inputs, holds)
    elif not exists(inputs, differ):

        def never(_steps: Steps) -> None:
            expected, found = (
                "weights that depend on the seed, since traits.random is true.",
                "the same for both seeds.",
            )
            raise Fault(expected, found, "take random=True out of `traits`; or draw with generator=view.generator.")

        for_all("claims_random", weighting, inputs, never)


@registered(lambda weighting: Needs.LOSSES in weighting.needs and weighting.traits.losses != "real")
def check_claims_losses(weighting: Weighting, *, tasks: Sequence[int] = TASKS) -> None:
    """``losses``: outside the domain that it claims, it raises ``MTLWeightError``, rather than going on silently.

    Args:
        weighting: the weighting on trial.
        tasks: numbers of tasks to try.

    Raises:
        ConformanceError: if it accepts such a loss, or raises another error.
    """
    domain = weighting.traits.losses
    outside = st.integers(-9, -1 if domain == "nonnegative" else 0)

    def holds(given: tuple[int, Steps]) -> None:
        loss, steps = given
        problem = steps[0]
        view = problem.view()
        losses = view.losses if problem.losses.ndim == 1 else view.sample_losses
        losses.flatten()[:1].fill_(float(loss))
        one = fresh(weighting)
        try:
            one.weigh(view, one.init(view))
        except MTLWeightError:
            return
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        else:
            found = "weights."
        raise Fault(
            f"an MTLWeightError for a first loss of {loss}, since traits.losses is {domain!r}.",
            found,
            "raise it with what was expected, what was found and what to do; or claim a wider domain.",
        )

    for_all("claims_losses", weighting, st.tuples(outside, batches(weighting, tasks, steps=(1, 1))), holds)


@registered(lambda weighting: per_sample(weighting) and weighting.traits.samples > 1)
def check_claims_samples(weighting: Weighting, *, tasks: Sequence[int] = TASKS) -> None:
    """``samples``: with fewer samples than it claims to need, it raises ``MTLWeightError``, rather than going on.

    Args:
        weighting: the weighting on trial.
        tasks: numbers of tasks to try.

    Raises:
        ConformanceError: if it accepts fewer, or raises another error.
    """
    least = weighting.traits.samples

    def holds(given: tuple[int, Steps]) -> None:
        count, steps = given
        problem = steps[0]
        few = problem.taking(range(len(problem.tasks)), range(count))
        try:
            play(fresh(weighting), [few])
        except MTLWeightError:
            return
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        else:
            found = "weights."
        raise Fault(
            f"an MTLWeightError for {count} samples a task, since traits.samples is {least}.",
            found,
            "raise it with what was expected, what was found and what to do; or claim fewer.",
        )

    inputs = st.tuples(st.integers(1, least - 1), batches(weighting, tasks, steps=(1, 1)))
    for_all("claims_samples", weighting, inputs, holds)


def _both_ways(
    check: str,
    weighting: Weighting,
    inputs: list[st.SearchStrategy[Steps]],
    holds: Any,
    claimed: bool,
    claim: str,
    counterexample: Sequence[Problem],
    *,
    gradients: bool = False,
    search: st.SearchStrategy[Steps] | None = None,
) -> None:
    if claimed:
        for_all(check, weighting, inputs, holds, share=2, gradients=gradients)
    else:
        wide = st.one_of(inputs) if search is None else search
        _expect_counterexample(check, weighting, wide, holds, claim, counterexample)


def _expect_counterexample(
    check: str,
    weighting: Weighting,
    inputs: st.SearchStrategy[Steps],
    holds: Any,
    claim: str,
    counterexample: Sequence[Problem] = (),
) -> None:
    def refuted(steps: Steps) -> bool:
        try:
            holds(steps)
        except Fault:
            return True
        return False

    inputs = st.just(list(counterexample)) if counterexample else inputs
    if not _cautious(weighting) and not exists(inputs, refuted):
        _timid(check, weighting, inputs, claim)


def _cautious(weighting: Weighting) -> bool:
    return bool(getattr(weighting, "parts", ()))


def _timid(check: str, weighting: Weighting, inputs: st.SearchStrategy[Steps], claim: str) -> None:
    def never(_steps: Steps) -> None:
        raise Fault(
            f"a counterexample to {claim}, since traits do not claim it.",
            "none among many inputs, or in the one that is stored.",
            f"claim Traits({claim}); or, if you know a counterexample, store it: "
            f"counterexamples={{{check!r}: [Problem.given(...)]}}.",
        )

    for_all(check, weighting, inputs, never)


def _take_back(claim: str) -> str:
    return f"fix the weights, or take {claim!r} out of `traits`."
