"""One batch: its losses, what the engines measure of them, and the scalar whose backward is the step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtlweight._errors import MTLWeightError, NonFiniteError
from mtlweight._statistics import all_finite, cast, row_sizes, statistics_dtype, widest
from mtlweight._view import Needs, View, expect_samples
from mtlweight._weighting import Level, wrong_shape
from mtlweight.engines import _losses, batched, features, forward, pullback, rows, samples
from mtlweight.engines._blame import behind_masks
from mtlweight.engines._confirm import NOT_FINITE, DisagreesError, expect_same_rows, judged
from mtlweight.engines._grad import explain, used_up
from mtlweight.engines._graph import Backward
from mtlweight.engines._inject import Pairs, inject_known
from mtlweight.engines._layers import Linear, linear_layers
from mtlweight.engines._plan import Plan
from mtlweight.engines._range import gradient, restored, unit, wide
from mtlweight.engines._reference import Reference, main_scope
from mtlweight.engines._rows import Rows


class Batch:
    """One batch's losses with what is measured of them: the :class:`~mtlweight._view.Source` of the optimizer's views.

    Args:
        losses: the present tasks' losses, with their graph.
        plan: how to measure.
        reference: computes the reference's gradient, if there is one.
        alignment: one ``[b]`` or scalar tensor a task, if it is known already.
    """

    def __init__(
        self,
        losses: dict[str, Tensor],
        plan: Plan,
        reference: Callable[[], Reference] | None = None,
        alignment: dict[str, Tensor] | None = None,
    ) -> None:
        self._losses = losses
        self._plan = plan
        self._reference = reference
        self._aligned = alignment
        self.means: Tensor | None = None  # [m, b], or [m] for scalars: what a loss counts for, if it says otherwise
        self._points = plan.capture.take() if plan.capture is not None else []
        self._rows: Rows | None = None
        self._values: Tensor | None = None
        self._gramian: Tensor | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the present tasks."""
        return tuple(self._losses)

    @property
    def known(self) -> tuple[str, ...]:
        """All tasks that have a place, in order."""
        return tuple(self._plan.tasks)

    @property
    def graphs(self) -> Mapping[str, Tensor]:
        """The present tasks' losses with their graph."""
        return self._losses

    @property
    def device(self) -> torch.device:
        """The first loss's device."""
        return next(iter(self._losses.values())).device

    def without(self, tasks: Sequence[str]) -> Batch:
        """The batch as if these tasks were absent; what was measured of the others is kept."""
        keep = [i for i, task in enumerate(self.tasks) if task not in tasks]
        batch = Batch({t: loss for t, loss in self._losses.items() if t not in tasks}, self._plan, self._reference)
        batch._points = self._points
        batch._rows = None if self._rows is None else self._rows.subset(keep)
        if self._aligned is not None:
            batch._aligned = {t: values for t, values in self._aligned.items() if t not in tasks}
        return batch

    @functools.cached_property
    def _stacked(self) -> Tensor:
        """The losses with their graph, ``[m]`` or ``[m, b]``."""
        with torch.enable_grad():  # weigh, which may be the first to ask, runs without gradients
            return _losses.stack(self._losses)

    def losses(self) -> Tensor:
        """``[m]`` or ``[m, b]``, detached."""
        if self._values is None:
            values = cast(self._stacked.detach(), statistics_dtype(self.device))
            self._check("loss", values)
            self._values = values
        return self._values

    def shares(self) -> Tensor:
        """``[m, b]``: what each sample counts for in its task's mean."""
        if self.means is not None:
            return self.means
        expect_samples(self.losses(), self.tasks)
        shares = _losses.shares(self.losses(), self.tasks, self._plan.masks)
        assert shares is not None
        return shares

    def jacobian(self, coefficients: Tensor | None) -> Tensor:
        """``[m, n]`` over the shared parameters, of the tasks' means or of the totals that ``coefficients`` make."""
        if self._plan.gradient_engine == "features":
            raise MTLWeightError(
                f"{self._plan.name} reads the Jacobian over the shared parameters: expected an engine that measures "
                "it, found the features engine, which measures Gramians at the shared representation. Use "
                "engine='rows'."
            )
        rows = self._gradients(coefficients)
        assert rows.block is not None
        self._plan.expect_columns(rows.inputs)
        self._check("gradient", row_sizes(rows.block), rows)
        return rows.block

    def _gradients(self, coefficients: Tensor | None) -> Rows:
        if self._rows is None or self._rows.coefficients is not coefficients:
            shared = self._plan.shared_for("gradients")
            self._plan.expect_real(shared)
            self._rows = self._measure(shared, coefficients, self._plan.gradient_engine)
            if not self._rows.reached:
                raise MTLWeightError(
                    "No loss reaches the shared parameters: expected shared=... to name parameters in the losses' "
                    "graph, found none of them there. Pass the parameters of the model that computed the losses."
                )
        return self._rows

    def gramian(self, coefficients: Tensor | None) -> Tensor:
        """``[m, m]``: over the shared parameters, or at the shared representation for the features engine."""
        if self._plan.gradient_engine != "features":
            return self._checked((rows := self._gradients(coefficients)).gramian, rows)
        measured = self._features(coefficients)
        if measured is None:
            raise MTLWeightError(
                "engine='features' found no shared representation in the losses' graph: expected the modules in "
                "shared=... to be called with gradients enabled since the last step, found none of their outputs (a "
                "compiled model does not show it, and a slice of a Sequential is a new module). Call them through "
                "their forward, or use engine='rows'."
            )
        return self._checked(measured)

    def _features(self, coefficients: Tensor | None) -> Tensor | None:
        """The Gramian at the shared representation, if there is one."""
        plan = self._plan
        if not self._points or not features.reach(self._losses, self._points, plan.shared or [], plan.called):
            return None
        return self._measure(self._points, coefficients, "rows", keep_graph=True).gramian

    def _checked(self, gramian: Tensor, over: Rows | None = None) -> Tensor:
        self._check("gradient", gramian.diagonal(), over)  # finite if and only if the rows are
        self._gramian = gramian
        return gramian

    def alignment(self) -> Tensor:
        """``<∇ℓ, g_ref>``: ``[m]`` or ``[m, b]``, like the losses."""
        if self._aligned is None:
            self._aligned = self._align()
        values = _losses.stack(self._aligned).detach().to(statistics_dtype(self.device))
        try:
            self._check("gradient's product with the reference's gradient", values)
        except NonFiniteError:
            self._with_reference().expect_finite(self._plan)  # only now: to ask makes the host wait for the device
            raise
        return values

    def reference_gradient(self) -> Tensor:
        """``g_ref`` over the shared parameters, ``[n]``."""
        reference = self._with_reference()
        known = {id(p): g for p, g in zip(reference.parameters, reference.tangents, strict=True)}
        shared = self._plan.shared_for("the alignment")
        dtype = widest(shared)
        return torch.cat([known.get(id(p), torch.zeros_like(p)).detach().to(dtype).flatten() for p in shared])

    def measured(self) -> dict[str, Any]:
        """What the report keeps."""
        return {
            "tasks": self.tasks,
            "losses": self._stacked.detach(),
            "writes": self._plan.writes,
            "shares": None if self.losses().ndim == 1 else self.shares(),
            "gramian": self._gramian,
            "alignment": None if self._aligned is None else _losses.stack(self._aligned).detach(),
            "engine": "+".join(dict.fromkeys(self._plan.used)),
        }

    def penalty(self, objective: Callable[..., Tensor], view: View, environments: Any) -> Tensor | None:
        """The value of an objective beside the losses, with its graph."""
        return objective(self.graphs, view.of(self), environments)

    def objective(self, weights: Tensor, writes: Level) -> Tensor | None:
        """The weighted losses added up; ``None`` for weights per gradient entry, which no objective has."""
        if writes == "entry":
            return None
        losses = self.losses()
        if writes == "task" and losses.ndim == 2:
            losses = (self.shares() * losses).sum(dim=1)
        return torch.dot(weights.to(losses.dtype).flatten(), losses.flatten())

    def taught(self) -> Tensor | None:
        """What the objective has of the reference itself, as a value."""
        use = self._plan.use
        if use is None or not use.learn or self._reference is None:
            return None
        return use.learn * self._reference().objective.detach()

    def agreed(self, value: Tensor) -> Tensor:
        """A value that each process has its own of, as their mean."""
        return value

    def stalled(self, view: View, weights: Tensor) -> list[str]:
        """Notes which tasks' measured gradients are exactly 0, and names them if no other task has any weight.

        The smallest convex combination of gradients is then 0, and so is what else gives all the weight to the task
        with the smallest gradient: nothing shared moves. Where weights per sample came first, they are what made the
        gradient 0, on purpose.
        """
        if self._gramian is None:
            return []
        zero = self._gramian.diagonal() == 0
        view.note("zero_gradient", zero)
        if weights.ndim > 1 or not bool(zero.any() & ~zero.all() & (zero | (weights == 0)).all()):
            return []
        return [task for task, none in zip(self.tasks, zero.tolist(), strict=True) if none]

    def combined(self, weights: Tensor, writes: Level, penalty: Tensor | None = None) -> Tensor:
        """The scalar whose backward is the weighted step, and whose value is the plain sum of the tasks' losses.

        Args:
            weights: as ``writes`` says.
            writes: their level.
            penalty: a scalar whose gradient joins the step.
        """
        stacked = self._stacked
        means = self.shares() if stacked.ndim == 2 else self.means

        def plain(losses: Tensor) -> Tensor:
            return losses if means is None else (means.to(losses.dtype) * losses).reshape(len(losses), -1).sum(dim=1)

        value = plain(stacked.detach()).sum()
        rows = self._rows
        measured = writes == "task" and rows is not None and rows.coefficients is None
        if writes == "entry" or (measured and not self._plan.ordinary):
            if rows is None:
                raise MTLWeightError(
                    f"{self._plan.name} writes weights per entry: expected it to read view.jacobian, found that it did "
                    "not. Declare Needs.JACOBIAN and take the number of entries from there."
                )
            n = sum(p.numel() for p in rows.inputs)
            if writes == "entry" and weights.shape[1] != n:
                raise wrong_shape(self._plan.weighting, f"shape {[len(weights), n]}", list(weights.shape))
            scalar = rows.combined(value, weights, writes, self._plan.heads)
        else:
            terms = plain(stacked) if writes == "task" else stacked
            total = torch.dot(cast(weights, terms.dtype).flatten(), terms.flatten())
            if self._plan.heads == "unweighted" and self._plan.shared is not None:
                scalar = inject_known(value, self._inner(self._two_backwards(total, plain(stacked).sum())))
            elif self._plan.outer:
                graph = Backward([total])
                inner = [p for p, _ in self._inner([(p, None) for p in graph.leaves])]
                keep = self._plan.keep_graph
                with self._plan.measuring():
                    found = gradient(total, inner, keep_graph=keep, narrow=graph.narrow)
                if not keep:
                    used_up(graph)
                scalar = inject_known(value, list(zip(inner, found, strict=True)))
            else:
                scalar = total
                scalar.detach().copy_(value)  # of the total its graph alone is of use
        scalar = self._with_learnt(scalar, value)
        return scalar if penalty is None else scalar + (penalty - penalty.detach()).to(scalar.device)

    def _with_learnt(self, scalar: Tensor, value: Tensor) -> Tensor:
        """With what the reference itself teaches."""
        use = self._plan.use
        if use is not None and use.learn and self._reference is not None:
            if self._plan.ordinary:
                taught = use.learn * self._reference().objective
                return scalar + (taught - taught.detach()).to(scalar)
            learnt: Pairs = [(p, use.learn * g) for p, g in self._reference().learnt]
            scalar = scalar + inject_known(torch.zeros_like(value), learnt)
        if self._plan.outer:
            scalar = scalar + inject_known(torch.zeros_like(value), list(self._with_reference().outer))
        return scalar

    def _inner(self, pairs: Pairs) -> Pairs:
        """Without the outer parameters."""
        outer = {id(p) for p in self._plan.outer}
        return [(p, g) for p, g in pairs if id(p) not in outer]

    def idle(self) -> Tensor:
        """Zero, with a backward that adds zeros: for a step that is skipped, and scalers that look for gradients."""
        trainable = self._plan.trainable
        value = torch.zeros((), device=trainable[0].device if trainable else None)
        return inject_known(value, [(p, torch.zeros_like(p)) for p in trainable])

    @torch.enable_grad()  # weigh runs without gradients, measuring needs them
    def _align(self) -> dict[str, Tensor]:
        plan, reference = self._plan, self._with_reference()
        losses = [wide(loss) for loss in self._losses.values()]
        parameters, tangents = reference.parameters, reference.tangents
        if plan.use is not None and plan.use.scope == "main":
            places = main_scope(plan, self._losses, parameters)
            parameters, tangents = [parameters[k] for k in places], [tangents[k] for k in places]
        tangents, size = unit(tangents) if reference.narrow or Backward(losses).narrow else (tangents, 1.0)
        engine = {"rows": "rows", "samples": "samples"}.get(plan.alignment_engine, "pullback")
        with plan.measuring():
            if engine != "rows":
                cause = plan.broken.get(engine)
                try:
                    if cause is None:
                        found = (samples if engine == "samples" else pullback).alignment(losses, parameters, tangents)
                        each, filled = judged(plan, engine, losses, parameters, tangents, found.unbind())
                        plan.used += [engine, "rows"] if filled else [engine]
                        return {t: restored(values, size) for t, values in zip(self._losses, each, strict=True)}
                except RuntimeError as error:
                    if engine == "samples" and not isinstance(error, DisagreesError):
                        raise
                    cause = forward.cause(error)
                plan.warn(engine, str(cause))
            values = rows.alignment(losses, parameters, tangents)
        plan.used.append("rows")
        return dict(zip(self._losses, restored(values, size).unbind(), strict=True))

    def _with_reference(self) -> Reference:
        if self._reference is None:
            reader = "outer=... learns from" if self._plan.outer else f"{self._plan.name} compares gradients with"
            raise MTLWeightError(
                f"{reader} a reference objective: expected combine(losses, "
                "reference=...), found no reference. Pass the main task's loss on held-out data, as a tensor or a "
                "callable."
            )
        return self._reference()

    @torch.enable_grad()  # as above
    def _measure(
        self, inputs: list[Tensor], coefficients: Tensor | None, engine: str, keep_graph: bool | None = None
    ) -> Rows:
        plan = self._plan
        losses = [wide(loss) for loss in self._losses.values()]  # so that their coefficients are not rounded to less
        each = self.shares() if coefficients is None and (plan.masks or self.means is not None) else coefficients
        outputs = [
            (loss if loss.ndim == 0 else loss.mean()) if each is None else (each[t].to(loss.dtype) * loss).sum()
            for t, loss in enumerate(losses)
        ]
        # The graph is needed again only if the step is an ordinary backward, or alignments are still to come.
        final = plan.writes != "sample" and coefficients is None and keep_graph is None and not plan.ordinary
        keep = not final or plan.keep_graph or (Needs.ALIGNMENT in plan.weighting.needs and self._aligned is None)
        known = {id(p) for p in [*inputs, *plan.outer]}
        graph = Backward(outputs)
        rest = [p for p in graph.leaves if id(p) not in known] if final else []
        every = [*inputs, *rest]
        whole = Needs.JACOBIAN in plan.needs or plan.writes == "entry"

        def collected(engine: str) -> Rows:
            layers: dict[int, Linear] = {}
            if engine == "samples":
                gradients = samples.gradients(losses, every, each)
            elif engine == "batched":
                gradients = batched.gradients(graph, every, keep_graph=True)
            else:
                if coefficients is None and self.means is None and not whole:  # else rows of several parts add up
                    layers = linear_layers(graph, inputs, lambda layer: layer.compares(len(outputs)))
                gradients = rows.gradients(graph, every, keep_graph=keep, layers=layers)
            entering = {k: layer.kept() for k, layer in layers.items()}
            found = Rows.collect(gradients, len(outputs), inputs, rest, coefficients, whole=whole, entering=entering)
            found.rounding = graph.rounding
            return found

        with plan.measuring():
            try:
                if engine in ("samples", "batched"):
                    found = self._vectorized(engine, graph, every, collected)
                else:
                    found = collected("rows")
                    plan.used.append(plan.gradient_engine)
                    if not keep:
                        used_up(graph)
            except RuntimeError as error:
                explain(error)  # gradients that are read too late
                raise
        return found

    def _vectorized(self, engine: str, graph: Backward, inputs: list[Tensor], collected: Callable[[str], Rows]) -> Rows:
        """The rows of an engine that runs several backwards at once, as far as ordinary ones bear them out."""
        plan, cause = self._plan, self._plan.broken.get(engine)
        if cause is None:
            found, confirm = collected(engine), plan.confirm(engine, graph.operators)
            try:
                if not all(fine := found.finite):
                    ordinary = collected("rows")
                    if ordinary.finite != fine:
                        plan.warn(engine, NOT_FINITE)
                        plan.used.append("rows")
                        return ordinary
                elif confirm:
                    expect_same_rows(graph, found, inputs, plan.uses[engine])
                    plan.trust(engine, graph.operators)
                plan.used.append(engine)
                return found
            except DisagreesError as error:
                cause = str(error)
        plan.warn(engine, cause)
        plan.used.append("rows")
        return collected("rows")

    def _two_backwards(self, weighted: Tensor, plain: Tensor) -> Pairs:
        shared = self._plan.shared_for("shared parameters")
        known = {id(p) for p in shared}
        graph = Backward([plain])
        rest = [p for p in graph.leaves if id(p) not in known]
        keep, short = self._plan.keep_graph, graph.narrow
        with self._plan.measuring():
            first = gradient(weighted, shared, keep_graph=True, narrow=short)
            second = gradient(plain, rest, keep_graph=keep, narrow=short)
        if not keep:
            used_up(graph)
        return [*zip(shared, first, strict=True), *zip(rest, second, strict=True)]

    def _check(self, what: str, values: Tensor, rows: Rows | None = None) -> None:
        """Raises if a task's values are not finite; names the first parameter where its row, or itself, is not."""
        if not all_finite([values]):
            finite = values.isfinite().reshape(len(values), -1).all(dim=1)
            bad = [task for task, fine in zip(self.tasks, finite.tolist(), strict=True) if not fine]
            where, todo = "", "Look at its batch, or choose on_nonfinite='skip' or 'drop'."
            if what == "loss" and values.ndim == 2 and values.isfinite().any(dim=1).any():
                todo = f"If its samples have no label there, give them a finite one and pass mask=.... {todo}"
            sick = next((p for p in self._plan.trainable if not p.isfinite().all()), None)
            if sick is not None:
                where, todo = f", which {self._plan.called(sick)} holds itself", "Go back to a checkpoint."
            else:
                todo = behind_masks([each for each in self._plan.hidden if each[0] in bad and what != "loss"]) or todo
                if rows is not None and (p := rows.bad_input(self.tasks.index(bad[0]))) is not None:
                    where = f" for {self._plan.called(p)}"
            raise NonFiniteError(
                f"The {what} of task {', '.join(bad)} is not finite: expected finite numbers, found NaN or "
                f"infinity{where}. {todo}",
                tasks=bad,
            )
