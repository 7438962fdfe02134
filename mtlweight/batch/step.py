"""What belongs to one step: what is known before its losses are, and what reading them finds out."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight._statistics import tensors_of
from mtlweight._view import Needs, Source, State, View
from mtlweight._weighting import ReferenceUse
from mtlweight.autograd.inject import inject_known
from mtlweight.autograd.replay import uncompiled
from mtlweight.autograd.untouched import untouched
from mtlweight.batch import losses as given
from mtlweight.batch.nonfinite import Hidden
from mtlweight.batch.parameters import parameters
from mtlweight.batch.settings import Settings
from mtlweight.distributed.processes import Processes
from mtlweight.distributed.sharded import expect_whole
from mtlweight.engines.trust import Trust


@dataclass
class Draft:
    """What reading the losses of a step finds out. The step is committed with it, or it is thrown away.

    Args:
        tasks: those that have a place, in order. What the step mentions anew joins at the end.
        seed: of the weighting's random numbers, if it is decided.
        memory: what is kept from step to step beside the weighting's state.
        trust: what is known of the engines.
        hidden: what the masks hide, for messages.
    """

    tasks: list[str]
    seed: int | None
    memory: dict[str, Any]
    trust: Trust
    hidden: Hidden


@dataclass(frozen=True)
class Step:
    """What is known of a step before its losses are.

    Args:
        settings: of the optimizer.
        number: how many steps were committed before.
        needs: what the weighting reads.
        state: the weighting's.
        mask: which samples have a label, as the user gave it.
        retain_graph: whether the step's backward goes through the losses' own graph, with the weights as constants.
        outer: parameters that learn from the reference instead of the losses.
        processes: those whose batches count as one, if there are several.
        stamp: what must be the same in all of them, by name.
        draft: what reading finds out.
    """

    settings: Settings
    number: int
    needs: Needs
    state: State | None
    mask: Any
    retain_graph: bool
    outer: list[Tensor]
    processes: Processes | None
    stamp: Mapping[str, Any]
    draft: Draft

    @property
    def reference_use(self) -> ReferenceUse | None:
        """How the weighting uses the reference."""
        return self.settings.weighting.reference

    @property
    def compares(self) -> bool:
        """Whether the weighting announced that it compares gradients with the reference's at this step."""
        return Needs.ALIGNMENT in self.needs

    @property
    def reads_jacobian(self) -> bool:
        """Whether the Jacobian itself is read, and not only its Gramian."""
        return Needs.JACOBIAN in self.needs or self.settings.writes == "entry"

    @property
    def keep_graph(self) -> bool:
        """Whether the losses' graph is needed after the measurements."""
        return self.settings.penalty is not None or self.retain_graph

    def uncompiled(self, losses: Any, reference: Any) -> Any:
        """The losses, without compiled code where forward or second derivatives of them may be taken.

        Args:
            losses: as the user gave them.
            reference: as the user gave it.
        """
        known = reference is not None or self.processes is not None  # where others have one, it is an error here
        twice = self.settings.alignment_engine in ("auto", "forward", "pullback")
        return uncompiled(losses) if known and self.compares and twice else losses

    def view(self, source: Source) -> View:
        """The view of a batch."""
        return View(source, step=self.number, seed=self.draft.seed)

    def named(self, losses: Any, *, graph: bool = True) -> dict[str, Tensor]:
        """The present tasks' losses by name, 0 where there is no label; other processes may have labels of a task.

        What they mention has a place from then on.
        """
        empty = self.processes is not None
        found, self.draft.tasks = given.named(
            losses, self.draft.tasks, graph=graph, masks=self.masks, empty=empty, hidden=self.draft.hidden
        )
        return found

    @functools.cached_property
    def masks(self) -> dict[str, Tensor]:
        """Which samples have a label, by task."""
        return given.masks(self.mask)

    def labelled(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Which samples of these tasks have a label."""
        everyone = {t: torch.ones_like(loss, dtype=torch.bool) for t, loss in losses.items()}
        return {t: self.masks.get(t, mask).to(mask.device) for t, mask in everyone.items()}

    def split(self, count: int) -> list[Step]:
        """The step of each part of a batch whose losses come in parts. Each gives tasks places of its own.

        Raises:
            MTLWeightError: if there is not one mask a part.
        """
        masks = [None] * count if self.mask is None else self.mask
        if not isinstance(masks, (list, tuple)) or len(masks) != count or not count:
            raise MTLWeightError(
                f"Losses in parts are masked in parts: expected a list of {max(count, 1)} masks (or none) beside as "
                f"many callables, found {type(masks).__name__} beside {count}. Pass one mask a part."
            )
        return [replace(self, mask=mask, draft=replace(self.draft, tasks=[*self.draft.tasks])) for mask in masks]

    @functools.cached_property
    def shared(self) -> list[Tensor] | None:
        """The shared parameters that require grad; ``None`` if none were named."""
        return None if self.settings.shared is None else parameters(self.settings.shared, without=self.outer)

    @functools.cached_property
    def trainable(self) -> list[Tensor]:
        """The optimizer's parameters that require grad."""
        return [p for p in self.settings.parameters if p.requires_grad]

    def shared_for(self, what: str) -> list[Tensor]:
        """The shared parameters, or an error that says who needs them."""
        name = self.settings.name
        if self.shared is None:
            raise MTLWeightError(
                f"{name} reads {what}, but no shared parameters are known: expected shared=... in "
                "MultiTaskOptimizer, found None. Pass parameters, a module, or several modules."
            )
        if not self.shared:
            raise MTLWeightError(
                f"{name} reads {what}, but no shared parameter requires grad: expected at least one, found none. "
                "Unfreeze some."
            )
        expect_whole(self.trainable, f"{name} reads {what}")
        return self.shared

    def expect_real(self, parameters: Iterable[Tensor]) -> None:
        """Raises if gradients of a complex parameter would be compared."""
        for p in parameters:
            if p.is_complex():
                raise MTLWeightError(
                    f"{self.settings.name} compares gradients: expected real parameters, found "
                    f"{self.settings.called(p)}, which is complex. Keep its real and imaginary parts in a real "
                    "parameter of shape [..., 2], and use torch.view_as_complex(parameter)."
                )

    def expect_columns(self, inputs: list[Tensor]) -> None:
        """Raises if the Jacobian's columns are other ones than those that the weighting's state is about."""
        place = {id(p): k for k, p in enumerate(self.settings.parameters)}
        now = torch.tensor([[place.get(id(p), -1), p.numel()] for p in inputs], device="cpu")
        known = self.draft.memory.setdefault("columns", now).cpu()  # loaded, it may be anywhere
        if torch.equal(known, now):
            return
        before, n = (int(columns[:, 1].sum()) for columns in (known, now))
        if any(tensor.ndim and tensor.shape[-1] == before for tensor in tensors_of(self.state or {})):
            raise MTLWeightError(
                f"{self.settings.name} remembers a number for each entry of the shared parameters' gradients: expected "
                f"the parameters of the steps before, with {before} entries, found others, with {n}. Do not freeze, "
                "thaw or add shared parameters in mid-training; or wrap the optimizer anew, which starts the weighting "
                "afresh."
            )
        self.draft.memory["columns"] = now

    def measuring(self) -> contextlib.AbstractContextManager[None]:
        """Within the context backwards measure: afterwards gradients and buffers are as they were."""
        named = [p for module in self.settings.modules for p in module.parameters()]
        watched = dict.fromkeys([*self.trainable, *(self.shared or []), *self.outer, *named])
        return untouched([*watched], self.settings.called)

    def idle(self) -> Tensor:
        """Zero, with a backward that adds zeros: for a step that is skipped, and scalers that look for gradients."""
        value = torch.zeros((), device=self.trainable[0].device if self.trainable else None)
        return inject_known(value, [(p, torch.zeros_like(p)) for p in self.trainable])
