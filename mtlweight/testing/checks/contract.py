"""What every weighting owes to whoever calls it."""

from collections.abc import Mapping, Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight._view import Needs
from mtlweight._weighting import Weighting, evaluate
from mtlweight.testing._conformance import (
    TASKS,
    ElsewhereError,
    Fault,
    Steps,
    batches,
    for_all,
    fresh,
    play,
    registered,
    same_state,
    simple_to_extreme,
)
from mtlweight.testing._problem import Problem, show

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@registered()
def check_shape(weighting: Weighting, *, tasks: Sequence[int] = TASKS) -> None:
    """The weights have the shape that ``writes`` says, for one task too.

    Args:
        weighting: the weighting on trial.
        tasks: numbers of tasks to try.

    Raises:
        ConformanceError: if they have not.
    """

    def holds(steps: Steps) -> None:
        try:
            play(fresh(weighting), steps)
        except ElsewhereError as error:
            if error.check == "shape":
                raise error.fault from None
            raise

    for_all("shape", weighting, batches(weighting, tasks), holds, share=0.6)


@registered()
def check_stays_finite(weighting: Weighting, *, tasks: Sequence[int] = TASKS) -> None:
    """Runs on any finite input, and gives finite weights and a finite state.

    Gradients that are zero, equal, opposed, dependent, stationary, more than there are parameters; at scales from
    1e-10 to 1e15, with rows of very different scale.

    Args:
        weighting: the weighting on trial.
        tasks: numbers of tasks to try.

    Raises:
        ConformanceError: if it fails on some input, or gives anything that is not finite.
    """

    def holds(steps: Steps) -> None:
        try:
            moments = play(fresh(weighting), steps)
        except ElsewhereError as error:
            if error.check == "stays_finite":
                raise error.fault from None
            raise
        except Exception as error:
            raise Fault(
                "weights for any finite input.",
                f"{type(error).__name__}: {error}",
                "make it run on gradients that are zero, equal, opposed or dependent, at any scale; losses that it is "
                "not defined for belong in `traits.losses`.",
            ) from error
        for step, moment in enumerate(moments):
            bad = [name for name, value in _leaves(moment.state) if not bool(value.isfinite().all())]
            if bad:
                raise Fault(
                    "a finite state after finite input.",
                    f"state[{bad[0]!r}] is not finite after step {step}.",
                    "keep NaN and infinity out of the state: they never leave it again.",
                )

    for_all("stays_finite", weighting, simple_to_extreme(weighting, tasks), holds, share=4)


@registered()
def check_dtype(weighting: Weighting, *, tasks: Sequence[int] = TASKS) -> None:
    """Weights come in the view's dtype and on its device; a call returns them in the dtype that it was given.

    Args:
        weighting: the weighting on trial.
        tasks: numbers of tasks to try.

    Raises:
        ConformanceError: if a dtype or device differs.
    """

    def holds(steps: Steps) -> None:
        problem = steps[0]
        with torch.no_grad():
            view = problem.view()
            one = fresh(weighting)
            weights, _ = one.weigh(view, one.init(view))
        if weights.dtype != view.dtype or weights.device != view.device:
            raise Fault(
                f"weights in {view.dtype} on {view.device}, as the view's statistics are.",
                f"{weights.dtype} on {weights.device}.",
                "build tensors with dtype=view.dtype, device=view.device, or from the view's own.",
            )
        for dtype in DTYPES:
            given = _arguments(weighting, problem, dtype)
            found = fresh(weighting)(**given).dtype
            if found != dtype:
                raise Fault(f"weights in {dtype} for input in {dtype}.", f"{found}.", "do not override __call__.")

    for_all("dtype", weighting, batches(weighting, tasks, steps=(1, 1)), holds, share=0.6)


@registered()
def check_leaves_input_alone(weighting: Weighting, *, tasks: Sequence[int] = TASKS) -> None:
    """Does not change what it reads: the same tensors serve other weightings and the step itself.

    Args:
        weighting: the weighting on trial.
        tasks: numbers of tasks to try.

    Raises:
        ConformanceError: if a statistic has changed.
    """

    def holds(steps: Steps) -> None:
        for moment in play(fresh(weighting), steps):
            for name, value in moment.source.values.items():
                original = getattr(moment.problem, name)
                if not torch.equal(value, original):
                    raise Fault(
                        f"view.{name} as it was: {show(original)}.",
                        f"{show(value)} after weigh.",
                        "work on a copy: no in-place methods (add_, mul_, fill_diagonal_, ...), no `x += ...`, no "
                        "`x[i] = ...` on what the view gives; or call .clone() first.",
                    )

    for_all("leaves_input_alone", weighting, batches(weighting, tasks), holds, share=0.6)


@registered()
def check_keeps_no_graph(weighting: Weighting, *, tasks: Sequence[int] = TASKS) -> None:
    """Neither weights nor state hold an autograd graph, which would grow with every step.

    Args:
        weighting: the weighting on trial.
        tasks: numbers of tasks to try.

    Raises:
        ConformanceError: if one requires grad.
    """

    def holds(steps: Steps) -> None:
        for moment in play(fresh(weighting), steps):
            named = [("the weights", moment.weights)]
            named += [(f"state[{name!r}]", value) for name, value in _leaves(moment.state)]
            named += [(f"view.{name}", value) for name, value in moment.source.values.items()]
            for name, value in named:
                if value.requires_grad:
                    raise Fault(
                        "tensors without a graph.",
                        f"{name} requires grad.",
                        "call .detach() on what leaves torch.enable_grad(), and keep plain tensors in the state, no "
                        "nn.Parameter.",
                    )

    for_all("keeps_no_graph", weighting, batches(weighting, tasks), holds, share=0.6)


@registered()
def check_reads_only_needs(weighting: Weighting, *, tasks: Sequence[int] = TASKS) -> None:
    """Reads nothing but what ``needs`` and, at each step, ``needs_at`` declare: engines compute just that.

    Args:
        weighting: the weighting on trial.
        tasks: numbers of tasks to try.

    Raises:
        ConformanceError: if it reads more.
    """

    def holds(steps: Steps) -> None:
        one = fresh(weighting)
        for step in range(len(steps) + 3):
            if one.needs_at(step) not in one.needs:
                raise Fault(
                    f"needs_at({step}) within needs = {one.needs}.",
                    f"{one.needs_at(step)}.",
                    "declare in `needs` all that is read at any step.",
                )
        read = [moment.source.read for moment in play(fresh(weighting), steps)]
        for step, found in enumerate(read):
            more = found & ~one.needs_at(step)
            if more:
                raise Fault(
                    f"at step {step} no reading but of {one.needs_at(step)}.",
                    f"it reads {_flags(more)} too.",
                    "add the flag to `needs` (and to `needs_at`, if you define it), or do not read it.",
                )
        try:
            evaluate(one, steps[0].view(), None)
        except MTLWeightError as error:
            raise Fault("reading of declared statistics alone.", str(error), "add the flag to `needs`.") from error

    for_all("reads_only_needs", weighting, batches(weighting, tasks, steps=(1, 4)), holds)


@registered(lambda weighting: weighting.needs & ~Needs.SAMPLES != Needs.NOTHING)
def check_needs_nothing_unread(weighting: Weighting, *, tasks: Sequence[int] = TASKS) -> None:
    """Everything that ``needs`` declares is read at some time: an engine would compute the rest for nothing.

    Args:
        weighting: the weighting on trial.
        tasks: numbers of tasks to try.

    Raises:
        ConformanceError: if a declared statistic is never read.
    """
    unread = weighting.needs & ~Needs.SAMPLES
    seen: set[Needs] = set()

    def watch(steps: Steps) -> None:
        for moment in play(fresh(weighting), steps):
            seen.add(moment.source.read)

    def judge(steps: Steps) -> None:
        watch(steps)
        never = unread
        for read in seen:
            never &= ~read
        if never:
            raise Fault(
                f"a use of all that needs = {weighting.needs} declares.",
                f"{_flags(never)} was read at no step of many runs.",
                "take the flag out of `needs`: computing it can cost a backward pass a task.",
            )

    inputs = batches(weighting, tasks, extreme=True)
    for_all("needs_nothing_unread", weighting, inputs, watch)
    for_all("needs_nothing_unread", weighting, inputs, judge, share=0.4)


@registered()
def check_repeats(weighting: Weighting, *, tasks: Sequence[int] = TASKS) -> None:
    """The same view, seed and step give the same weights to the last bit: all ranks agree, and a run can be repeated.

    Nor does it draw or seed global random numbers, which are the model's.

    Args:
        weighting: the weighting on trial.
        tasks: numbers of tasks to try.

    Raises:
        ConformanceError: if they differ.
    """

    def holds(given: tuple[int, Steps]) -> None:
        seed, steps = given
        before = play(fresh(weighting), steps, seed=seed)
        after = play(fresh(weighting), steps, seed=seed, noise=99)
        for step, (a, b) in enumerate(zip(before, after, strict=True)):
            remedy = "draw random numbers with generator=view.generator, and keep nothing on the class or in globals."
            if not torch.equal(a.weights, b.weights):
                found = f"weights {a.weights.tolist()}, then {b.weights.tolist()}"
            elif not same_state(a.state, b.state):
                found = "the same weights, but another state"
            elif a.disturbed:
                raise Fault(
                    "the global random numbers as they were.", f"others after step {step}: drawn, or seeded.", remedy
                )
            else:
                continue
            raise Fault(
                "the same weights and state for the same view, seed and step.",
                f"{found} at step {step} with seed {seed}.",
                remedy,
            )

    inputs = st.tuples(st.integers(0, 3), batches(weighting, tasks))
    for_all("repeats", weighting, inputs, holds)


def _arguments(weighting: Weighting, problem: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    names = [
        need.name.lower()
        for need in (Needs.LOSSES, Needs.GRAMIAN, Needs.JACOBIAN, Needs.ALIGNMENT)
        if need.name is not None and need in weighting.needs
    ]
    given = {name: getattr(problem, name) for name in names or ["losses"]}
    if weighting.writes == "sample" and given.keys() & {"gramian", "jacobian"}:
        given.pop("gramian", None)
        given["jacobian"] = problem.rows  # what the samples weigh cannot be told from the tasks' gradients
    return {name: value.to(dtype) for name, value in given.items()}


def _flags(needs: Needs) -> str:
    return " | ".join(f"Needs.{need.name}" for need in Needs if need.value and need in needs)


def _leaves(state: object, path: str = "") -> list[tuple[str, Tensor]]:
    if isinstance(state, Tensor):
        return [(path, state)]
    if isinstance(state, Mapping):
        return [leaf for key, value in state.items() for leaf in _leaves(value, f"{path}.{key}" if path else str(key))]
    return []
