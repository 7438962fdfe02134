"""Laws: symmetry, composition, and what reaches the parameters."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from mtlweight._optimizer import MultiTaskOptimizer
from mtlweight._view import Needs, View
from mtlweight._weighting import Weighting, evaluate
from mtlweight.compose import chain
from mtlweight.loss import Constant
from mtlweight.testing import arbitrary
from mtlweight.testing._conformance import (
    TASKS,
    Fault,
    Steps,
    agree,
    batches,
    for_all,
    fresh,
    not_tensors,
    per_sample,
    play,
    registered,
    settle,
)
from mtlweight.testing._problem import Problem, Statistics, show

Oracle = Callable[[list[dict[str, Tensor]], list[torch.Generator]], list[Tensor]]
"""A slow, literal transcription of a paper: one mapping with the float64 tensors ``losses``, ``gramian``, ``jacobian``,
``rows`` and ``alignment`` a step, and one generator a step; returns the weights of each step."""


@registered()
def check_permutes(weighting: Weighting, *, tasks: Sequence[int] = TASKS) -> None:
    """Permuting the rows, each with its task's name and place, permutes the weights; permuting samples does too.

    Samples of random weightings are left out: they may be drawn by position.

    Args:
        weighting: the weighting on trial.
        tasks: numbers of tasks to try.

    Raises:
        ConformanceError: if it does not.
    """

    def holds(given: tuple[int, Steps]) -> None:
        turn, steps = given
        m = len(steps[0].tasks)
        order = [(i + turn) % m for i in range(m)][:: -1 if m > 2 and turn > 3 else 1]
        reverses = per_sample(weighting) and not weighting.traits.random
        columns = [list(range(p.losses.shape[1]))[::-1] if reverses else None for p in steps]
        moved = [problem.taking(order, samples) for problem, samples in zip(steps, columns, strict=True)]
        plain, found = play(fresh(weighting), steps), play(fresh(weighting), moved)
        for a, b, samples in zip(plain, found, columns, strict=True):
            expected = a.weights[order]
            if samples is not None and weighting.writes == "sample":
                expected = expected[:, samples]
            if not agree(weighting, b.problem, expected, b.weights):
                alike = "tasks" if samples is None else "tasks and samples"
                raise Fault(
                    f"weights {show(expected)} for the tasks in the order {order}"
                    + ("." if samples is None else ", and the samples in reverse."),
                    f"{show(b.weights)}; in the given order they are {show(a.weights)}.",
                    f"treat all {alike} alike: no index of one means anything. Look a task's state up by name, with "
                    "view.gather; what belongs to a task by position, and random numbers drawn for view.known, up at "
                    "view.places; and break ties by value.",
                )

    inputs = st.tuples(st.integers(1, 7), batches(weighting, tasks, kinds=tuple(arbitrary.KINDS)))
    for_all("permutes", weighting, inputs, holds)


@registered(lambda weighting: not per_sample(weighting))
def check_one_sample(weighting: Weighting, *, tasks: Sequence[int] = TASKS) -> None:
    """Losses ``[m, 1]`` and ``[m, b]`` weigh like their means ``[m]``, for a weighting that does not read samples.

    Args:
        weighting: the weighting on trial.
        tasks: numbers of tasks to try.

    Raises:
        ConformanceError: if they do not.
    """

    def holds(given: tuple[int, Steps]) -> None:
        count, steps = given
        spread = [_with_samples(problem, count) for problem in steps]
        for a, b in zip(play(fresh(weighting), steps), play(fresh(weighting), spread), strict=True):
            if not agree(weighting, a.problem, a.weights, b.weights):
                raise Fault(
                    f"weights {show(a.weights)} for losses [m, {count}] whose means are the losses [m].",
                    f"{show(b.weights)}.",
                    "read view.losses and view.alignment, which are [m] always; values per sample come from "
                    "view.sample_losses, with Needs.SAMPLES.",
                )

    for_all("one_sample", weighting, st.tuples(st.integers(1, 2), batches(weighting, tasks)), holds, share=0.6)


@registered()
def check_chain(weighting: Weighting, *, tasks: Sequence[int] = TASKS) -> None:
    """``>>`` is a monoid with it inside: ``Constant(1)`` is the identity on both sides, brackets do not matter, and
    after other weights it sees the problem that they make.

    Args:
        weighting: the weighting on trial.
        tasks: numbers of tasks to try.

    Raises:
        ConformanceError: if a law fails.
    """  # noqa: D205
    one = Constant(1.0)

    def weights(link: Weighting, steps: Steps) -> list[Tensor]:
        return [moment.weights for moment in play(fresh(link), steps)]

    def holds(steps: Steps) -> None:
        powers = {task: 2.0 ** (i % 3 - 1) for i, task in enumerate(steps[0].tasks)}
        factors = torch.tensor(list(powers.values()), dtype=torch.float64)
        first = Constant(powers)
        alone = weights(weighting, steps)
        after = weights(weighting, [problem.scaled(factors) for problem in steps])
        laws = [
            ("Constant(1) >> w, the same as w alone", weights(one >> weighting, steps), alone),
            ("w >> Constant(1), the same as w alone", weights(weighting >> one, steps), alone),
            (
                "(c >> w) >> c, the same as c >> (w >> c)",
                weights(chain(chain(first, weighting), first), steps),
                weights(chain(first, chain(weighting, first)), steps),
            ),
            (
                f"c >> w for c = {list(powers.values())}, c times those of w on losses and gradients times c",
                weights(first >> weighting, steps),
                [(factors if w.ndim == 1 else factors[:, None]) * w for w in after],
            ),
        ]
        for law, found, expected in laws:
            for problem, a, b in zip(steps, found, expected, strict=True):
                if a.shape != b.shape or not agree(weighting, problem, a, b):
                    raise Fault(
                        f"from {law}: {show(b)}.",
                        f"{show(a)}.",
                        "read the view's properties alone (they are of the problem as weighted so far), and do not "
                        "override >>.",
                    )

    for_all("chain", weighting, batches(weighting, tasks, steps=(1, 2)), holds, share=0.5)


@registered()
def check_combine(weighting: Weighting, *, tasks: Sequence[int] = TASKS) -> None:
    """What ``MultiTaskOptimizer.combine(...).backward()`` leaves in ``.grad`` is ``(w * J).sum(0)``.

    Args:
        weighting: the weighting on trial.
        tasks: numbers of tasks to try.

    Raises:
        ConformanceError: if it is anything else, or if the optimizer cannot use the weighting.
    """

    def holds(steps: Steps) -> None:
        theta = torch.zeros(steps[0].rows.shape[-1], dtype=torch.float64, requires_grad=True)
        inner = torch.optim.SGD([theta], lr=0.0)  # so that the losses after the step are those before
        moments = play(fresh(weighting), [_unmoved(problem) for problem in steps])
        evaluate(fresh(weighting), steps[0].view(), None)  # undeclared reading is another check's fault
        if not_tensors(moments[-1].state):
            return  # so is a state of anything else
        try:
            optimizer = MultiTaskOptimizer(inner, fresh(weighting), shared=[theta])
            with torch.random.fork_rng(devices=[]):
                found = [_backward(optimizer, theta, problem, step) for step, problem in enumerate(steps)]
        except Exception as error:
            raise Fault(
                "an optimizer step with this weighting.",
                f"{type(error).__name__}: {error}",
                "return ordinary tensors (none made in inference mode) that are finite, and declare `needs`, `writes` "
                "and `reference` as the optimizer has to know them.",
            ) from error
        learn = 0.0 if weighting.reference is None else weighting.reference.learn
        for gradient, moment in zip(found, moments, strict=True):
            problem = moment.problem
            expected = problem.step(moment.weights) + learn * problem.reference
            size = problem.size(moment.weights) + learn * float(torch.linalg.vector_norm(problem.reference))
            if torch.linalg.vector_norm(gradient - expected) > 1e-5 * size:
                raise Fault(
                    f"the gradient (w * J).sum(0) = {show(expected)}, with w = {show(moment.weights)}.",
                    f"{show(gradient)} after combine(...).backward().",
                    "give weights that depend on the view and the state alone.",
                )

    inputs = batches(weighting, tasks, steps=(1, 2), gradients=True)
    for_all("combine", weighting, inputs, holds, share=0.5, gradients=True)


def check_agrees_with_oracle(weighting: Weighting, oracle: Oracle, *, tasks: Sequence[int] = TASKS) -> None:
    """The weights of some steps in a row are those of a slow, literal transcription of the paper.

    Args:
        weighting: the weighting on trial.
        oracle: called with one mapping a step (``losses``, ``gramian``, ``jacobian``, ``alignment``, and the samples'
            gradients ``rows`` where there are samples, in float64) and one generator a step, seeded as
            ``view.generator`` is; returns the weights of each step. For a weighting that observes, the mapping has the
            losses after the step too, ``after``.
        tasks: numbers of tasks to try.

    Raises:
        ConformanceError: if any weight differs.
    """

    def holds(given: tuple[int, Steps]) -> None:
        seed, steps = given
        moments = play(fresh(weighting), steps, seed=seed)
        names = ("losses", "gramian", "jacobian", "rows", "alignment", *(["after"] if weighting.observes else []))
        measured = [{name: getattr(problem, name) for name in names} for problem in steps]
        generators = [View(Statistics(p), step=i, seed=seed).generator for i, p in enumerate(steps)]
        for moment, weights in zip(moments, oracle(measured, generators), strict=True):
            expected = torch.as_tensor(weights, dtype=torch.float64)
            if expected.shape != moment.weights.shape or not agree(weighting, moment.problem, expected, moment.weights):
                raise Fault(
                    f"weights {show(expected)}, by the oracle.",
                    f"{show(moment.weights)}.",
                    "find out which of the two the paper means.",
                )

    inputs = batches(weighting, tasks, kinds=("generic", "conflicting", "orthogonal", "m > n"), steps=(1, 4))
    for_all("agrees_with_oracle", weighting, st.tuples(st.integers(0, 3), inputs), holds)


def _with_samples(problem: Problem, count: int) -> Problem:
    """The same problem with losses per sample: equal gradients, losses around the mean."""
    signs = torch.tensor([0.0] if count == 1 else [1.0, -1.0], dtype=torch.float64)
    losses = problem.losses[:, None] * (1 + signs / 2)
    return replace(problem, losses=losses, rows=problem.rows[:, None].expand(-1, count, -1))


def _unmoved(problem: Problem) -> Problem:
    losses = problem.losses
    return replace(problem, after=losses if losses.ndim == 1 else losses.mean(dim=1))


def _backward(optimizer: MultiTaskOptimizer, theta: Tensor, problem: Problem, step: int) -> Tensor:
    """One step on losses that are linear in the parameters, so that their gradients are the problem's."""
    optimizer.zero_grad()
    settle(step)
    wants_reference = Needs.ALIGNMENT in optimizer.weighting.needs or optimizer.weighting.reference is not None
    reference = (lambda: problem.reference @ theta) if wants_reference else None

    def losses() -> dict[str, Tensor]:
        each = problem.losses + problem.rows @ theta
        return dict(zip(problem.tasks, each.unbind(), strict=True))

    optimizer.combine(losses, reference=reference).backward()
    gradient = torch.zeros_like(theta) if theta.grad is None else theta.grad.clone()
    optimizer.step()
    return gradient.detach()
