"""One batch: what a view reads of it, and the scalar whose backward is the step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtlweight._errors import MTLWeightError, NonFiniteError
from mtlweight._statistics import all_finite, cast, row_sizes, statistics_dtype, widest
from mtlweight._view import View, expect_samples
from mtlweight._weighting import Level, wrong_shape
from mtlweight.autograd.inject import inject_known
from mtlweight.batch import losses as given
from mtlweight.batch.nonfinite import behind_masks
from mtlweight.batch.reference import Reference
from mtlweight.batch.source import Source
from mtlweight.engines.jacobian import Rows


class Batch:
    """One batch, as views read it (:class:`~mtlweight._view.Source`): each statistic once, and checked.

    Args:
        source: its losses, and what measures them.
        rows: what was measured of them for the tasks' means.
    """

    def __init__(self, source: Source, rows: Rows | None = None) -> None:
        self.source, self.step = source, source.step
        self._rows: tuple[Tensor | None, Rows] | None = None if rows is None else (None, rows)
        self._values: Tensor | None = None
        self._gramian: Tensor | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the present tasks."""
        return tuple(self.source.losses)

    @property
    def known(self) -> tuple[str, ...]:
        """All tasks that have a place, in order."""
        return tuple(self.step.draft.tasks)

    @property
    def device(self) -> torch.device:
        """Where statistics are."""
        return self.source.device

    def without(self, tasks: Sequence[str]) -> Batch:
        """The batch as if these tasks were absent; what was measured of the others is kept."""
        keep = [i for i, task in enumerate(self.tasks) if task not in tasks]
        rows = self._measured
        return Batch(self.source.without(tasks), None if rows is None else rows.subset(keep))

    @property
    def _measured(self) -> Rows | None:
        """The rows of the tasks' means, if they are the last that were measured."""
        return self._rows[1] if self._rows is not None and self._rows[0] is None else None

    def losses(self) -> Tensor:
        """``[m]`` or ``[m, b]``, detached."""
        if self._values is None:
            values = given.stack({task: loss.detach() for task, loss in self.source.losses.items()})
            values = cast(values, statistics_dtype(self.device))
            self._check("loss", values)
            self._values = values
        return self._values

    def shares(self) -> Tensor:
        """``[m, b]``: what each sample counts for in its task's mean."""
        expect_samples(self.losses(), self.tasks)
        shares = self.source.shares()
        assert shares is not None
        return shares

    def totals(self) -> Tensor:
        """The tasks' losses, ``[m]``."""
        losses = self.losses()
        return losses if losses.ndim == 1 else (self.shares() * losses).sum(dim=1)

    def jacobian(self, coefficients: Tensor | None) -> Tensor:
        """``[m, n]`` over the shared parameters, of the tasks' means or of the totals that ``coefficients`` make."""
        if self.step.settings.gradient_engine == "features":
            raise MTLWeightError(
                f"{self.step.settings.name} reads the Jacobian over the shared parameters: expected an engine that "
                "measures it, found the features engine, which measures Gramians at the shared representation. Use "
                "engine='rows'."
            )
        rows = self._gradients(coefficients)
        assert rows.block is not None
        self.step.expect_columns(rows.inputs)
        self._check("gradient", row_sizes(rows.block), rows)
        return rows.block

    def gramian(self, coefficients: Tensor | None) -> Tensor:
        """``[m, m]``: over the shared parameters, or at the shared representation for the features engine."""
        rows = None
        if self.step.settings.gradient_engine != "features":
            rows = self._gradients(coefficients)
        gramian = self.source.gramian_of_features(coefficients) if rows is None else rows.gramian
        if gramian is None:
            raise MTLWeightError(
                "engine='features' found no shared representation in the losses' graph: expected the modules in "
                "shared=... to be called with gradients enabled since the last step, found none of their outputs (a "
                "compiled model does not show it, and a slice of a Sequential is a new module). Call them through "
                "their forward, or use engine='rows'."
            )
        self._check("gradient", gramian.diagonal(), rows)  # finite if and only if the rows are
        self._gramian = gramian
        return gramian

    def _gradients(self, coefficients: Tensor | None) -> Rows:
        if self._rows is None or self._rows[0] is not coefficients:
            rows = self.source.gradients(coefficients)
            self._rows = coefficients, rows
            if not rows.reached:
                raise MTLWeightError(
                    "No loss reaches the shared parameters: expected shared=... to name parameters in the losses' "
                    "graph, found none of them there. Pass the parameters of the model that computed the losses."
                )
        return self._rows[1]

    def alignment(self) -> Tensor:
        """``<∇ℓ, g_ref>``: ``[m]`` or ``[m, b]``, like the losses."""
        if self.source.aligned is None:
            self._reference()
        values = given.stack(self.source.alignments()).detach().to(statistics_dtype(self.device))
        try:
            self._check("gradient's product with the reference's gradient", values)
        except NonFiniteError:
            self._reference().expect_finite()  # only now: to ask makes the host wait for the device
            raise
        return values

    def reference_gradient(self) -> Tensor:
        """``g_ref`` over the shared parameters, ``[n]``."""
        reference = self._reference()
        known = {id(p): g for p, g in zip(reference.parameters, reference.tangents, strict=True)}
        shared = self.step.shared_for("the alignment")
        dtype = widest(shared)
        return torch.cat([known.get(id(p), torch.zeros_like(p)).detach().to(dtype).flatten() for p in shared])

    def _reference(self) -> Reference:
        if self.source.reference is None:
            name = self.step.settings.name
            reader = "outer=... learns from" if self.step.outer else f"{name} compares gradients with"
            raise MTLWeightError(
                f"{reader} a reference objective: expected combine(losses, "
                "reference=...), found no reference. Pass the main task's loss on held-out data, as a tensor or a "
                "callable."
            )
        return self.source.reference()

    def expect_main(self) -> None:
        """Raises if the weighting's main task was never there: weights tell it by its name alone."""
        use, step = self.step.reference_use, self.step
        if use is None or not use.main or self.source.reference is None or not step.compares:
            return
        present = {*self.known, *self.tasks}
        if present and not present & {*use.main} and not self._reference().by_name:
            raise MTLWeightError(
                f"{step.settings.name}: expected the main task {' or '.join(map(repr, use.main))} among the tasks, "
                f"found {', '.join(self.tasks)}. Pass the name of one of them; or, if it has no loss here, the "
                "reference by name: reference={name: ...}."
            )

    def measured(self) -> dict[str, Any]:
        """What the report keeps."""
        aligned = self.source.aligned
        return {
            "tasks": self.tasks,
            "losses": given.stack({task: loss.detach() for task, loss in self.source.losses.items()}),
            "writes": self.step.settings.writes,
            "shares": None if self.losses().ndim == 1 else self.shares(),
            "gramian": self._gramian,
            "alignment": None if aligned is None else given.stack(aligned).detach(),
            "engine": "+".join(dict.fromkeys(self.step.draft.trust.ran)),
            "own": self.source.own,
        }

    def penalty(self, view: View, environments: Any) -> Tensor | None:
        """The value of the penalty, with its graph, if there is one."""
        objective = self.step.settings.penalty
        if objective is None:
            return None
        return self.source.penalty(lambda source: objective(source.losses, view.of(Batch(source)), environments))

    def objective(self, weights: Tensor, writes: Level) -> Tensor | None:
        """The weighted losses added up; ``None`` for weights per gradient entry, which no objective has."""
        if writes == "entry":
            return None
        losses = self.totals() if writes == "task" else self.losses()
        return (weights.to(losses.dtype) * losses).sum()

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

    def scalar(self, weights: Tensor, writes: Level, penalty: Tensor | None = None) -> Tensor:
        """The scalar whose backward is the weighted step, and whose value is the plain sum of the tasks' losses.

        Args:
            weights: as ``writes`` says.
            writes: their level.
            penalty: a scalar whose gradient joins the step.
        """
        settings, rows = self.step.settings, self._measured
        if writes == "entry":
            if rows is None:
                raise MTLWeightError(
                    f"{settings.name} writes weights per entry: expected it to read view.jacobian, found that it did "
                    "not. Declare Needs.JACOBIAN and take the number of entries from there."
                )
            n = sum(p.numel() for p in rows.inputs)
            if weights.shape[1] != n:
                raise wrong_shape(settings.weighting, f"shape {[len(weights), n]}", list(weights.shape))
        elif writes == "sample" or self.step.retain_graph:
            rows = None
        scalar = self.source.scalar(weights, writes, rows)
        use, reference = self.step.reference_use, self.source.reference
        if use is not None and use.learn and reference is not None:
            if self.step.retain_graph:
                taught = use.learn * reference().objective
                scalar = scalar + (taught - taught.detach()).to(scalar)
            else:
                scalar = scalar + inject_known(torch.zeros_like(scalar.detach()), [*reference().learned])
        if self.step.outer and not self.step.retain_graph:
            scalar = scalar + inject_known(torch.zeros_like(scalar.detach()), [*self._reference().outer])
        return scalar if penalty is None else scalar + (penalty - penalty.detach()).to(scalar.device)

    def valued(self, scalar: Tensor, objective: Tensor, penalty: Tensor | None) -> Tensor:
        """The scalar with the value of the objective that it has the gradient of, for line searches.

        Args:
            scalar: from :meth:`scalar`.
            objective: from :meth:`objective`.
            penalty: that joined the step.
        """
        use, reference = self.step.reference_use, self.source.reference
        others = [] if penalty is None else [penalty.detach().to(objective)]
        if use is not None and use.learn and reference is not None:
            others.append(use.learn * reference().objective.detach().to(objective))
        if others:
            added, processes = torch.stack(others).sum(), self.step.processes
            objective = objective + (added if processes is None else processes.mean(added))
        return scalar - scalar.detach() + objective.to(scalar)

    def _check(self, what: str, values: Tensor, rows: Rows | None = None) -> None:
        """Raises if a task's values are not finite; names the first parameter where its row, or itself, is not."""
        if all_finite([values]):
            return
        step = self.step
        finite = values.isfinite().reshape(len(values), -1).all(dim=1)
        bad = [task for task, fine in zip(self.tasks, finite.tolist(), strict=True) if not fine]
        where, todo = "", "Look at its batch, or choose on_nonfinite='skip' or 'drop'."
        if what == "loss" and values.ndim == 2 and values.isfinite().any(dim=1).any():
            todo = f"If its samples have no label there, give them a finite one and pass mask=.... {todo}"
        sick = next((p for p in step.trainable if not p.isfinite().all()), None)
        if sick is not None:
            where, todo = f", which {step.settings.called(sick)} holds itself", "Go back to a checkpoint."
        else:
            todo = behind_masks([each for each in step.draft.hidden if each[0] in bad and what != "loss"]) or todo
            if rows is not None and (p := rows.bad_input(self.tasks.index(bad[0]))) is not None:
                where = f" for {step.settings.called(p)}"
        raise NonFiniteError(
            f"The {what} of task {', '.join(bad)} is not finite: expected finite numbers, found NaN or "
            f"infinity{where}. {todo}",
            tasks=bad,
        )
