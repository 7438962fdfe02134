"""Losses with their graph."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from mtlweight._view import Needs
from mtlweight._weighting import Level
from mtlweight.autograd.gradients import gradient
from mtlweight.autograd.graph import Graph
from mtlweight.autograd.half_precision import wide
from mtlweight.autograd.inject import Pairs, inject_known
from mtlweight.autograd.remedies import explain, mark_freed
from mtlweight.batch import losses as given
from mtlweight.batch.reference import Reference
from mtlweight.batch.source import Source
from mtlweight.batch.step import Step
from mtlweight.engines import features, measure
from mtlweight.engines.jacobian import Rows
from mtlweight.engines.totals import Totals


@dataclass(eq=False)
class Whole:
    """Losses with their graph: the :class:`~mtlweight.batch.source.Source` that the others are made of.

    Args:
        losses: the present tasks'.
        step: what was known before.
        reference: computes the gradient of the reference when it is first called; ``None`` if there is none.
        aligned: the alignments, if they are known.
        means: what each loss counts for in its task's total, ``[m, b]`` or ``[m]``, if totals are no plain means.
        points: the shared representation, if the features engine is to read it.
    """

    losses: Mapping[str, Tensor]
    step: Step
    reference: Callable[[], Reference] | None = None
    aligned: dict[str, Tensor] | None = None
    means: Tensor | None = None
    points: Sequence[Tensor] = ()
    own: ClassVar[None] = None  # no other process has samples

    @property
    def device(self) -> torch.device:
        """The first loss's."""
        return next(iter(self.losses.values())).device

    def without(self, tasks: Sequence[str]) -> Whole:
        """The same as if these tasks were absent."""
        keep = [i for i, task in enumerate(self.losses) if task not in tasks]
        return replace(
            self,
            losses={task: loss for task, loss in self.losses.items() if task not in tasks},
            aligned=None if self.aligned is None else {t: v for t, v in self.aligned.items() if t not in tasks},
            means=None if self.means is None else self.means[keep],
        )

    def counting(self, means: Tensor) -> Whole:
        """The same, where each loss counts for so much in its task's total."""
        return replace(self, means=means)

    @functools.cached_property
    def stacked(self) -> Tensor:
        """The losses with their graph, ``[m]`` or ``[m, b]``."""
        with torch.enable_grad():  # a weighting, which may be the first to ask, runs without gradients
            return given.stack(self.losses)

    def shares(self) -> Tensor | None:
        """What each sample counts for in its task's mean."""
        return given.shares(self.stacked, list(self.losses), self.step.masks) if self.means is None else self.means

    def gradients(self, coefficients: Tensor | None) -> Rows:
        """Over the shared parameters; over the heads too, where the step is the weighted sum of these rows."""
        step = self.step
        shared = step.shared_for("gradients")
        step.expect_real(shared)
        final = coefficients is None and step.settings.writes != "sample" and not step.retain_graph
        # The graph is needed again only if the step is an ordinary backward, or alignments are still to come.
        later = Needs.ALIGNMENT in step.settings.weighting.needs and self.aligned is None
        keep = not final or step.keep_graph or later
        return self._measured(shared, coefficients, step.settings.gradient_engine, heads=final, keep=keep)

    def gramian_of_features(self, coefficients: Tensor | None) -> Tensor | None:
        """The Gramian at the shared representation."""
        step = self.step
        if not self.points or not features.reach(self.losses, self.points, step.shared or [], step.settings.called):
            return None
        return self._measured([*self.points], coefficients, "features", heads=False, keep=True).gramian

    @torch.enable_grad()  # weightings run without gradients, measuring needs them
    def _measured(
        self, inputs: list[Tensor], coefficients: Tensor | None, engine: str, *, heads: bool, keep: bool
    ) -> Rows:
        step = self.step
        if coefficients is None and (step.masks or self.means is not None):
            coefficients = self.shares()
        # In float32 at least, so that their coefficients are not rounded to less.
        totals = Totals([wide(loss) for loss in self.losses.values()], coefficients)
        known = {id(p) for p in [*inputs, *step.outer]}
        rest = [p for p in totals.graph.leaves if id(p) not in known] if heads else []
        with step.measuring():
            try:
                rows = measure.jacobian(
                    engine, totals, inputs, rest, step.draft.trust, whole=step.reads_jacobian, keep=keep
                )
            except RuntimeError as error:
                explain(error)  # gradients that are read too late
                raise
        if not keep and step.draft.trust.ran[-1] == engine == "rows":
            mark_freed(totals.graph)
        return rows

    def alignments(self) -> dict[str, Tensor]:
        """``<∇ℓ, g_ref>`` by task; the graph is kept."""
        if self.aligned is None:
            assert self.reference is not None
            step, reference = self.step, self.reference()
            parameters, tangents = reference.scope(self.losses)
            engine = step.settings.alignment_engine
            engine = "pullback" if engine in ("auto", "forward") else engine
            with torch.enable_grad(), step.measuring():
                losses = [wide(loss) for loss in self.losses.values()]
                found = measure.alignments(
                    engine, losses, parameters, tangents, step.draft.trust, has_float16=reference.has_float16
                )
            self.aligned = dict(zip(self.losses, found, strict=True))
        return self.aligned

    def scalar(self, weights: Tensor, writes: Level, rows: Rows | None) -> Tensor:
        """The scalar whose backward is the weighted step."""
        means = self.shares()
        plain = self.stacked if means is None else means.to(self.stacked.dtype) * self.stacked
        value = plain.detach().sum()
        if rows is not None:
            return rows.combined(value, weights, writes, self.step.settings.heads)
        terms = self.stacked if writes == "sample" else plain
        weighted = (weights.to(terms.dtype).view(len(terms), -1) * terms.view(len(terms), -1)).sum()
        if self.step.settings.heads == "weighted" and not self.step.outer:
            weighted.detach().copy_(value)  # only the graph of the weighted sum is of use
            return weighted
        sums = Graph([weighted, plain.sum()])  # no one sum has the step's gradients
        pairs = self.step_gradients(sums)
        if not self.step.keep_graph:
            mark_freed(sums)
        return inject_known(value, pairs)

    def step_gradients(self, sums: Graph) -> Pairs:
        """The gradient of each parameter that learns from the losses.

        Args:
            sums: of the weighted losses, and of the plain ones, which unweighted heads get the gradient of.
        """
        step, (weighted, plain) = self.step, sums.outputs
        inner = [p for p in sums.leaves if all(p is not other for other in step.outer)]
        heads: list[Tensor] = []
        if step.settings.heads == "unweighted":
            shared = {id(p) for p in step.shared_for("shared parameters")}
            heads = [p for p in inner if id(p) not in shared]
            inner = [p for p in inner if id(p) in shared]
        with step.measuring():
            first = gradient(weighted, inner, graph=sums, keep_graph=step.keep_graph or bool(heads))
            second = gradient(plain, heads, graph=sums, keep_graph=step.keep_graph)
        return [*zip(inner, first, strict=True), *zip(heads, second, strict=True)]

    def penalty(self, objective: Callable[[Source], Tensor]) -> Tensor | None:
        """An objective of the losses."""
        return objective(self)

    def idle(self) -> Tensor:
        """Zero, with a backward that adds zeros to all parameters."""
        return self.step.idle()
