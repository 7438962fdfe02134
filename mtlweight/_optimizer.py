"""The optimizer: wraps another one, asks a weighting how much everything counts, and owns the weighting's state."""

from __future__ import annotations

import contextlib
import functools
import inspect
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mtlweight._checkpoint import KEY, expect_loadable, restore, saved
from mtlweight._checks import expect_choice, expect_kind
from mtlweight._errors import MTLWeightError, NonFiniteError
from mtlweight._report import Report
from mtlweight._statistics import Given, all_finite, tensors_of
from mtlweight._view import State, View
from mtlweight._weighting import Weighting, evaluate
from mtlweight.engines import (
    ENGINES,
    Accumulation,
    Agreed,
    Batch,
    Capture,
    Parts,
    Plan,
    Processes,
    called,
    deferred,
    full_precision,
    local,
    look_again,
    parameters,
    parts,
    read,
    snapshot,
)

# From the losses with their graph, the view for notes, and `environments`, to a scalar that is added to the step.
Penalty = Callable[[Mapping[str, Tensor], View, Any], Tensor]


@dataclass
class _Pending:
    """What ``step`` will commit."""

    state: State | None
    report: Report
    tasks: tuple[str, ...]
    memory: State
    seed: int | None
    uses: Counter[str]
    dropped: tuple[str, ...] = ()
    skip: bool = False
    observe: Callable[[], Given] | None = None


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
    accumulation: Accumulation = field(default_factory=Accumulation)
    report: Report = field(default_factory=Report)
    skipped: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    broken: dict[str, str] = field(default_factory=dict)
    uses: Counter[str] = field(default_factory=Counter)
    capture: Capture | None = None


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
            name only if the weighting reads gradients. Skipped and dropped are counted in :attr:`report`.
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
        return replace(r.report, skipped=r.skipped, dropped=dict(r.dropped), fallbacks=dict(r.fallbacks))

    def combine(self, losses: Any, *, reference: Any = None, mask: Any = None, environments: Any = None) -> Tensor:
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

        Returns:
            Tensor: scalar; its value is the plain sum of the losses, for logging.

        Raises:
            MTLWeightError: if losses or reference have not the expected form, or a main task of the weighting was never
                there; one that has only the reference gives it by name, in a mapping.
            NonFiniteError: under the policy ``on_nonfinite``.
        """
        r = self._record
        with full_precision() as as_outside:
            weigh = functools.partial(self._combine, environments, as_outside(r.penalty))
            return r.accumulation.take(weigh, self.param_groups, as_outside(losses), as_outside(reference), mask)

    def accumulate(
        self, k: int, *, last: bool | None = None, weigh: Literal["together", "each"] = "together"
    ) -> contextlib.AbstractContextManager[None]:
        """Within the context, ``k`` calls of :meth:`combine` are the micro-batches of one step.

        For loops that call ``combine`` and ``backward`` for each micro-batch, divide each scalar by ``k`` as gradient
        accumulation does, and call :meth:`step` after the last: the plain loop, ``accelerator.accumulate(model)``,
        Lightning's ``accumulate_grad_batches=k``. The step is that of the whole batch. Enter it around the loop, or
        around each call.

        Args:
            k: what the loop divides each scalar by.
            last: whether the next micro-batch is the last of its step, for loops that know; such as
                ``accelerator.sync_gradients``. Left out, it is the ``k``-th; then ``step`` raises if it comes earlier.
            weigh: ``"together"``: the first calls remember their losses, which must be callables that hold their data,
                and return a scalar of value 0 whose backward leaves all gradients alone; the last one weighs them all
                as one batch in parts, and returns ``k`` times its scalar. Their references count by their mean.
                ``"each"``: each is weighed by itself, one after the other, from the state that the one before it left;
                that costs least. The report is of the last one.

        Raises:
            MTLWeightError: for arguments of another kind.
        """
        return self._record.accumulation.within(k, last, weigh)

    def _combine(self, environments: Any, objective: Penalty | None, losses: Any, reference: Any, mask: Any) -> Tensor:
        r = self._record
        start = r.pending if r.accumulation.continues else None
        start = start or _Pending(r.state, r.report, r.tasks, r.memory, r.seed, r.uses)
        r.pending = None
        if environments is not None and r.penalty is None:
            raise MTLWeightError(
                "Environments are for a penalty: expected MultiTaskOptimizer(..., penalty=...), found none. Pass one "
                "that reads environments, such as Invariance().on(selector), or leave environments out."
            )
        plan = self._plan(start, mask)
        rewind = snapshot([]) if r.weighting.observes_at(r.step) else None
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
            penalty = None if objective is None else batch.penalty(objective, view, environments)
        except NonFiniteError:
            if r.on_nonfinite == "raise":
                raise
            return self._skip(start, dropped, batch)
        writes = r.weighting.writes
        scalar = batch.combined(weights, writes, penalty)
        report = Report(step=r.step + 1, weights=weights, writes=writes, notes=view.notes, **batch.measured())
        tasks, seed = tuple(plan.agreed.tasks), plan.agreed.seed
        r.pending = _Pending(state, report, tasks, plan.memory, seed, plan.uses, start.dropped + dropped, start.skip)
        if rewind is not None:
            r.pending.observe = lambda: look_again(losses, plan, rewind, batch.tasks)
        return scalar

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the wrapped optimizer, then the commit of what :meth:`combine` left pending.

        A step without a :meth:`combine` before it is the wrapped optimizer's own, and is not counted.

        Args:
            closure: computes gradients and returns the loss, for optimizers that evaluate it themselves.

        Raises:
            NonFiniteError: if a gradient is not finite and ``on_nonfinite="raise"``. Nothing has changed then.
        """
        r = self._record
        evaluations, pending, rewind = 0, r.pending, r.accumulation.mark()

        def checked() -> Any:
            nonlocal evaluations
            if evaluations:
                r.pending = pending
                rewind()
            loss = closure() if closure is not None else None
            r.accumulation.expect_complete()
            if r.pending is not None and (r.pending.skip or not self._gradients_are_finite()):
                if evaluations:  # the wrapped optimizer has moved the parameters already
                    raise NonFiniteError(
                        "Expected finite numbers throughout the step of an optimizer that evaluates its closure more "
                        "than once, found NaN or infinity after it had moved. Lower the learning rate, or use a line "
                        "search."
                    )
                raise _SkipStepError
            evaluations += 1
            return loss

        try:
            if closure is None:
                checked()
                result = r.optimizer.step()
            else:
                result = r.optimizer.step(checked)
        except _SkipStepError:
            self._commit(skipped=True)
            return None
        if r.capture is not None:
            r.capture.clear()
        self._commit()
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the wrapped optimizer's gradients. Leaves what is pending: closures call this between."""
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

    def __repr__(self) -> str:
        return f"MultiTaskOptimizer({self._record.weighting!r}, {self._record.optimizer!r})"

    def _plan(self, start: _Pending, mask: Any = None) -> Plan:
        r = self._record
        outer = parameters(r.outer)
        processes = None if r.processes is None else r.processes.active
        agreed = Agreed.of(start.tasks, start.seed, processes)
        return Plan(
            weighting=r.weighting,
            use=r.weighting.reference,
            needs=r.weighting.needs_at(r.step),
            engine=r.engine,
            heads=r.heads,
            list_shared=lambda: None if r.shared is None else parameters(r.shared, without=outer),
            outer=outer,
            keep_graph=r.penalty is not None,
            optimizer=r.optimizer,
            modules=self._modules(),
            capture=r.capture,
            agreed=agreed,
            mask=mask,
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
        if r.engine != "features":
            return
        modules = [part for part in r.shared or [] if isinstance(part, nn.Module)]
        if not modules or len(modules) < len(r.shared or []):
            raise MTLWeightError(
                "engine='features' reads the shared modules' outputs: expected shared=... as a module or several, "
                f"found {'nothing' if r.shared is None else 'parameters'}. Pass the encoder."
            )
        r.capture = Capture(modules)

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
            having = [p for p in parameters if p.grad is not None]
            bad = [p for p, g in zip(having, values, strict=True) if not g.isfinite().all()]
            where = called(bad[0], self._modules(), self.param_groups) if bad else "another process's part of one"
            raise NonFiniteError(
                "A gradient is not finite after backward: expected finite numbers, found NaN or infinity for "
                f"{where}. The step was not taken. Look at the batch, or choose on_nonfinite='skip'."
            )
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
        r.dropped.update(pending.dropped)
        if skipped:
            r.skipped += 1
            return
        r.state, r.memory, r.tasks, r.seed = pending.state, pending.memory, pending.tasks, pending.seed
        r.report, r.uses, r.step = pending.report, pending.uses, r.step + 1
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

    def _fall_back(self, engine: str, cause: str) -> None:
        r = self._record
        text = f"the {engine} engine cannot run here ({cause})"
        r.fallbacks[text] += 1
        if engine not in r.broken:
            r.broken[engine] = cause
            then = {"forward": "pullback", "pullback": "rows"}[engine]
            frames = traceback.walk_stack(inspect.currentframe())
            combine = MultiTaskOptimizer.combine.__code__
            level = next((level for level, (frame, _) in enumerate(frames, 1) if frame.f_code is combine), 0)
            warnings.warn(f"mtlweight: {text}; falling back to the {then} engine.", stacklevel=level + 1)


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
