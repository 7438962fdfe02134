"""All checks at once: in one call, or as one pytest case each."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from mtlweight._errors import MTLWeightError
from mtlweight._weighting import Weighting
from mtlweight.testing import checks as _checks
from mtlweight.testing._conformance import CHECKS, TASKS, ConformanceError, name_of
from mtlweight.testing._problem import Problem

NONE: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Case:
    """A weighting with what the checks should know about it.

    Args:
        weighting: the weighting on trial.
        tasks: numbers of tasks to try.
        oracle: a slow, literal transcription of its paper; see
            :func:`~mtlweight.testing.checks.check_agrees_with_oracle`.
        expected_failures: from the name of a check (without ``check_``) to the reason why it fails. Strict: a check
            that passes after all is an error.
        counterexamples: from the name of a check ``claims_...`` to steps that refute a claim that is not made, where
            the kit finds none by itself.

    Raises:
        MTLWeightError: for an expected failure without a reason, or a check that is not run.
    """

    weighting: Weighting
    tasks: Sequence[int] = TASKS
    oracle: _checks.laws.Oracle | None = None
    expected_failures: Mapping[str, str] = field(default_factory=dict)
    counterexamples: Mapping[str, Sequence[Problem]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.weighting, Weighting):
            raise MTLWeightError(
                f"Expected a weighting to test, found {self.weighting!r}. Pass an object: MyWeighting(), not the class."
            )
        known = self.checks()
        unknown = [name for name in (*self.expected_failures, *self.counterexamples) if name not in known]
        if unknown:
            raise MTLWeightError(
                f"Expected names of checks that are run on {name_of(self.weighting)}, found {unknown[0]!r}. Choose "
                f"from {', '.join(known)}."
            )
        for name, reason in self.expected_failures.items():
            if not reason:
                raise MTLWeightError(f"Expected a reason for the failure of {name!r}, found none. Say why it fails.")

    def checks(self) -> dict[str, Callable[[Weighting], None]]:
        """The checks that the weighting's needs and traits call for, by name: each takes the weighting."""
        found: dict[str, Callable[[Weighting], None]] = {
            check.name: functools.partial(check.run, tasks=self.tasks, **self._stored(check.name))
            for check in CHECKS
            if check.applies(self.weighting)
        }
        if self.oracle is not None:
            found["agrees_with_oracle"] = functools.partial(
                _checks.check_agrees_with_oracle, oracle=self.oracle, tasks=self.tasks
            )
        return found

    def _stored(self, name: str) -> dict[str, Any]:
        return {"counterexample": self.counterexamples[name]} if name in self.counterexamples else {}


def check_weighting(
    weighting: Weighting,
    *,
    tasks: Sequence[int] = TASKS,
    oracle: _checks.laws.Oracle | None = None,
    expected_failures: Mapping[str, str] = NONE,
    counterexamples: Mapping[str, Sequence[Problem]] = NONE,
) -> None:
    """Runs every check that a weighting's needs and traits call for.

    >>> from mtlweight.testing import check_weighting
    >>> check_weighting(Equal())

    Args:
        weighting: the weighting on trial.
        tasks: numbers of tasks to try. Default: one, two, three and eight.
        oracle: a slow, literal transcription of its paper, to compare with. Default: none.
        expected_failures: from the name of a check (without ``check_``) to the reason why it fails. Default: none.
        counterexamples: from the name of a check ``claims_...`` to steps that refute a claim that is not made.
            Default: the kit looks for them.

    Raises:
        ConformanceError: if a check fails that was not expected to, or passes that was expected to fail. With several,
            the message has them all, and ``failures`` one error each.
        MTLWeightError: for an expected failure without a reason, or a check that is not run.
    """
    case = Case(weighting, tasks, oracle, expected_failures, counterexamples)
    failures = []
    for name, check in case.checks().items():
        try:
            check(weighting)
        except ConformanceError as error:
            if name not in expected_failures:
                failures.append(error)
            continue
        if name in expected_failures:
            failures.append(
                ConformanceError(
                    f"{name_of(weighting)} passes check_{name}.\nExpected: a failure ({expected_failures[name]}).\n"
                    "Found: none.\nTo do: take it out of expected_failures.",
                    name,
                )
            )
    # What could not be tried at all says nothing beside the failure that is to blame.
    failures = [error for error in failures if error.tried] or failures
    if len(failures) == 1:
        raise failures[0]
    if failures:
        names = ", ".join(error.check for error in failures)
        text = "\n\n".join(str(error) for error in failures)
        raise ConformanceError(
            f"{name_of(weighting)} fails {len(failures)} checks: {names}.\n\n{text}",
            failures[0].check,
            failures=tuple(failures),
        )


def parametrize_with_checks(cases: Iterable[Weighting | Case]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes one pytest case of each weighting and check, for a test that takes ``weighting`` and ``check``.

    >>> from mtlweight.testing import Case, parametrize_with_checks
    >>> @parametrize_with_checks([UW(), Case(Constant([2.0, 1.0]), tasks=[2])])
    ... def test_conformance(weighting, check):
    ...     check(weighting)

    Their ids read ``UW(step_size=0.02, initial=0.0)-stays_finite``. Expected failures become strict ``xfail``.

    Args:
        cases: weightings, or cases where a check has to know more.

    Raises:
        MTLWeightError: if one is no weighting.
    """
    parameters = []
    for item in cases:
        case = item if isinstance(item, Case) else Case(item)
        for name, check in case.checks().items():
            reason = case.expected_failures.get(name)
            marks = [pytest.mark.xfail(reason=reason, strict=True, raises=ConformanceError)] if reason else []
            parameters.append(pytest.param(case.weighting, check, marks=marks, id=f"{name_of(case.weighting)}-{name}"))
    decorate: Callable[[Callable[..., Any]], Callable[..., Any]] = pytest.mark.parametrize(
        ("weighting", "check"), parameters
    )
    return decorate
