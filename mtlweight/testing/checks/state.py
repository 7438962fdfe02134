"""What an explicit state makes possible: saving, copying, two runs side by side, tasks that come and go."""

import copy
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from mtlweight._view import View
from mtlweight._weighting import Weighting
from mtlweight.testing._conformance import (
    HIDDEN_STATE,
    TASKS,
    ElsewhereError,
    Fault,
    Moment,
    Steps,
    agree,
    batches,
    copied,
    for_all,
    fresh,
    not_tensors,
    play,
    registered,
    same_state,
)
from mtlweight.testing._problem import Statistics, show


@registered()
def check_state_of_tensors(weighting: Weighting, *, tasks: Sequence[int] = TASKS) -> None:
    """The state is made of nested mappings with string keys and tensors, and of nothing else.

    Args:
        weighting: the weighting on trial.
        tasks: numbers of tasks to try.

    Raises:
        ConformanceError: if it holds anything else.
    """

    def holds(steps: Steps) -> None:
        for moment in play(fresh(weighting), steps):
            wrong = not_tensors(moment.state)
            if wrong:
                raise Fault(
                    "nested mappings from strings to tensors.",
                    f"{wrong}.",
                    "keep numbers as torch.tensor(...), and values per task as view.scatter tables.",
                )

    for_all("state_of_tensors", weighting, batches(weighting, tasks), holds, share=0.6)


@registered()
def check_leaves_state_alone(weighting: Weighting, *, tasks: Sequence[int] = TASKS) -> None:
    """Returns a new state and leaves the given one: a step may be skipped, or evaluated twice.

    Args:
        weighting: the weighting on trial.
        tasks: numbers of tasks to try.

    Raises:
        ConformanceError: if the given state has changed.
    """

    def holds(steps: Steps) -> None:
        moments = play(fresh(weighting), steps)
        one = fresh(weighting)
        for step in range(1, len(steps)):
            given, original = copied(moments[step - 1].state), moments[step - 1].state
            with torch.no_grad():
                one.weigh(View(Statistics(steps[step]), step=step), given)
            if not same_state(given, original):
                raise Fault(
                    "the given state as it was.",
                    f"weigh has changed it at step {step}.",
                    "return a new mapping with new tensors: no `state[...] = ...`, no in-place methods on its tensors.",
                )

    for_all("leaves_state_alone", weighting, batches(weighting, tasks, steps=(2, 3)), holds)


@registered()
def check_resumes(weighting: Weighting, *, tasks: Sequence[int] = TASKS) -> None:
    """A run that is saved with ``torch.save``, loaded with ``weights_only=True`` and continued in a new process is the
    same, to the last bit, as one that was never interrupted.

    Args:
        weighting: the weighting on trial.
        tasks: numbers of tasks to try.

    Raises:
        ConformanceError: if it differs, or cannot be saved or loaded.
    """  # noqa: D205

    def holds(steps: Steps) -> None:
        whole = play(fresh(weighting), steps)
        for cut in range(1, len(steps)):
            try:
                buffer = io.BytesIO()
                torch.save(whole[cut - 1].state, buffer)
                buffer.seek(0)
                state = torch.load(buffer, weights_only=True)
            except Exception as error:
                raise Fault(
                    "a state that torch.save writes and torch.load(weights_only=True) reads.",
                    f"{type(error).__name__}: {str(error).splitlines()[0]}",
                    "keep nested mappings from strings to tensors, and nothing else.",
                ) from error
            rest = play(fresh(weighting), steps[cut:], state=state, first=cut)
            _expect_same(rest, whole[cut:], f"saved after step {cut - 1} and resumed")

    for_all("resumes", weighting, batches(weighting, tasks, steps=(2, 4)), holds)


@registered()
def check_survives_deepcopy(weighting: Weighting, *, tasks: Sequence[int] = TASKS) -> None:
    """Copies of the weighting and of its state go on as the originals do.

    Args:
        weighting: the weighting on trial.
        tasks: numbers of tasks to try.

    Raises:
        ConformanceError: if they do not, or cannot be copied.
    """

    def holds(steps: Steps) -> None:
        one = fresh(weighting)
        state = play(one, steps[:1])[0].state
        try:
            other, same = copy.deepcopy(one), copy.deepcopy(state)
        except Exception as error:
            raise Fault(
                "a weighting and a state that copy.deepcopy can copy.",
                f"{type(error).__name__}: {error}",
                "make it a frozen dataclass of plain hyperparameters; no locks, generators, files or open handles.",
            ) from error
        rest = play(other, steps[1:], state=same, first=1)
        _expect_same(rest, play(one, steps[1:], state=state, first=1), "copied after step 0")

    for_all("survives_deepcopy", weighting, batches(weighting, tasks, steps=(2, 3)), holds)


@registered()
def check_keeps_uses_apart(weighting: Weighting, *, tasks: Sequence[int] = TASKS) -> None:
    """One weighting object serves two models: two runs that take turns are as two that run one after the other.

    Args:
        weighting: the weighting on trial.
        tasks: numbers of tasks to try.

    Raises:
        ConformanceError: if one run shows in the other.
    """

    def holds(given: tuple[Steps, Steps]) -> None:
        one = fresh(weighting)
        runs: list[tuple[Steps, list[Moment]]] = [(steps, []) for steps in given]
        for step in range(max(map(len, given))):
            for steps, done in runs:
                if step < len(steps):
                    state = done[-1].state if done else None
                    done.extend(play(one, steps[step : step + 1], state=state, first=step))
        for steps, done in runs:
            _expect_same(done, play(fresh(weighting), steps), "used for two runs in turn")

    inputs = st.tuples(batches(weighting, tasks, steps=(1, 3)), batches(weighting, tasks, steps=(1, 3)))
    for_all("keeps_uses_apart", weighting, inputs, holds, share=0.5)


@registered()
def check_absent_tasks(weighting: Weighting, *, tasks: Sequence[int] = TASKS) -> None:
    """A task that is absent from a batch keeps its state, and the others go on.

    Args:
        weighting: the weighting on trial.
        tasks: numbers of tasks to try.

    Raises:
        ConformanceError: if it fails without the task, changes or loses the task's state, or starts afresh.
    """
    several = [m for m in tasks if m > 1]
    inputs = st.tuples(st.integers(0, 7), batches(weighting, several, steps=(4, 5)))
    history_counted: list[bool] = []

    def holds(given: tuple[int, Steps]) -> None:
        pick, steps = given
        gone = pick % len(steps[0].tasks)
        present = [i for i in range(len(steps[0].tasks)) if i != gone]
        *past, missed, last = steps
        one = fresh(weighting)
        before = play(one, past)[-1].state
        try:
            during = play(one, [missed.taking(present)], state=before, first=len(past))[0].state
        except ElsewhereError:
            raise
        except Exception as error:
            raise Fault(
                f"weights for the present tasks while task {gone} is absent.",
                f"{type(error).__name__}: {error}",
                "keep values per task in view.scatter tables and read them with view.gather, by name and not by "
                "position.",
            ) from error
        rows, kept = (_entries(state, missed.tasks[gone]) for state in (before, during))
        if not same_state(rows, kept):
            raise Fault(
                f"the state of task {gone} as it was while the task is absent.",
                f"it was {rows}, and is {kept}.",
                "update the present tasks alone: view.scatter(table, values) does.",
            )
        states = (before, during, None)
        full, back, new = (play(one, [last], state=state, first=len(past) + 1)[0].weights for state in states)
        if not agree(weighting, last, full, new, 1e-3):
            history_counted.append(not agree(weighting, last, back, new, 1e-12))

    for_all("absent_tasks", weighting, inputs, holds)
    if any(history_counted) or not history_counted:
        return

    def starts_afresh(given: tuple[int, Steps]) -> None:
        count = len(history_counted)
        holds(given)
        if len(history_counted) > count and not history_counted[-1]:
            last, gone = len(given[1]) - 1, given[0] % len(given[1][0].tasks)
            raise Fault(
                "the history to count still after a task was absent once.",
                f"at step {last} the weights of a fresh start, after task {gone} was absent at step {last - 1}; so on "
                "every input that was tried.",
                "do not start afresh where the number of tasks changes: keep values per task by name.",
            )

    for_all("absent_tasks", weighting, inputs, starts_afresh)


def _expect_same(found: list[Moment], expected: list[Moment], how: str) -> None:
    for a, b in zip(found, expected, strict=True):
        if not torch.equal(a.weights, b.weights):
            raise Fault(
                f"weights {show(b.weights)}, as in an undisturbed run.", f"{show(a.weights)} when {how}.", HIDDEN_STATE
            )
        if not same_state(a.state, b.state):
            raise Fault("the state of an undisturbed run.", f"another one when {how}.", HIDDEN_STATE)


def _entries(state: Any, task: str, path: str = "state") -> dict[str, Any]:
    """All rows of tables that belong to a task. A combinator's parts are called "0", "1", ... too, but hold tables."""
    found: dict[str, Any] = {}
    if isinstance(state, Mapping):
        for key, value in state.items():
            if key == task and isinstance(value, Tensor):
                found[path] = value
            else:
                found.update(_entries(value, task, f"{path}[{key!r}]"))
    return found
