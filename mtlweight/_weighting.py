"""What a weighting is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight._statistics import Given, cast
from mtlweight._view import Needs, State, View

Level = Literal["task", "sample", "entry"]
"""What a weighting writes: a weight per task ``[m]``, per sample ``[m, b]``, or per gradient entry ``[m, n]``."""


LossDomain = Literal["real", "nonnegative", "positive"]
"""Losses that a weighting is defined for."""


@dataclass(frozen=True)
class Traits:
    """What a weighting claims about its weights. Claims are tested in both directions.

    Args:
        nonnegative: no weight is below zero.
        total: the sum of the weights, unless all are zero, while no task has been absent: a number, or ``"m"`` for the
            number of tasks; ``None`` if it varies.
        nonconflicting: ``G w >= 0``: to first order the step raises no task's loss.
        stationary: where the step ``Jᵀ w`` is sure to vanish: ``"weak"``, wherever some convex combination of the
            gradients does; ``"strong"``, where one with positive coefficients alone does; ``None``, nowhere.
        scale_degree: multiplying all losses (and so all gradients) by ``c > 0`` multiplies the weights by
            ``c ** scale_degree``: 0 is invariance, -1 makes the step invariant; ``None`` is neither.
        random: reads ``view.generator``.
        losses: the losses it is defined for: ``"real"``, ``"nonnegative"`` or ``"positive"``. It raises for others.
        samples: the least number of samples a task, where it reads or writes per sample. It raises for fewer.
    """

    nonnegative: bool = False
    total: float | Literal["m"] | None = None
    nonconflicting: bool = False
    stationary: Literal["weak", "strong"] | None = None
    scale_degree: int | None = None
    random: bool = False
    losses: LossDomain = "real"
    samples: int = 1


@dataclass(frozen=True)
class ReferenceUse:
    """How a weighting uses the reference objective.

    Args:
        main: the task that the reference belongs to, or several; empty if it belongs to none.
        scope: parameters over which gradients are compared: ``"shared"``; ``"main"``, the shared ones and the main
            tasks' heads; ``"all"``, every parameter of the wrapped optimizer.
        learn: how much of the reference's own gradient joins the step.
        ema: share of the previous steps' average in the reference's gradient; 0 is no averaging.
        unit: whether the reference's gradient is divided by its norm.
        lookahead: what is measured one step of the wrapped optimizer ahead, with the weights that
            :meth:`Weighting.ahead` gives: ``None``, nothing; ``"reference"``, its gradient; ``"both"``, the losses'
            too. The step is undone then; with ``"stay"`` both are measured there, and it is not.
    """

    main: tuple[str, ...] = ()
    scope: Literal["shared", "main", "all"] = "shared"
    learn: float = 0.0
    ema: float = 0.0
    unit: bool = False
    lookahead: Literal["reference", "both", "stay"] | None = None

    @classmethod
    def of(cls, name: str, main: str | Iterable[str], **options: Any) -> ReferenceUse:
        """From a weighting's arguments.

        Args:
            name: the weighting, for messages.
            main: one task or several.
            options: the other attributes.

        Raises:
            MTLWeightError: if ``main`` is no name, or there is no such scope.
        """
        several = isinstance(main, Iterable) and not isinstance(main, str)
        use = cls(tuple(main) if several else (main,), **options)  # type: ignore[arg-type]  # checked next
        if not all(isinstance(task, str) and task for task in use.main):
            raise MTLWeightError(f"{name}: expected the main task's name, or several, found {main!r}.")
        if use.scope not in ("shared", "main", "all"):
            raise MTLWeightError(f"{name}: expected scope 'shared', 'main' or 'all', found {use.scope!r}.")
        return use


class Weighting(ABC):
    """Decides how much each task, sample or gradient entry counts in the step.

    A weighting is an immutable value: subclass as a frozen dataclass of hyperparameters. What changes from step to
    step lives in an explicit state, which the optimizer owns, saves and rolls back. A subclass declares :attr:`needs`
    and implements :meth:`weigh`:

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class InverseNorm(Weighting):
    ...     needs = Needs.GRAMIAN
    ...
    ...     def weigh(self, view, state):
    ...         return 1 / view.gramian.diagonal().sqrt(), state
    >>> InverseNorm()(gramian=torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
    tensor([0.5000, 1.0000])

    The properties below are overridden by plain class attributes, as ``needs`` is above.
    """

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What it reads from the view."""

    @property
    def writes(self) -> Level:
        """The shape of its weights: ``"task"`` ``[m]``, ``"sample"`` ``[m, b]`` or ``"entry"`` ``[m, n]``."""
        return "task"

    @property
    def traits(self) -> Traits:
        """What it claims about its weights."""
        return Traits()

    @property
    def reference(self) -> ReferenceUse | None:
        """How it uses the reference objective; ``None`` if it does not read the alignment."""
        return None

    @property
    def layout(self) -> tuple[str, ...]:
        """The arguments that the layout of its state depends on: a checkpoint loads where they are the same."""
        return ()

    @property
    def observes(self) -> bool:
        """Whether :meth:`observe` is to be called after the step."""
        return False

    def observes_at(self, step: int) -> bool:
        """Whether :meth:`observe` is to be called after this step: never unless :attr:`observes` is true."""
        del step
        return self.observes

    def needs_at(self, step: int) -> Needs:
        """What it reads at this step: at most :attr:`needs`. Engines compute no more."""
        del step
        return self.needs

    def init(self, view: View) -> State:
        """The state before the first step. Tasks may come later: keep per-task values in ``view.scatter`` tables."""
        del view
        return {}

    @abstractmethod
    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """The weights for this batch, and the state after it. Changes neither the view nor the given state."""

    def ahead(self, view: View, state: State) -> Tensor:
        """The weights of the look-ahead step: of the tasks, or of the samples if it writes those. Default: 1 a task.

        Called only if ``reference.lookahead`` is set, with a view of the batch's losses.
        """
        return view.shares if self.writes == "sample" else torch.ones_like(view.losses)

    def observe(self, view: View, state: State) -> State:
        """The state after the step, from a view of the same batch's losses at the new parameters.

        Called only if ``observes_at(view.step)`` is true; the losses must then be given as a callable.
        """
        del view
        return state

    def __rshift__(self, then: Weighting) -> Weighting:
        """``self >> then``: ``then`` sees the problem weighted by ``self``; the weights multiply."""
        from mtlweight.compose import chain  # `>>` is notation for it; combinators stand above the core

        return chain(self, then)

    def __call__(
        self,
        *,
        losses: Tensor | None = None,
        gramian: Tensor | None = None,
        jacobian: Tensor | None = None,
        alignment: Tensor | None = None,
    ) -> Tensor:
        """Weights from given statistics and a fresh state: for tests, notebooks and people without the optimizer.

        Random ones follow torch's seed, and draw none of its numbers.

        Args:
            losses: ``[m]`` or ``[m, b]``.
            gramian: ``[m, m]``; computed from ``jacobian`` if left out.
            jacobian: ``[m, n]``; or ``[m, b, n]``, the samples' gradients.
            alignment: ``[m]`` or ``[m, b]``.

        Returns:
            Tensor: the weights, on the device of the first argument given and in its dtype, if that holds fractions.

        Raises:
            MTLWeightError: if what the weighting reads is missing or has a wrong shape.
        """
        given = Given(losses=losses, gramian=gramian, jacobian=jacobian, alignment=alignment)
        weights, _ = evaluate(self, View(given, needs=self.needs), None)
        return cast(weights, given.dtype)


def evaluate(weighting: Weighting, view: View, state: State | None) -> tuple[Tensor, State]:
    """Runs one weighting on a view restricted to what it declares, and checks what it wrote.

    Args:
        weighting: the weighting.
        view: the batch.
        state: its state; ``None`` to start from :meth:`Weighting.init`.

    Returns:
        tuple[Tensor, State]: detached weights on the view's device, 0 for samples without a label, and the state after
            the batch.

    Raises:
        MTLWeightError: if the weights do not have the shape that ``weighting.writes`` says.
    """
    mine = view.restricted(weighting.needs)
    with torch.no_grad():
        written = weighting.weigh(mine, weighting.init(mine) if state is None else state)
    if not isinstance(written, tuple) or len(written) != 2:
        raise MTLWeightError(
            f"{type(weighting).__name__}.weigh: expected the weights and the next state, found "
            f"{type(written).__name__}. End it with `return weights, state`."
        )
    weights, state = written
    m, writes = len(view.tasks), weighting.writes
    if writes not in _SHAPES:
        raise MTLWeightError(
            f"{type(weighting).__name__}.writes: expected one of {', '.join(_SHAPES)}; found {writes!r}. Choose one."
        )
    shape = weights.shape if isinstance(weights, Tensor) else None
    if shape is None or len(shape) != (1 if writes == "task" else 2) or shape[0] != m:
        expected = f"shape {_SHAPES[writes].format(m)}"
        if shape is None:
            raise wrong_shape(weighting, f"a tensor of {expected}", type(weights).__name__)
        raise wrong_shape(weighting, expected, list(shape))
    if writes == "sample":
        labelled = view.shares > 0
        if labelled.shape != shape:
            raise wrong_shape(weighting, f"shape {list(labelled.shape)}", list(shape))
        weights = weights * labelled
    return weights.detach(), state


_SHAPES = {"task": "[{}]", "sample": "[{}, b]", "entry": "[{}, n]"}


def wrong_shape(weighting: Weighting, expected: str, found: object) -> MTLWeightError:
    """The error for weights that cannot be what ``weighting.writes`` says."""
    return MTLWeightError(
        f"{type(weighting).__name__} writes weights per {weighting.writes}: expected {expected}, found {found}. Return "
        "that shape, or set `writes` to what it returns."
    )
