"""The optimizer: wraps another one, asks a weighting how much everything counts, and owns the weighting's state."""

from __future__ import annotations

import contextlib
import functools
import inspect
import traceback
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mtlweight._checkpoint import KEY, expect_loadable, restore, saved
from mtlweight._checks import expect_choice, expect_kind
from mtlweight._errors import MTLWeightError, NonFiniteError
from mtlweight._report import Report
from mtlweight._statistics import Given, all_finite, tensors_of
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Level, Weighting, evaluate
from mtlweight.engines import (
    ENGINES,
    Accumulation,
    Agreed,
    Batch,
    Capture,
    Hidden,
    Parts,
    Plan,
    Processes,
    bad_gradient,
    behind_masks,
    deferred,
    expect_own_parts,
    full_precision,
    local,
    look_again,
    parameters,
    parts,
    read,
    snapshot,
)
from mtlweight.loss.constant import Constant

P = ParamSpec("P")
T = TypeVar("T")
# From the losses with their graph, the view for notes, and `environments`, to a scalar that is added to the step.
Penalty = Callable[[Mapping[str, Tensor], View, Any], Tensor]


@dataclass
class _Use:
    """What has become of one scalar. Its hook holds this and nothing else of the step."""

    remembers: bool = False  # whether the weighting has a state that would be lost
    backward: bool = False  # whether one has gone through it
    behind: bool = False  # whether the wrapped optimizer was stepped then, though not by this one
    done: bool = False  # whether it was committed, or the next one goes on from it


@dataclass
class _Pending:
    """What ``step`` will commit."""

    state: State | None
    report: Report | None
    tasks: tuple[str, ...]
    memory: State
    seed: int | None
    uses: Counter[str]
    dropped: tuple[str, ...] = ()
    skip: bool = False
    hidden: Hidden = field(default_factory=list)
    observe: Callable[[], Given] | None = None
    use: _Use = field(default_factory=_Use)


@dataclass
class _Decision:
    """The weights of one call of ``combine``, and the losses that they are for."""

    weights: Tensor
    writes: Level
    tasks: tuple[str, ...]
    shape: torch.Size
    dropped: tuple[str, ...]
    start: _Pending


@dataclass
class _Closure:
    """One ``step(closure)``. What its first evaluation decides holds for all of them: a line search compares values.

    Args:
        decided: in the first evaluation, by each call of ``combine``.
        calls: how many there were in this evaluation.
    """

    decided: list[_Decision] = field(default_factory=list)
    calls: int = 0


@dataclass
class _Record:
    """All that a MultiTaskOptimizer knows. One mutable record, so that the optimizer has one attribute of its own."""

    optimizer: Optimizer
    weighting: Weighting
    shared: list[nn.Module | Tensor] | None
    model: nn.Module | None
    engine: str
    heads: str
    on_nonfinite: str
    seed: int | None
    penalty: Penalty | None = None
    outer: list[nn.Module | Tensor] = field(default_factory=list)
    processes: Processes | None = None
    averaged: bool = False
    step: int = 0
    state: State | None = None
    tasks: tuple[str, ...] = ()
    memory: State = field(default_factory=dict)
    pending: _Pending | None = None
    closure: _Closure | None = None
    stepping: bool = False
    searches: bool = False
    accumulation: Accumulation = field(default_factory=Accumulation)
    report: Report = field(default_factory=Report)
    skipped: int = 0
    uncommitted: int = 0
    warned: set[str] = field(default_factory=set)
    cleared: bool = False
    dropped: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    broken: dict[str, str] = field(default_factory=dict)
    uses: Counter[str] = field(default_factory=Counter)
    capture: Capture | None = None


def _uncompiled(method: Callable[P, T]) -> Callable[P, T]:
    """The method as a break in the graph of a compiled function: compiled code cannot ask autograd for gradients."""

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            outside: Callable[P, T] = torch.compiler.disable(run)
            return outside(*args, **kwargs)
        return method(*args, **kwargs)

    return run


class MultiTaskOptimizer(Optimizer):
    """Any ``torch.optim.Optimizer`` with a weighting in front of it.

    Use it as the optimizer that it wraps; between the losses and ``backward`` stands one call, :meth:`combine`:

    >>> import torch, mtlweight
    >>> model = torch.nn.Linear(3, 2)
    >>> optimizer = mtlweight.MultiTaskOptimizer(
    ...     torch.optim.SGD(model.parameters(), lr=0.1), mtlweight.MGDA(), shared=model
    ... )
    >>> y = model(torch.ones(4, 3))
    >>> optimizer.zero_grad()
    >>> optimizer.combine({"a": y[:, 0].square().mean(), "b": (y[:, 1] - 1).square().mean()}).backward()
    >>> optimizer.step()
    >>> optimizer.report.step
    1

    Args:
        optimizer: the optimizer to wrap. Its ``param_groups``, ``state`` and ``defaults`` stay its own.
        weighting: decides how much each task, sample or gradient entry counts.
        shared: the parameters that tasks share: a module, parameters, or several of either. Needed by weightings that
            read gradients. All other parameters that the losses reach are heads.
        model: the whole model; lets the forward engine see parameters outside ``shared``, and restores its buffers
            after a weighting has looked at the losses once more.
        engine: how statistics are measured: ``"auto"``, ``"rows"``, ``"batched"``, ``"features"``, ``"forward"``,
            ``"pullback"`` or ``"samples"``; see docs/engines.md.
        heads: ``"weighted"``, the default: heads get the gradient of the weighted losses, as if the weights were
            constants in the loss; ``"unweighted"``: they get the gradient of the plain sum. Weights per gradient entry
            belong to shared parameters alone; heads are unweighted then.
        on_nonfinite: what to do if a loss or a gradient is not finite: ``"raise"``; ``"skip"`` the step; or ``"drop"``
            the task from this batch, and skip the step where no single task is to blame: a bad gradient has a task's
            name only if the weighting reads gradients. Skipped and dropped are counted in :attr:`report`. At a later
            evaluation in ``step(closure)`` parameters have moved: that raises, whatever was chosen.
        seed: seed of random weightings, together with the step. Default ``None``: torch's, ``torch.initial_seed()`` at
            the first :meth:`combine`; of several processes the first one's.
        penalty: an objective beside the losses that no weighting weighs: a function of the losses (with their graph),
            the view and ``environments``, that returns a scalar with a graph; such as
            ``mtlweight.causal.Invariance().on(selector)``.
        outer: parameters of an outer problem (bilevel optimization, first order), like ``shared``: they get the
            gradient of the reference, and of the penalty, instead of the losses'; such as a ``ModuleSelector``'s graph.
        process_group: the processes whose batches count as one: a ``torch.distributed.ProcessGroup``, or
            ``"default"``, all of them where ``torch.distributed`` is initialized. The model must be in
            ``DistributedDataParallel`` or ``fully_shard``, which average the gradients. ``None``: each process weighs
            its own batch. See docs/optimizer.md.

    Raises:
        MTLWeightError: for arguments of another kind.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        weighting: Weighting,
        *,
        shared: Parts | None = None,
        model: nn.Module | None = None,
        engine: str = "auto",
        heads: Literal["weighted", "unweighted"] = "weighted",
        on_nonfinite: Literal["raise", "skip", "drop"] = "raise",
        seed: int | None = None,
        penalty: Penalty | None = None,
        outer: Parts | None = None,
        process_group: Any = "default",
    ) -> None:
        # Optimizer.__init__ is not called: through the properties below it would wipe the wrapped optimizer's state.
        expect_kind("optimizer", optimizer, Optimizer, "a torch.optim.Optimizer")
        if isinstance(optimizer, MultiTaskOptimizer):
            raise MTLWeightError(
                "MultiTaskOptimizer: expected a bare optimizer, found one that is wrapped already, whose weighting "
                "would never be asked. Wrap its .optimizer; for both weightings, chain them: "
                f"{optimizer.weighting!r} >> {weighting!r}."
            )
        expect_kind("weighting", weighting, Weighting, "a weighting such as UW()")
        expect_kind("model", model, (nn.Module, type(None)), "a torch.nn.Module")
        expect_kind("seed", None if type(seed) is int else seed, type(None), "an int, or None for torch's seed")
        expect_choice("engine", engine, ENGINES)
        expect_choice("heads", heads, ("weighted", "unweighted"))
        expect_choice("on_nonfinite", on_nonfinite, ("raise", "skip", "drop"))
        expect_kind("penalty", penalty, (Callable, type(None)), "bound to a selector, such as Balance().on(selector)")
        if shared is None and heads == "unweighted":
            raise MTLWeightError(
                "heads='unweighted' tells heads from shared parameters: expected shared=..., found None. Pass the "
                "shared parameters to MultiTaskOptimizer."
            )
        common = None if shared is None else parts("shared", shared)
        self._record = _Record(optimizer, weighting, common, model, engine, heads, on_nonfinite, seed, penalty)
        self._record.outer = [] if outer is None else parts("outer", outer)
        self._record.processes = Processes.of(process_group)
        self._watch()

    # The wrapped optimizer's own, by reference at each access: `load_state_dict` and schedulers rebind them.

    @property
    def optimizer(self) -> Optimizer:
        """The wrapped optimizer."""
        return self._record.optimizer

    @property
    def weighting(self) -> Weighting:
        """The weighting."""
        return self._record.weighting

    @property
    def report(self) -> Report:
        """What the last committed step did; see :class:`~mtlweight._report.Report`."""
        r = self._record
        dropped, fallbacks = dict(r.dropped), dict(r.fallbacks)
        return replace(r.report, skipped=r.skipped, dropped=dropped, fallbacks=fallbacks, uncommitted=r.uncommitted)

    @_uncompiled
    def combine(
        self,
        losses: Any,
        *,
        reference: Any = None,
        mask: Any = None,
        environments: Any = None,
        retain_graph: bool = False,
    ) -> Tensor:
        """Weighs the losses: a scalar whose ordinary ``backward()`` puts the weighted gradient into ``.grad``.

        Reads the committed state and leaves a pending one, which :meth:`step` commits: calling it again, or skipping
        the step, changes nothing. Losses are weighed as they are: scale the returned scalar, not the losses.

        Args:
            losses: mapping from task name to a scalar or ``[b]`` tensor (``None`` or no key: the task is absent); or a
                tensor ``[m]`` or ``[m, b]``; or a callable that returns one of these, which lets the forward engine
                run. It may be called more than once in a step, so draw the batch outside. A ``[b]`` loss counts by its
                mean, unless the weighting writes weights per sample. A list of callables, one for each part of a batch
                too large for memory: the weights are those of the whole batch.
            reference: the reference objective, such as the main task's loss on held-out data: a scalar or ``[b]``
                tensor; several in a list, which count by their mean; one for each main task in a mapping, which count
                by their sum; or a callable that returns one of these. Needed by weightings that read the alignment,
                and by ``outer``; where there is neither, it is not evaluated.
            mask: which samples have a label: mapping from task name to a ``[b]`` tensor of booleans (no key: all have),
                or one ``[m, b]`` beside losses in a tensor. A sample without one is no part of its task: its weight is
                0, and means are over the others. Its gradient must still be finite: give it any label. A list of masks
                beside losses in parts.
            environments: handed to the penalty: which environment each sample belongs to.
            retain_graph: whether the scalar's backward goes through the losses' own graph, with the weights as
                constants, and that graph is kept until then: for terms that you add to the scalar, second derivatives,
                and whatever else reads the graph. It costs one more backward where gradients were measured.

        Returns:
            Tensor: scalar; its value is the plain sum of the losses, for logging. Inside ``step(closure)`` it is the
            weighted objective, which line searches compare; see :meth:`step`.

        Raises:
            MTLWeightError: if losses or reference have not the expected form, or a main task of the weighting was never
                there; one that has only the reference gives it by name, in a mapping.
            NonFiniteError: under the policy ``on_nonfinite``.
        """
        r = self._record
        for given in (losses, reference):
            expect_own_parts(given)
        if retain_graph:
            self._expect_one_graph(losses)
        with full_precision() as as_outside:
            weigh = functools.partial(self._combine, environments, as_outside(r.penalty), retain_graph)
            return r.accumulation.take(weigh, self.param_groups, as_outside(losses), as_outside(reference), mask)

    def accumulate(
        self,
        k: int,
        *,
        last: bool | None = None,
        weigh: Literal["together", "each"] = "together",
        divisor: int | None = None,
    ) -> contextlib.AbstractContextManager[None]:
        """Within the context, ``k`` calls of :meth:`combine` are the micro-batches of one step.

        For loops that call ``combine`` and ``backward`` for each micro-batch, divide each scalar by ``k`` as gradient
        accumulation does, and call :meth:`step` after the last: the plain loop, ``accelerator.accumulate(model)``,
        Lightning's ``accumulate_grad_batches=k``. The step is that of the whole batch. Enter it around the loop, or
        around each call.

        Args:
            k: the number of micro-batches in a step, and what the loop divides each scalar by.
            last: whether the next micro-batch is the last of its step, for loops that know; such as
                ``accelerator.sync_gradients``. Left out, it is the ``k``-th; then ``step`` raises if it comes earlier.
            weigh: ``"together"``: the first calls remember their losses, which must be callables that hold their data,
                and return a scalar of value 0 whose backward leaves all gradients alone; the last one weighs them all
                as one batch in parts, and returns ``divisor`` times its scalar. Their references count by their mean.
                ``"each"``: each is weighed by itself, one after the other, from the state that the one before it left;
                that costs least. The report is of the last one, and has the one before it in ``earlier``.
            divisor: what the loop divides each scalar by, if not by ``k``: 1 for loops that do not divide, or the
                number of micro-batches in this group, if that is what the loop takes where a group is short.

        Raises:
            MTLWeightError: for arguments of another kind; and at the last micro-batch, if the loop was seen to divide
                by another number (which a loss scale hides).
        """
        return self._record.accumulation.within(k, last, weigh, divisor)

    def _combine(
        self, environments: Any, penalty: Penalty | None, ordinary: bool, losses: Any, reference: Any, mask: Any
    ) -> Tensor:
        r = self._record
        if r.closure is not None:
            self._expect_objective(r.closure)
            r.closure.calls += 1
            if r.closure.calls <= len(r.closure.decided):
                decided = r.closure.decided[r.closure.calls - 1]
                return self._evaluate_again(decided, environments, penalty, losses, reference, mask)
        start = r.pending if r.accumulation.continues else None
        if start is not None:
            start.use.done = True
        elif r.closure is None:
            self._notice_uncommitted()
        start = start or _Pending(r.state, None, r.tasks, r.memory, r.seed, r.uses)
        r.pending = None
        if environments is not None and r.penalty is None:
            raise MTLWeightError(
                "Environments are for a penalty: expected MultiTaskOptimizer(..., penalty=...), found none. Pass one "
                "that reads environments, such as Invariance().on(selector), or leave environments out."
            )
        plan = self._plan(start, mask, ordinary=ordinary)
        rewind = snapshot(plan.modules) if r.weighting.observes_at(r.step) else None
        if rewind is not None and not deferred(losses):
            raise MTLWeightError(
                f"{plan.name} looks at the losses again after the step: expected losses as a callable, found computed "
                "ones. Pass combine(lambda: losses(model, batch))."
            )
        dropped: tuple[str, ...] = ()
        batch: Batch | None = None
        try:
            batch = read(losses, reference, plan)
            while True:
                if not batch.tasks:
                    return self._skip(start, dropped, batch)
                view = plan.view(batch)
                try:
                    batch.losses()
                    weights, state = evaluate(r.weighting, view, start.state)
                    self._expect_finite(weights, state)
                    break
                except NonFiniteError as error:
                    if r.on_nonfinite != "drop" or not error.tasks:
                        raise
                    dropped += error.tasks
                    batch = batch.without(error.tasks)
                    self._warn_of_masks(plan.hidden)
            added = None if penalty is None else batch.penalty(penalty, view, environments)
        except NonFiniteError:
            if r.on_nonfinite == "raise":
                raise
            self._warn_of_masks(plan.hidden)
            return self._skip(start, dropped, batch)
        writes = r.weighting.writes
        stalled = batch.stalled(view, weights)
        if stalled:
            self._warn(
                "stalled",
                f"the gradient of task {', '.join(stalled)} over the shared parameters is exactly 0, and {plan.name} "
                "gives no other task any weight: no shared parameter moves in this step. If a loss is multiplied by "
                "0, pass None for it: the task is absent then.",
            )
        scalar, objective = batch.combined(weights, writes, added), batch.objective(weights, writes)
        measured = batch.measured()
        report = Report(
            r.step + 1, earlier=start.report, weights=weights, objective=objective, notes=view.notes, **measured
        )
        tasks, seed, gone = tuple(plan.agreed.tasks), plan.agreed.seed, start.dropped + dropped
        r.pending = _Pending(state, report, tasks, plan.memory, seed, plan.uses, gone, start.skip, plan.hidden)
        if rewind is not None:
            present, first = batch.tasks, [weakref.ref(loss) for loss in batch.graphs.values()]
            r.pending.observe = lambda: look_again(losses, plan, rewind, present, first)
        self._watch_use(r.pending, scalar)
        if r.closure is None:
            return scalar
        r.closure.decided.append(_Decision(weights, writes, batch.tasks, batch.losses().shape, dropped, start))
        return scalar if self._no_objective() else _valued(scalar, objective, batch, added)

    def _evaluate_again(
        self, decided: _Decision, environments: Any, penalty: Penalty | None, losses: Any, reference: Any, mask: Any
    ) -> Tensor:
        """The objective at another point of the same step, with the weights that its first evaluation decided."""
        plan = self._plan(decided.start, mask, ordinary=True, needs=Needs.NOTHING)
        batch = read(losses, reference, plan)
        batch = batch.without([task for task in batch.tasks if task in decided.dropped])
        tasks, shape = batch.tasks, batch.losses().shape
        if {*tasks} != {*decided.tasks} or shape != decided.shape:
            raise MTLWeightError(
                "Weights are decided once in step(closure) and hold for all evaluations of the closure: expected the "
                f"losses of the first one ({', '.join(decided.tasks)}, of shape {list(decided.shape)}), found others "
                f"({', '.join(tasks)}, of shape {list(shape)}), after parameters had moved. Draw the batch outside of "
                "the closure."
            )
        weights = decided.weights[[decided.tasks.index(task) for task in tasks]]
        added = None if penalty is None else batch.penalty(penalty, plan.view(batch), environments)
        objective = batch.objective(weights, decided.writes)
        return _valued(batch.combined(weights, decided.writes, added), objective, batch, added)

    def frozen(self) -> Constant:
        """The tasks' weights in the last committed step, as constants.

        For an optimizer that is to go on with what this one has found, such as L-BFGS after Adam. The mapping has the
        tasks of that step alone. Average over steps with ``ema(...)``, if single ones are noisy.

        Raises:
            MTLWeightError: if no step was committed since the optimizer was made or loaded; if the weights are those of
                samples or gradient entries, which belong to their batch; or if one is negative, since the weighted sum
                then has no minimum.
        """
        report = self._record.report
        if report.weights is None or report.writes != "task":
            found = "none since the start or the load" if report.weights is None else f"weights per {report.writes}"
            raise MTLWeightError(
                f"frozen() keeps one weight a task: expected a committed step with weights per task, found {found}. "
                "Take a step first (checkpoints have no report), or use a weighting per task."
            )
        negative = {task: weight for task, weight in report.task_weights.items() if weight < 0}
        if negative:
            raise MTLWeightError(
                f"frozen() makes one objective of the losses: expected weights >= 0, found {negative}. A sum with "
                "negative weights has no minimum. Take a weighting whose weights are not negative, or chain "
                "clip(..., low=0) around it."
            )
        return Constant(report.task_weights)

    @_uncompiled
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the wrapped optimizer, then the commit of what :meth:`combine` left pending.

        A step without a :meth:`combine` before it is the wrapped optimizer's own, and is not counted.

        Within one ``step(closure)`` the first evaluation decides the weights, and they hold for all others, which cost
        one forward and one backward each. The scalar's value is the weighted objective, whose gradient it has, so that
        line searches and trust regions are right.

        Args:
            closure: computes gradients and returns the loss, for optimizers that evaluate it themselves.

        Raises:
            NonFiniteError: if a gradient is not finite and ``on_nonfinite="raise"``. Nothing has changed then.
            MTLWeightError: if the optimizer evaluates the closure again, and the weights have no objective: weights per
                gradient entry, ``heads="unweighted"``, ``outer``. Under L-BFGS nothing has changed then; other
                optimizers are known to do so only once they have moved.
        """
        r = self._record
        evaluations, rewind = 0, r.accumulation.mark()

        def checked() -> Any:
            nonlocal evaluations
            if r.closure is not None:
                r.closure.calls = 0
            if evaluations:
                r.searches = True
                rewind()
            try:
                loss = closure() if closure is not None else None
                r.accumulation.expect_complete()
                if r.pending is not None and (r.pending.skip or not self._gradients_are_finite()):
                    raise _SkipStepError
            except (NonFiniteError, _SkipStepError) as error:
                if evaluations:  # the wrapped optimizer has moved the parameters already
                    raise NonFiniteError(
                        "Expected finite numbers throughout the step of an optimizer that evaluates its closure more "
                        "than once, found NaN or infinity after it had moved. Lower the learning rate, or use a line "
                        "search."
                    ) from error
                raise
            evaluations += 1
            return loss

        r.stepping = True
        try:
            if closure is None:
                checked()
                result = r.optimizer.step()
            else:
                r.closure = _Closure()
                result = r.optimizer.step(checked)
        except _SkipStepError:
            self._warn_of_masks(r.pending.hidden if r.pending is not None else [])
            self._commit(skipped=True)
            return None
        finally:
            r.closure, r.stepping = None, False
        try:
            self._commit()
        finally:
            if r.capture is not None:
                r.capture.clear()
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the wrapped optimizer's gradients. Leaves what is pending: closures call this between."""
        self._record.cleared = True
        self._record.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the wrapped optimizer."""
        self._record.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state dict, with this library's state under one more key.

        A bare optimizer of the wrapped class loads it too. It loads with ``torch.load(weights_only=True)``.
        """
        r = self._record
        return {**r.optimizer.state_dict(), KEY: saved(r)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads a state dict of this class, or one of a bare optimizer of the wrapped class (with a warning).

        Raises:
            MTLWeightError: if it was saved with another weighting, or with arguments of it that make its state another
                one (:attr:`Weighting.layout`), or by a version with another format. Nothing has changed then.
        """
        r = self._record
        own = state_dict.get(KEY)
        if own is not None:
            expect_loadable(own, r.weighting)
        r.optimizer.load_state_dict({key: value for key, value in state_dict.items() if key != KEY})
        if own is None:
            warnings.warn(f"The state dict has no key {KEY!r}: the weighting starts afresh.", stacklevel=2)
            own = {"step": 0, "tasks": [], "skipped": 0, "dropped": {}, "state": None, "memory": {}}
        restore(r, own)
        r.pending, r.report = None, Report(step=r.step)
        r.accumulation.restart()

    def __getstate__(self) -> dict[str, Any]:
        return {"record": replace(self._record, pending=None, capture=None, accumulation=Accumulation())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._record = state["record"]
        self._watch()

    def __getattr__(self, name: str) -> Any:
        """The wrapped optimizer's own public attributes, such as ``first_step`` or ``train``; no private ones.

        Gradient scalers and others ask for private names, and what the wrapped optimizer would answer is not true of
        this one.
        """
        if not name.startswith("_") and hasattr(self._record.optimizer, name):
            return getattr(self._record.optimizer, name)
        raise AttributeError(
            f"{type(self).__name__!r} object has no attribute {name!r}, and neither has the wrapped "
            f"{type(self.optimizer).__name__}, as a public one"
            if "_record" in vars(self)
            else name
        )

    def __repr__(self) -> str:
        return f"MultiTaskOptimizer({self._record.weighting!r}, {self._record.optimizer!r})"

    def _plan(self, start: _Pending, mask: Any = None, *, ordinary: bool = False, needs: Needs | None = None) -> Plan:
        r = self._record
        outer = parameters(r.outer)
        processes = None if r.processes is None else r.processes.active
        agreed = Agreed.of(start.tasks, start.seed, processes)
        return Plan(
            weighting=r.weighting,
            use=r.weighting.reference,
            needs=r.weighting.needs_at(r.step) if needs is None else needs,
            engine=r.engine,
            heads=r.heads,
            list_shared=lambda: None if r.shared is None else parameters(r.shared, without=outer),
            outer=outer,
            penalised=r.penalty is not None,
            ordinary=ordinary,
            optimizer=r.optimizer,
            modules=self._modules(),
            capture=r.capture,
            agreed=agreed,
            mask=mask,
            hidden=[*start.hidden],
            memory={**start.memory},
            state=start.state,
            view=lambda batch: View(batch, step=r.step, seed=agreed.seed),
            processes=processes,
            stamp={"step": r.step, "seed": r.seed, "tasks": r.tasks},
            broken=r.broken,
            uses=Counter(start.uses),
            warn=self._fall_back,
        )

    def _modules(self) -> list[nn.Module]:
        r = self._record
        return [r.model] if r.model is not None else [part for part in r.shared or [] if isinstance(part, nn.Module)]

    def _watch(self) -> None:
        r = self._record
        known = weakref.ref(r)  # the hook is the wrapped optimizer's, which may outlive this one

        def stepped(*_: Any) -> None:
            record = known()
            if record is not None and record.pending is not None and not record.stepping:
                record.pending.use.behind = True

        if hasattr(r.optimizer, "_optimizer_step_post_hooks"):
            r.optimizer.register_step_post_hook(stepped)
        if r.engine != "features":
            return
        modules = [part for part in r.shared or [] if isinstance(part, nn.Module)]
        if not modules or len(modules) < len(r.shared or []):
            raise MTLWeightError(
                "engine='features' reads the shared modules' outputs: expected shared=... as a module or several, "
                f"found {'nothing' if r.shared is None else 'parameters'}. Pass the encoder."
            )
        r.capture = Capture(modules)

    def _no_objective(self) -> str | None:
        """What makes the step the gradient of no one objective, if anything does."""
        r = self._record
        if r.weighting.writes == "entry":
            return "weights per gradient entry"
        return "heads='unweighted'" if r.heads == "unweighted" else "outer=..." if r.outer else None

    def _expect_objective(self, closure: _Closure) -> None:
        """Raises if a closure is evaluated more than once without an objective: at once, if that is known before."""
        r, found = self._record, self._no_objective()
        again = closure.calls == 0 and bool(closure.decided)
        if found is not None and (again or r.searches or isinstance(r.optimizer, torch.optim.LBFGS)):
            moved = " Parameters have moved already." if again else ""
            raise MTLWeightError(
                f"{type(r.optimizer).__name__} evaluates its closure more than once a step, and may compare the "
                f"values: expected weights that have an objective, found {found}, whose gradients are those of no one "
                f"objective.{moved} Use weights per task or per sample, or an optimizer that evaluates it once."
            )

    def _expect_one_graph(self, losses: Any) -> None:
        accumulation = self._record.accumulation
        together = accumulation.size is not None and not accumulation.each
        parts = together or isinstance(losses, (list, tuple))
        found = "losses in parts, each of whose graphs is freed before the next" if parts else self._no_objective()
        if found is not None:
            todo = "Leave it out, or accumulate(..., weigh='each')." if together else "Leave it out."
            raise MTLWeightError(
                "combine(..., retain_graph=True) goes back through the losses' graph with the weights as constants: "
                f"expected one weighted sum of the losses whose gradient is the step, found {found}. {todo}"
            )

    def _expect_finite(self, weights: Tensor, state: State) -> None:
        if not all_finite([weights, *tensors_of(state)]):
            raise NonFiniteError(
                f"{self._record.weighting!r} returned weights or a state that are not finite for finite losses and "
                f"gradients: expected finite ones, found weights {weights.flatten()[:8].tolist()}. Look at its "
                "hyperparameters and at the scale of the losses."
            )

    def _gradients_are_finite(self) -> bool:
        r = self._record
        parameters = [p for group in self.param_groups for p in group["params"]]
        values = local([g for p in parameters if (g := p.grad) is not None])
        finite, processes = all_finite(values), r.processes and r.processes.active
        if finite if processes is None else processes.agree(finite, parameters, averaged=r.averaged):
            if processes is not None and not r.averaged:
                processes.expect_averaged(values, parameters)
                r.averaged = True
            return True
        if r.on_nonfinite == "raise":
            hidden = r.pending.hidden if r.pending is not None else []
            raise bad_gradient(parameters, values, self._modules(), self.param_groups, hidden)
        return False

    def _skip(self, start: _Pending, dropped: tuple[str, ...], batch: Batch | None) -> Tensor:
        self._record.pending = replace(start, dropped=start.dropped + dropped, skip=True)
        return (batch or Batch({}, self._plan(start))).idle()

    @torch.no_grad()
    def _commit(self, skipped: bool = False) -> None:
        r = self._record
        pending, r.pending = r.pending, None
        r.accumulation.restart()
        if pending is None:
            return
        pending.use.done = True
        r.dropped.update(pending.dropped)
        if skipped:
            r.skipped += 1
            return
        r.state, r.memory, r.tasks, r.seed = pending.state, pending.memory, pending.tasks, pending.seed
        r.report, r.uses, r.step = pending.report or r.report, pending.uses, r.step + 1
        if pending.observe is not None and pending.state is not None:
            try:
                with full_precision():
                    view = View(pending.observe(), step=r.step - 1, seed=r.seed)
                    seen = r.weighting.observe(view, pending.state) if view.losses.isfinite().all() else None
            except Exception:  # whatever it is, the step was taken, and all else of it is committed
                r.fallbacks["the losses after the step could not be evaluated: not observed"] += 1
                raise
            if seen is not None and all_finite(list(tensors_of(seen))):
                r.state = seen
            else:
                r.fallbacks["the losses after the step were not finite: not observed"] += 1

    def _watch_use(self, pending: _Pending, scalar: Tensor) -> None:
        use = pending.use
        use.remembers = next(tensors_of(pending.state or {}), None) is not None

        def used(_gradient: Tensor) -> None:
            now = self._record.pending
            late = not (use.backward or use.done) and (now is None or now.use is not use)
            use.backward = True
            if late:  # another combine has come before this backward
                self._count_uncommitted(use)

        scalar.register_hook(used)
        self._record.cleared = False

    def _notice_uncommitted(self) -> None:
        """Counts a pending step whose gradients were used and which nobody committed.

        One that a gradient scaler skips is none of these: nobody steps, and gradients are cleared.
        """
        r = self._record
        if r.pending is None or not r.pending.use.backward:
            return
        added = not r.cleared and any(p.grad is not None for group in self.param_groups for p in group["params"])
        if r.pending.use.behind or added:
            self._count_uncommitted(r.pending.use)

    def _count_uncommitted(self, use: _Use) -> None:
        """Counts a step that nobody will commit; warns of what is lost, once."""
        r = self._record
        r.uncommitted += 1
        if not (use.behind or use.remembers):
            return
        what, todo = (
            (
                f"{type(r.optimizer).__name__} was stepped after a combine, but not by this optimizer's step()",
                "Call step() of this one, with a closure where a step takes several evaluations",
            )
            if use.behind
            else (
                "combine was called again before step(), which commits the later one alone",
                "For micro-batches of one step use accumulate(k), or pass them to combine as a list; to look at other "
                "losses, do not call combine",
            )
        )
        lost = f"what {r.weighting!r} learned from the first is lost" if use.remembers else "the step is not counted"
        self._warn("uncommitted", f"{what}: {lost}. {todo}. Such steps are counted in report.uncommitted.")

    def _warn_of_masks(self, hidden: Hidden) -> None:
        """Warns once if the steps that are skipped, or tasks that are dropped, are so because of what a mask hides."""
        cause = behind_masks(hidden, sure=True)
        if cause:
            self._warn("masked", f"a step was skipped, or a task dropped. {cause}")

    def _warn(self, kind: str, text: str) -> None:
        """Warns once of each kind, where the user's code called ``combine``."""
        if kind not in self._record.warned:
            self._record.warned.add(kind)
            warnings.warn(f"mtlweight: {text}", stacklevel=self._outside())

    @staticmethod
    def _outside() -> int:
        """The ``stacklevel`` for the caller of this method's caller at which the user's code called ``combine``."""
        frames = traceback.walk_stack(inspect.currentframe())
        combine = MultiTaskOptimizer.combine.__code__
        return next((level for level, (frame, _) in enumerate(frames) if frame.f_code is combine), 0) + 1

    def _fall_back(self, engine: str, cause: str, *, wholly: bool = True) -> None:
        r = self._record
        text = f"the {engine} engine cannot run here ({cause})"
        r.fallbacks[text] += 1
        if engine not in r.broken if wholly else r.fallbacks[text] == 1:
            if wholly:
                r.broken[engine] = cause
            then = {"forward": "pullback"}.get(engine, "rows")
            warnings.warn(f"mtlweight: {text}; falling back to the {then} engine.", stacklevel=self._outside())


def _valued(scalar: Tensor, objective: Tensor | None, batch: Batch, penalty: Tensor | None) -> Tensor:
    """The scalar with the value of the objective that it has the gradient of."""
    assert objective is not None
    others = [term.detach().to(objective) for term in (batch.taught(), penalty) if term is not None]
    if others:
        objective = objective + batch.agreed(torch.stack(others).sum())
    return scalar - scalar.detach() + objective.to(scalar)


class _SkipStepError(Exception):
    """Leaves the wrapped optimizer's step before it has changed anything."""


def _forward(name: str, doc: str) -> property:
    def get(self: MultiTaskOptimizer) -> Any:
        return getattr(self._record.optimizer, name)

    def set_(self: MultiTaskOptimizer, value: Any) -> None:
        setattr(self._record.optimizer, name, value)

    return property(get, set_, doc=doc)


_PARTS = ("step", "state_dict", "load_state_dict")
_HOOKS = [f"_optimizer_{part}_{when}_hooks" for part in _PARTS for when in ("pre", "post")]
for _name in ("param_groups", "state", "defaults", *_HOOKS):
    setattr(MultiTaskOptimizer, _name, _forward(_name, f"The wrapped optimizer's ``{_name}``."))
