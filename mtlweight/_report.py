"""What the last committed step did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)  # tensors do not compare to one truth
class Report:
    """What the last committed step did: one place for logs and pictures.

    Tensors stay on their device until they are read; the dictionaries by task name copy them to the host.

    Attributes:
        step: number of committed steps.
        tasks: tasks present in the step, in the order of the tensors' rows.
        losses: ``[m]`` or ``[m, b]``.
        shares: ``[m, b]``, what each sample counts for in its task's mean, 0 if it has no label; ``None`` for ``[m]``.
        weights: ``[m]``, ``[m, b]`` or ``[m, n]``.
        writes: which of these: ``"task"``, ``"sample"`` or ``"entry"``.
        objective: the weighted losses added up, ``Σ w ℓ``, without a penalty or what a reference teaches; ``None`` for
            weights per gradient entry, which are the gradient of no objective.
        gramian: ``[m, m]`` inner products of the tasks' gradients, if they were measured.
        alignment: ``[m]`` or ``[m, b]`` inner products with the reference's gradient, if they were measured.
        own: of several processes that weigh their batches as one, the columns of this one's samples in the tensors
            above; ``None`` for one process, which has them all, and for scalar losses.
        earlier: of micro-batches that are each weighed by themselves, the report of the one before that which this is
            of; it has that of the one before it in turn.
        engine: what measured them: names joined by ``+``.
        notes: what the weightings noted, such as a solver's residual; and, if the Gramian was measured,
            ``zero_gradient``, ``[m]``: which tasks' gradients over the shared parameters are exactly 0.
        skipped: number of steps that were skipped so far (non-finite values, or no task present).
        dropped: how often each task was dropped from a batch so far because it was not finite.
        fallbacks: how often each engine's fallback was taken so far, with its cause.
        uncommitted: how often so far gradients were computed with weights that no :meth:`step` committed, because
            another ``combine`` came first or the wrapped optimizer was stepped behind this one.
    """

    step: int = 0
    tasks: tuple[str, ...] = ()
    losses: Tensor | None = None
    shares: Tensor | None = None
    weights: Tensor | None = None
    writes: str = "task"
    objective: Tensor | None = None
    gramian: Tensor | None = None
    alignment: Tensor | None = None
    own: slice | None = None
    earlier: Report | None = None
    engine: str = ""
    notes: Mapping[str, Tensor] = field(default_factory=dict)
    skipped: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    fallbacks: Mapping[str, int] = field(default_factory=dict)
    uncommitted: int = 0

    @property
    def task_losses(self) -> dict[str, float]:
        """Each task's loss; the mean over its samples."""
        losses = self.losses
        return self._named(losses if losses is None or self.shares is None else (self.shares * losses).sum(dim=1))

    @property
    def task_weights(self) -> dict[str, float]:
        """Each task's weight: the sum over its samples, or the mean over gradient entries."""
        weights = self.weights
        if weights is not None and self.writes != "task":
            weights = weights.sum(dim=1) if self.writes == "sample" else weights.mean(dim=1)
        return self._named(weights)

    @property
    def norms(self) -> dict[str, float]:
        """Norm of each task's gradient over the shared parameters; empty if not measured."""
        return self._named(None if self.gramian is None else self.gramian.diagonal().sqrt())

    @property
    def cosines(self) -> Tensor | None:
        """Cosines between the tasks' gradients, ``[m, m]``; 0 where a gradient is 0; ``None`` if not measured."""
        if self.gramian is None:
            return None
        norms = self.gramian.diagonal().sqrt()
        scale = torch.where(norms > 0, 1 / norms, 0.0)
        return scale[:, None] * self.gramian * scale

    def _named(self, values: Tensor | None) -> dict[str, float]:
        return {} if values is None else dict(zip(self.tasks, values.tolist(), strict=True))
