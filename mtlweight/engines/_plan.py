"""What an engine has to know before a batch."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mtlweight._errors import MTLWeightError
from mtlweight._statistics import tensors_of
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Level, ReferenceUse, Weighting
from mtlweight.engines import _losses, features
from mtlweight.engines._blame import Hidden
from mtlweight.engines._confirm import due, suspect
from mtlweight.engines._parts import called
from mtlweight.engines._processes import Processes, expect_whole
from mtlweight.engines._untouched import untouched

if TYPE_CHECKING:
    from mtlweight.engines._batch import Batch

GRADIENT_ENGINES = ("rows", "batched", "features", "samples")
ALIGNMENT_ENGINES = ("forward", "pullback", "samples", "rows")
ENGINES = ("auto", "rows", "batched", "features", "forward", "pullback", "samples")


@dataclass
class Agreed:
    """What all evaluations of a step, all parts of its batch and all processes agree on while they read it.

    Args:
        tasks: those that have a place, in order. What the step mentions anew joins at the end.
        seed: of the weighting's random numbers, if it is decided.
    """

    tasks: list[str]
    seed: int | None

    @classmethod
    def of(cls, tasks: Sequence[str], seed: int | None, processes: Processes | None) -> Agreed:
        """Before the step is read. Several processes tell each other their seeds first; dynamo cannot ask for one."""
        if seed is None and processes is None:
            seed = torch.initial_seed()
        return cls([*tasks], seed)


@dataclass
class Plan:
    """What an engine has to know before a batch.

    Args:
        weighting: the weighting, for messages.
        use: how the weighting uses the reference.
        needs: what will be read at this step.
        engine: one of :data:`ENGINES`.
        heads: ``"weighted"`` or ``"unweighted"``.
        list_shared: lists the shared parameters that require grad; ``None`` if none were named. Called once at
            most: only where something reads gradients.
        outer: parameters that learn from the reference instead of the losses.
        penalised: whether there is a penalty.
        ordinary: whether the step's backward goes through the losses' own graph, with the weights as constants.
        optimizer: the wrapped optimizer, which may be asked for a step ahead.
        modules: modules that the user named and whose parameters the forward engine may swap.
        capture: records the shared representation, for the features engine.
        agreed: places of tasks, and the seed.
        mask: which samples have a label, as the user gave it.
        hidden: what the masks hide, for messages; it is filled as losses come.
        memory: what engines keep from step to step: a copy of the committed one, which becomes the next.
        state: the weighting's committed state.
        view: the view of a batch.
        processes: those whose batches count as one, if there are several.
        stamp: what is the same in all of them, by name.
        broken: engines that have fallen back before, with the cause.
        uses: how often each engine has measured, and was confirmed with each operator.
        warn: called with an engine's name and the cause at each fallback; with ``wholly=False`` where the engine is not
            given up.
        used: the engines that have measured something in this step.
        as_written: whether the losses run without compiled code in this step.
    """

    weighting: Weighting
    use: ReferenceUse | None
    needs: Needs
    engine: str
    heads: str
    list_shared: Callable[[], list[Tensor] | None]
    outer: list[Tensor]
    penalised: bool
    ordinary: bool
    optimizer: Optimizer
    modules: list[nn.Module]
    capture: features.Capture | None
    agreed: Agreed
    mask: Any
    hidden: Hidden
    memory: dict[str, Any]
    state: State | None
    view: Callable[[Batch], View]
    processes: Processes | None
    stamp: Mapping[str, Any]
    broken: Mapping[str, str]
    uses: Counter[str]
    warn: Callable[..., None]
    used: list[str] = field(default_factory=list)
    as_written: bool = False

    @property
    def keep_graph(self) -> bool:
        """Whether the losses' graph is needed after the measurements."""
        return self.penalised or self.ordinary

    @property
    def tasks(self) -> list[str]:
        """The tasks that have a place, in order."""
        return self.agreed.tasks

    @property
    def name(self) -> str:
        """What messages call the weighting."""
        text = repr(self.weighting)
        return text if hasattr(self.weighting, "parts") else text.split("(")[0]

    @property
    def writes(self) -> Level:
        """The level of the weights."""
        return self.weighting.writes

    @functools.cached_property
    def masks(self) -> dict[str, Tensor]:
        """Which samples have a label, by task."""
        return _losses.masks(self.mask)

    def split(self, count: int) -> list[Plan]:
        """The plan of each part of a batch whose losses come in parts.

        Raises:
            MTLWeightError: if there is not one mask a part.
        """
        masks = [None] * count if self.mask is None else self.mask
        if not isinstance(masks, (list, tuple)) or len(masks) != count or not count:
            raise MTLWeightError(
                f"Losses in parts are masked in parts: expected a list of {max(count, 1)} masks (or none) beside as "
                f"many callables, found {type(masks).__name__} beside {count}. Pass one mask a part."
            )
        return [replace(self, mask=mask, agreed=replace(self.agreed, tasks=[*self.tasks])) for mask in masks]

    def labelled(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Which samples of these tasks have a label."""
        everyone = {t: torch.ones_like(loss, dtype=torch.bool) for t, loss in losses.items()}
        return {t: self.masks.get(t, mask).to(mask.device) for t, mask in everyone.items()}

    def named(self, losses: Any, *, graph: bool = True) -> dict[str, Tensor]:
        """The present tasks' losses by name, 0 where there is no label; other processes may have labels of a task.

        What they mention has a place from then on.
        """
        found, self.agreed.tasks = _losses.named(
            losses,
            self.tasks,
            graph=graph,
            masks=self.masks,
            empty=self.processes is not None,
            hidden=self.hidden,
        )
        return found

    @functools.cached_property
    def shared(self) -> list[Tensor] | None:
        """The shared parameters that require grad; ``None`` if none were named."""
        return self.list_shared()

    @functools.cached_property
    def trainable(self) -> list[Tensor]:
        """The optimizer's parameters that require grad."""
        return [p for p in self.every if p.requires_grad]

    @property
    def every(self) -> list[Tensor]:
        """The optimizer's parameters, frozen ones too."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def expect_columns(self, inputs: list[Tensor]) -> None:
        """Raises if the Jacobian's columns are other ones than those that the weighting's state is about."""
        place = {id(p): k for k, p in enumerate(self.every)}
        now = torch.tensor([[place.get(id(p), -1), p.numel()] for p in inputs], device="cpu")
        known = self.memory.setdefault("columns", now).cpu()  # loaded, it may be anywhere
        if torch.equal(known, now):
            return
        before, n = (int(columns[:, 1].sum()) for columns in (known, now))
        if any(tensor.ndim and tensor.shape[-1] == before for tensor in tensors_of(self.state or {})):
            raise MTLWeightError(
                f"{self.name} remembers a number for each entry of the shared parameters' gradients: expected the "
                f"parameters of the steps before, with {before} entries, found others, with {n}. Do not freeze, thaw "
                "or add shared parameters in mid-training; or wrap the optimizer anew, which starts the weighting "
                "afresh."
            )
        self.memory["columns"] = now

    @property
    def gradient_engine(self) -> str:
        """The engine for Jacobians and Gramians. One backward a row where none was named: see docs/benchmarks.md."""
        return self.engine if self.engine in GRADIENT_ENGINES else "rows"

    @property
    def alignment_engine(self) -> str:
        """The engine for alignments."""
        return self.engine if self.engine in ALIGNMENT_ENGINES else "auto"

    @property
    def follows(self) -> bool:
        """Whether the losses are to be followed along the reference's gradient, by the forward engine."""
        forward = self.alignment_engine in ("auto", "forward") and "forward" not in self.broken
        return forward and self.processes is None

    def confirm(self, engine: str, operators: set[str]) -> bool:
        """Counts a use of the engine, and says whether to confirm what it finds.

        Args:
            engine: its name.
            operators: those in the graph. One that is new to the engine is a reason, so that a rare branch is confirmed
                when it first appears.
        """
        self.uses[engine] += 1
        known = all(f"{engine}: {operator}" in self.uses for operator in operators)
        return due(self.uses[engine]) or not known or suspect(engine, operators)

    def trust(self, engine: str, operators: set[str]) -> None:
        """Counts that the engine was confirmed with these operators."""
        self.uses.update(f"{engine}: {operator}" for operator in operators)

    def measuring(self) -> contextlib.AbstractContextManager[None]:
        """Within the context backwards measure: afterwards gradients and buffers are as they were."""
        parts = {part: None for module in self.modules for part in module.modules()}
        named = [p for part in parts for p in part._parameters.values() if p is not None]
        watched = dict.fromkeys([*self.trainable, *(self.shared or []), *self.outer, *named])
        return untouched([*watched], self.called)

    def called(self, parameter: Tensor) -> str:
        """What messages call a parameter."""
        return called(parameter, self.modules, self.optimizer.param_groups)

    def shared_for(self, what: str) -> list[Tensor]:
        """The shared parameters, or an error that says who needs them."""
        if self.shared is None:
            raise MTLWeightError(
                f"{self.name} reads {what}, but no shared parameters are known: expected shared=... in "
                "MultiTaskOptimizer, found None. Pass parameters, a module, or several modules."
            )
        if not self.shared:
            raise MTLWeightError(
                f"{self.name} reads {what}, but no shared parameter requires grad: expected at least one, found none. "
                "Unfreeze some."
            )
        expect_whole(self.trainable, f"{self.name} reads {what}")
        return self.shared

    def expect_real(self, parameters: Iterable[Tensor]) -> None:
        """Raises if gradients of a complex parameter would be compared."""
        for p in parameters:
            if p.is_complex():
                raise MTLWeightError(
                    f"{self.name} compares gradients: expected real parameters, found {self.called(p)}, which is "
                    "complex. Keep its real and imaginary parts in a real parameter of shape [..., 2], and use "
                    "torch.view_as_complex(parameter)."
                )
