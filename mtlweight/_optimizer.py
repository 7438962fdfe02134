"""The optimizer: wraps another one, asks a weighting how much everything counts, and owns the weighting's state."""

from __future__ import annotations

import contextlib
import functools
import inspect
import traceback
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mtlweight._checkpoint import KEY, expect_loadable, restore, saved
from mtlweight._checks import expect_choice, expect_kind
from mtlweight._errors import MTLWeightError, NonFiniteError
from mtlweight._record import Closure, Decision, Pending, Record
from mtlweight._report import Report
from mtlweight._statistics import all_finite, tensors_of
from mtlweight._uncommitted import notice, watch_scalar, watch_steps
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Weighting, evaluate
from mtlweight.autograd.autocast import full_precision
from mtlweight.autograd.replay import snapshot
from mtlweight.batch.accumulation import Accumulation
from mtlweight.batch.after_step import losses_after
from mtlweight.batch.batch import Batch
from mtlweight.batch.late_binding import expect_own_parts
from mtlweight.batch.losses import deferred
from mtlweight.batch.nonfinite import Hidden, bad_gradient, behind_masks
from mtlweight.batch.parameters import Parts, parameters, parts
from mtlweight.batch.read import read
from mtlweight.batch.settings import Penalty, Settings
from mtlweight.batch.step import Draft, Step
from mtlweight.distributed.processes import Processes
from mtlweight.distributed.sharded import local
from mtlweight.engines import ENGINES
from mtlweight.engines.features import Capture
from mtlweight.engines.trust import Trust
from mtlweight.loss.constant import Constant

P = ParamSpec("P")
T = TypeVar("T")


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
        settings = Settings(
            optimizer,
            weighting,
            None if shared is None else parts("shared", shared),
            model,
            engine,
            heads,
            on_nonfinite,
            penalty,
            [] if outer is None else parts("outer", outer),
            Processes.of(process_group),
        )
        self._record = Record(settings, seed)
        self._watch()

    # The wrapped optimizer's own, by reference at each access: `load_state_dict` and schedulers rebind them.

    @property
    def optimizer(self) -> Optimizer:
        """The wrapped optimizer."""
        return self._record.settings.optimizer

    @property
    def weighting(self) -> Weighting:
        """The weighting."""
        return self._record.settings.weighting

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
                run. It may be called more than once in a step, so draw the batch outside. A ``[b]`` loss is averaged
                over the batch, unless the weighting writes weights per sample. A list of callables, one for each part
                of a batch too large for memory: the weights are those of the whole batch.
            reference: the reference objective, such as the main task's loss on held-out data: a scalar or ``[b]``
                tensor; several in a list, which are averaged; one for each main task in a mapping, which are added up;
                or a callable that returns one of these. Needed by weightings that read the alignment, and by
                ``outer``; where there is neither, it is not evaluated.
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
        if environments is not None and r.settings.penalty is None:
            raise MTLWeightError(
                "Environments are for a penalty: expected MultiTaskOptimizer(..., penalty=...), found none. Pass one "
                "that reads environments, such as Invariance().on(selector), or leave environments out."
            )
        with full_precision() as as_outside:
            settings = replace(r.settings, penalty=as_outside(r.settings.penalty))
            weigh = functools.partial(self._combine, settings, environments, retain_graph)
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
                as one batch in parts, and returns ``divisor`` times its scalar. Their references are averaged.
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
        self, settings: Settings, environments: Any, retain_graph: bool, losses: Any, reference: Any, mask: Any
    ) -> Tensor:
        r = self._record
        decided = None if r.closure is None else self._decided(r.closure)
        if decided is not None:
            step = self._step(settings, decided.start, reference, mask, retain_graph=True, needs=Needs.NOTHING)
            return self._evaluate_again(decided, step, environments, losses, reference)
        start = self._start()
        step = self._step(settings, start, reference, mask, retain_graph=retain_graph)
        losses = step.uncompiled(losses, reference)
        rewind = snapshot(settings.modules) if settings.weighting.observes_at(r.step) else None
        if rewind is not None and not deferred(losses):
            raise MTLWeightError(
                f"{settings.name} looks at the losses again after the step: expected losses as a callable, found "
                "computed ones. Pass combine(lambda: losses(model, batch))."
            )
        batch: Batch | None = None
        dropped: list[str] = []
        try:
            batch = read(losses, reference, step)
            while batch.tasks:
                view = step.view(batch)
                try:
                    weights, state = self._weigh(batch, view, start.state)
                    break
                except NonFiniteError as error:
                    if settings.on_nonfinite != "drop" or not error.tasks:
                        raise
                    dropped += error.tasks
                    batch = batch.without(error.tasks)
                    self._warn_of_masks(step.draft.hidden)
            else:
                return self._skip(start, dropped, batch.source.idle())
            penalty = batch.penalty(view, environments)
        except NonFiniteError:
            if settings.on_nonfinite == "raise":
                raise
            self._warn_of_masks(step.draft.hidden)
            return self._skip(start, dropped, step.idle() if batch is None else batch.source.idle())
        self._warn_of_stalled(batch.stalled(view, weights))
        scalar, objective = batch.scalar(weights, settings.writes, penalty), batch.objective(weights, settings.writes)
        measured = batch.measured()
        report = Report(
            r.step + 1, earlier=start.report, weights=weights, objective=objective, notes=view.notes, **measured
        )
        draft = step.draft
        r.pending = Pending(
            state,
            report,
            tuple(draft.tasks),
            draft.memory,
            draft.seed,
            draft.trust.uses,
            start.dropped + tuple(dropped),
            start.skip,
            draft.hidden,
        )
        if rewind is not None:
            present, first = batch.tasks, [weakref.ref(loss) for loss in batch.source.losses.values()]
            r.pending.observe = lambda: losses_after(losses, step, rewind, present, first)
        watch_scalar(r, r.pending, scalar, self._warn)
        if r.closure is None:
            return scalar
        shape = batch.losses().shape
        r.closure.decided.append(Decision(weights, settings.writes, batch.tasks, shape, tuple(dropped), start))
        return scalar if objective is None or settings.no_objective else batch.valued(scalar, objective, penalty)

    def _start(self) -> Pending:
        """Where the step starts from: what is committed, or what the micro-batch before it left."""
        r, before = self._record, self._record.pending
        if before is not None and r.accumulation.continues:
            before.use.done = True
            r.pending = None
            return before
        if r.closure is None:
            notice(r, self._warn)
        r.pending = None
        return r.start()

    def _weigh(self, batch: Batch, view: View, state: State | None) -> tuple[Tensor, State]:
        """The weights, and the state after them; raises if anything is not finite."""
        batch.losses()
        weighting = self._record.settings.weighting
        weights, state = evaluate(weighting, view, state)
        if not all_finite([weights, *tensors_of(state)]):
            raise NonFiniteError(
                f"{weighting!r} returned weights or a state that are not finite for finite losses and "
                f"gradients: expected finite ones, found weights {weights.flatten()[:8].tolist()}. Look at its "
                "hyperparameters and at the scale of the losses."
            )
        return weights, state

    def _decided(self, closure: Closure) -> Decision | None:
        """What the first evaluation of a closure decided at this call of ``combine``; ``None`` in the first one."""
        self._expect_objective(closure)
        closure.calls += 1
        return closure.decided[closure.calls - 1] if closure.calls <= len(closure.decided) else None

    def _evaluate_again(self, decided: Decision, step: Step, environments: Any, losses: Any, reference: Any) -> Tensor:
        """The objective at another point of the same step, with the weights that its first evaluation decided."""
        batch = read(losses, reference, step)
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
        penalty, objective = batch.penalty(step.view(batch), environments), batch.objective(weights, decided.writes)
        assert objective is not None  # others may not be evaluated again
        return batch.valued(batch.scalar(weights, decided.writes, penalty), objective, penalty)

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
                result = self.optimizer.step()
            else:
                r.closure = Closure()
                result = self.optimizer.step(checked)
        except _SkipStepError:
            self._warn_of_masks(r.pending.hidden if r.pending is not None else [])
            self._commit(skipped=True)
            return None
        finally:
            r.closure, r.stepping = None, False
        try:
            self._commit()
        finally:
            if r.settings.capture is not None:
                r.settings.capture.clear()
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the wrapped optimizer's gradients. Leaves what is pending: closures call this between."""
        self._record.cleared = True
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the wrapped optimizer."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state dict, with this library's state under one more key.

        A bare optimizer of the wrapped class loads it too. It loads with ``torch.load(weights_only=True)``.
        """
        r = self._record
        return {**r.settings.optimizer.state_dict(), KEY: saved(r)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads a state dict of this class, or one of a bare optimizer of the wrapped class (with a warning).

        Raises:
            MTLWeightError: if it was saved with another weighting, or with arguments of it that make its state another
                one (:attr:`Weighting.layout`), or by a version with another format. Nothing has changed then.
        """
        r = self._record
        own = state_dict.get(KEY)
        if own is not None:
            expect_loadable(own, r.settings.weighting)
        r.settings.optimizer.load_state_dict({key: value for key, value in state_dict.items() if key != KEY})
        if own is None:
            warnings.warn(f"The state dict has no key {KEY!r}: the weighting starts afresh.", stacklevel=2)
            own = {"step": 0, "tasks": [], "skipped": 0, "dropped": {}, "state": None, "memory": {}}
        restore(r, own)
        r.pending, r.report = None, Report(step=r.step)
        r.accumulation.restart()

    def __getstate__(self) -> dict[str, Any]:
        settings = replace(self._record.settings, capture=None)
        return {"record": replace(self._record, settings=settings, pending=None, accumulation=Accumulation())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._record = state["record"]
        self._watch()

    def __getattr__(self, name: str) -> Any:
        """The wrapped optimizer's own public attributes, such as ``first_step`` or ``train``; no private ones.

        Gradient scalers and others ask for private names, and what the wrapped optimizer would answer is not true of
        this one.
        """
        if not name.startswith("_") and hasattr(self._record.settings.optimizer, name):
            return getattr(self._record.settings.optimizer, name)
        raise AttributeError(
            f"{type(self).__name__!r} object has no attribute {name!r}, and neither has the wrapped "
            f"{type(self.optimizer).__name__}, as a public one"
            if "_record" in vars(self)
            else name
        )

    def __repr__(self) -> str:
        return f"MultiTaskOptimizer({self.weighting!r}, {self.optimizer!r})"

    def _step(
        self,
        settings: Settings,
        start: Pending,
        reference: Any,
        mask: Any,
        *,
        retain_graph: bool,
        needs: Needs | None = None,
    ) -> Step:
        r = self._record
        processes = None if settings.processes is None else settings.processes.active
        seed = start.seed
        if seed is None and processes is None:  # several tell each other their seeds first
            seed = torch.initial_seed()
        trust = Trust(Counter(start.uses), r.broken, self._fall_back)
        given = "none" if reference is None else "one"
        return Step(
            settings,
            r.step,
            settings.weighting.needs_at(r.step) if needs is None else needs,
            start.state,
            mask,
            retain_graph,
            parameters(settings.outer),
            processes,
            {"step": r.step, "seed": r.seed, "tasks": r.tasks, "reference": given},
            Draft([*start.tasks], seed, {**start.memory}, trust, [*start.hidden]),
        )

    def _watch(self) -> None:
        r = self._record
        watch_steps(r)
        if r.settings.engine != "features":
            return
        shared = r.settings.shared or []
        modules = [part for part in shared if isinstance(part, nn.Module)]
        if not modules or len(modules) < len(shared):
            raise MTLWeightError(
                "engine='features' reads the shared modules' outputs: expected shared=... as a module or several, "
                f"found {'nothing' if r.settings.shared is None else 'parameters'}. Pass the encoder."
            )
        r.settings = replace(r.settings, capture=Capture(modules))

    def _expect_objective(self, closure: Closure) -> None:
        """Raises if a closure is evaluated more than once without an objective: at once, if that is known before."""
        r, found = self._record, self._record.settings.no_objective
        again = closure.calls == 0 and bool(closure.decided)
        if found is not None and (again or r.searches or isinstance(self.optimizer, torch.optim.LBFGS)):
            moved = " Parameters have moved already." if again else ""
            raise MTLWeightError(
                f"{type(self.optimizer).__name__} evaluates its closure more than once a step, and may compare the "
                f"values: expected weights that have an objective, found {found}, whose gradients are those of no one "
                f"objective.{moved} Use weights per task or per sample, or an optimizer that evaluates it once."
            )

    def _expect_one_graph(self, losses: Any) -> None:
        accumulation = self._record.accumulation
        together = accumulation.size is not None and not accumulation.each
        parts = together or isinstance(losses, (list, tuple))
        found = (
            "losses in parts, each of whose graphs is freed before the next"
            if parts
            else self._record.settings.no_objective
        )
        if found is not None:
            todo = "Leave it out, or accumulate(..., weigh='each')." if together else "Leave it out."
            raise MTLWeightError(
                "combine(..., retain_graph=True) goes back through the losses' graph with the weights as constants: "
                f"expected one weighted sum of the losses whose gradient is the step, found {found}. {todo}"
            )

    def _gradients_are_finite(self) -> bool:
        r, settings = self._record, self._record.settings
        values = local([g for p in settings.parameters if (g := p.grad) is not None])
        finite, processes = all_finite(values), settings.processes and settings.processes.active
        if finite if processes is None else processes.agree(finite, settings.parameters, averaged=r.averaged):
            if processes is not None and not r.averaged:
                processes.expect_averaged(values, settings.parameters)
                r.averaged = True
            return True
        if settings.on_nonfinite == "raise":
            hidden = r.pending.hidden if r.pending is not None else []
            raise bad_gradient(settings.parameters, values, settings.called, hidden)
        return False

    def _skip(self, start: Pending, dropped: Sequence[str], idle: Tensor) -> Tensor:
        self._record.pending = replace(start, dropped=start.dropped + tuple(dropped), skip=True)
        return idle

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
                    seen = r.settings.weighting.observe(view, pending.state) if view.losses.isfinite().all() else None
            except Exception:  # whatever it is, the step was taken, and all else of it is committed
                r.fallbacks["the losses after the step could not be evaluated: not observed"] += 1
                raise
            if seen is not None and all_finite(list(tensors_of(seen))):
                r.state = seen
            else:
                r.fallbacks["the losses after the step were not finite: not observed"] += 1

    def _warn_of_masks(self, hidden: Hidden) -> None:
        """Warns once if the steps that are skipped, or tasks that are dropped, are so because of what a mask hides."""
        cause = behind_masks(hidden, sure=True)
        if cause:
            self._warn("masked", f"a step was skipped, or a task dropped. {cause}")

    def _warn_of_stalled(self, tasks: Sequence[str]) -> None:
        if tasks:
            self._warn(
                "stalled",
                f"the gradient of task {', '.join(tasks)} over the shared parameters is exactly 0, and "
                f"{self._record.settings.name} gives no other task any weight: no shared parameter moves in this step. "
                "If a loss is multiplied by 0, pass None for it: the task is absent then.",
            )

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


class _SkipStepError(Exception):
    """Leaves the wrapped optimizer's step before it has changed anything."""


def _forward(name: str, doc: str) -> property:
    def get(self: MultiTaskOptimizer) -> Any:
        return getattr(self.optimizer, name)

    def set_(self: MultiTaskOptimizer, value: Any) -> None:
        setattr(self.optimizer, name, value)

    return property(get, set_, doc=doc)


_PARTS = ("step", "state_dict", "load_state_dict")
_HOOKS = [f"_optimizer_{part}_{when}_hooks" for part in _PARTS for when in ("pre", "post")]
for _name in ("param_groups", "state", "defaults", *_HOOKS):
    setattr(MultiTaskOptimizer, _name, _forward(_name, f"The wrapped optimizer's ``{_name}``."))
