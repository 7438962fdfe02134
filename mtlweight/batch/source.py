"""What a batch's losses come from: the one protocol of the three kinds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from mtlweight._weighting import Level
from mtlweight.batch.reference import Reference
from mtlweight.batch.step import Step
from mtlweight.engines.jacobian import Rows

Losses: TypeAlias = Mapping[str, Tensor]
"""One ``[b]`` or scalar tensor a task."""


class Source(Protocol):
    """The losses of a batch, wherever their graphs are, and what can be measured of them."""

    @property
    def step(self) -> Step:
        """What was known before."""

    @property
    def losses(self) -> Losses:
        """The present tasks'."""

    @property
    def device(self) -> torch.device:
        """Where statistics are."""

    @property
    def own(self) -> slice | None:
        """This process's columns of the losses per sample, if other processes have the others."""

    @property
    def reference(self) -> Callable[[], Reference] | None:
        """What gradients are compared with, evaluated when it is first asked for; ``None`` if none was given."""

    @property
    def aligned(self) -> dict[str, Tensor] | None:
        """The alignments, if they are known already."""

    def shares(self) -> Tensor | None:
        """What each sample counts for in its task's mean, ``[m, b]``; ``None`` for scalars."""

    def gradients(self, coefficients: Tensor | None) -> Rows:
        """Over the shared parameters: of the tasks' means, or of totals with coefficients ``[m, b]``."""

    def gramian_of_features(self, coefficients: Tensor | None) -> Tensor | None:
        """The Gramian at the shared representation, if there is one."""

    def alignments(self) -> dict[str, Tensor]:
        """``<∇ℓ, g_ref>`` by task, of the losses' shape."""

    def scalar(self, weights: Tensor, writes: Level, rows: Rows | None) -> Tensor:
        """The scalar whose backward is the weighted step, and whose value is the plain sum of the tasks' losses.

        Args:
            weights: as ``writes`` says.
            writes: their level.
            rows: from :meth:`gradients`, if the step is their weighted sum; else ``None``.
        """

    def penalty(self, objective: Callable[[Source], Tensor]) -> Tensor | None:
        """An objective of the losses that this process has the graph of. Its gradient joins the step."""

    def idle(self) -> Tensor:
        """Zero, with a backward that adds zeros."""

    def without(self, tasks: Sequence[str]) -> Source:
        """The same as if these tasks were absent; what was measured of the others is kept."""
