"""The reference objective, and its gradient, with which those of the losses are compared."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtlweight._errors import MTLWeightError, NonFiniteError
from mtlweight._statistics import all_finite, statistics_dtype
from mtlweight._weighting import ReferenceUse
from mtlweight.autograd.gradients import gradient
from mtlweight.autograd.graph import Graph
from mtlweight.autograd.half_precision import dense, wide
from mtlweight.batch.losses import REDUCE, deferred
from mtlweight.batch.step import Step


class Reference:
    """The gradient of the reference objective.

    Args:
        objective: the reference as the user gave it; of several objectives one is evaluated at a time.
        step: says over which parameters.

    Attributes:
        parameters: those over which gradients are compared.
        tangents: the gradient over these.
        objective: its value; with ``retain_graph`` it keeps its graph.
        by_name: whether it was given by name of the main tasks.
        has_float16: whether the gradient passed through float16.
        learned: parameters with what ``ReferenceUse.learn`` lets them learn.
        outer: the outer parameters with their gradient.
    """

    def __init__(self, objective: Any, step: Step) -> None:
        self.step, self.use = step, step.reference_use or ReferenceUse()
        self.objective, self.has_float16 = torch.zeros(()), False
        trainable = {id(p) for p in step.trainable}
        outer = {id(p) for p in step.outer}
        shared: set[int] = set()
        if step.reference_use is not None or step.compares:  # else the outer parameters alone learn
            shared = trainable if self.use.scope == "all" else {id(p) for p in step.shared_for("the alignment")}
        compared = shared | trainable if self.use.scope == "main" and shared else shared
        own: dict[Tensor, Tensor] = {}

        def gradients() -> dict[Tensor, Tensor]:
            def add(share: float, loss: Tensor) -> None:
                self._add(own, share, loss, compared | outer)

            with torch.enable_grad():  # a weighting, which may be the first to ask, runs without gradients
                self.by_name = visit(objective, add, self.use.main)
            return own

        if step.processes is None:
            self._total = gradients()
        else:  # the parameters get their own, for whoever averages gradients, and all compare with the mean
            every = dict.fromkeys([*step.trainable, *(step.shared or []), *step.outer])
            taken = [p for p in every if id(p) in compared or id(p) in outer]
            self._total = step.processes.averaged(gradients, taken)
        self.outer = [(p, g) for p, g in own.items() if id(p) in outer]
        self.learned = [(p, self.use.learn * g) for p, g in own.items() if self.use.learn and id(p) not in outer]
        self.parameters = [p for p in self._total if id(p) in compared]
        self.tangents = [self._total[p] for p in self.parameters]
        step.expect_real(self.parameters)
        if shared and not any(id(p) in shared for p in self.parameters):
            wanting, through = (
                ("parameter of the optimizer", "with the optimizer's")
                if self.use.scope == "all"
                else ("shared parameter", "through the shared")
            )
            raise MTLWeightError(
                f"No {wanting} is in the reference's graph: expected the reference to be computed {through} "
                "parameters, found other parameters only. Use the same model for losses and reference."
            )
        if outer and not any(id(p) in outer for p in self._total):
            raise MTLWeightError(
                "No parameter of outer=... is in the reference's graph: expected the reference to be computed with the "
                "outer parameters, found others only. Use the same model for losses and reference."
            )
        if self.use.ema:
            self.tangents = self._averaged(self.use.ema)
        if self.use.unit:
            dtype = statistics_dtype(self.tangents[0].device)  # squares of small numbers are 0 in float32
            norm = torch.stack([torch.linalg.vector_norm(g, dtype=dtype) for g in self.tangents]).norm()
            self.tangents = [g / torch.where(norm > 0, norm, 1.0).to(g.dtype) for g in self.tangents]

    def _add(self, total: dict[Tensor, Tensor], share: float, loss: Tensor, allowed: set[int]) -> None:
        """Adds the gradient of one scalar."""
        graph = Graph([loss])
        value = share * wide(loss if self.step.retain_graph else loss.detach())
        self.objective = self.objective.to(value) + value
        self.has_float16 |= graph.has_float16
        wanted = [p for p in graph.leaves if self.use.learn or id(p) in allowed]
        # Functions that hide their parameters have data in their place that require grad: seen if they run.
        data = [x for x in graph.leaves if not isinstance(x, torch.nn.Parameter) and all(x is not p for p in wanted)]
        with self.step.measuring():
            # The graph is kept: it may be shared with the losses. And a compiled model whose first backward may free
            # the graph refuses later ones that keep it, which the rows need.
            found = gradient(loss, [*wanted, *data], graph=graph, keep_graph=True)
        for p, g in zip(wanted, found, strict=False):
            if g is not None:
                term = wide(dense(g)) if share == 1 else share * wide(dense(g))
                total[p] = total[p] + term if p in total else term

    def expect_finite(self) -> None:
        """Raises if the reference is to blame for an alignment that is not finite."""
        pairs = [*zip(self.parameters, self.tangents, strict=True), *self._total.items()]
        if not all_finite([g for _, g in pairs]):
            bad = next(p for p, g in pairs if not g.isfinite().all())
            raise NonFiniteError(
                "The gradient of the reference is not finite: expected finite numbers, found NaN or infinity for "
                f"{self.step.settings.called(bad)}. Look at the held-out batch and its loss."
            )

    def _averaged(self, decay: float) -> list[Tensor]:
        """``v ← decay·v + (1 - decay)·g`` for each parameter, by its position; the first gradient starts it."""
        step = self.step
        every = dict.fromkeys([*step.settings.parameters, *(step.shared or [])])
        names = {p: str(k) for k, p in enumerate(every)}
        known: Any = step.draft.memory.get("reference", {})
        averages = {}
        for p, g in zip(self.parameters, self.tangents, strict=True):
            old = known.get(names[p])
            averages[names[p]] = g if old is None else decay * old.to(g) + (1 - decay) * g
        step.draft.memory["reference"] = {**known, **averages}
        return [*averages.values()]

    def scope(self, losses: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters and tangents in the weighting's scope; ``"main"`` is what a main task's loss reaches, too.

        Args:
            losses: the tasks', with their graph.
        """
        if self.use.scope != "main":
            return self.parameters, self.tangents
        reached = Graph(losses[task] for task in self.use.main if task in losses).leaves
        allowed = {id(p) for p in (*(self.step.shared or []), *reached)}
        places = [k for k, p in enumerate(self.parameters) if id(p) in allowed]
        return [self.parameters[k] for k in places], [self.tangents[k] for k in places]


def visit(reference: Any, each: Callable[[float, Tensor], None], mains: Sequence[str] = (), share: float = 1.0) -> bool:
    """Evaluates the scalars that a reference consists of, one after the other.

    Args:
        reference: a scalar or ``[b]`` tensor; a list of references, which are averaged; a mapping from main task to
            reference, which are added up; or a callable that returns one of these.
        each: called with the share of a scalar, and the scalar, before the next one is evaluated.
        mains: the tasks that a mapping must name.
        share: the share of all of it.

    Returns:
        bool: whether all of it was given by name.

    Raises:
        MTLWeightError: if it is anything else.
    """
    if deferred(reference) and callable(reference):
        reference = reference()
    if isinstance(reference, Mapping):
        if {*mains} != {*reference}:
            raise MTLWeightError(
                f"Expected a reference for each main task, {', '.join(mains) or 'of which there are none'}; found "
                f"{', '.join(map(str, reference)) or 'an empty mapping'}. Name the same tasks in the weighting's main "
                "and in the reference."
            )
        for part in reference.values():
            visit(part, each, mains, share)
        return True
    if isinstance(reference, (list, tuple)) and reference:
        named = [visit(part, each, mains, share / len(reference)) for part in reference]
        return all(named)
    each(share, scalar(reference))
    return False


def scalar(reference: Any) -> Tensor:
    """The reference objective as a scalar with a graph; a ``[b]`` tensor is averaged.

    Raises:
        MTLWeightError: if it is anything else.
    """
    if not isinstance(reference, Tensor) or reference.ndim > 1 or reference.numel() == 0:
        found = list(reference.shape) if isinstance(reference, Tensor) else type(reference).__name__
        raise MTLWeightError(
            f"Expected the reference as a scalar or [b] tensor, or a callable that returns one; found {found}. Pass "
            "the main task's loss on held-out data; several in a list, or in a mapping by main task."
            + (f" {REDUCE}." if isinstance(reference, Tensor) and reference.ndim > 1 else "")
        )
    if not reference.requires_grad:
        raise MTLWeightError(
            "The reference has no graph: expected a tensor that requires grad, found a constant. Compute it with "
            "gradients enabled."
        )
    return reference.mean()
