"""Several processes with one model: what they tell each other, so that their batches count as one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mtlweight._errors import MTLWeightError, NonFiniteError
from mtlweight._statistics import statistics_dtype
from mtlweight.engines import _losses

if TYPE_CHECKING:
    from mtlweight.engines._plan import Plan

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """A process group by its name, so that optimizers that hold one can be copied and pickled.

    Everything that could go wrong in one process alone happens inside an exchange, which then raises in all of them: no
    process waits for one that has given up.

    Args:
        name: the group's; ``None`` is the default group, of all processes.
    """

    name: str | None = None

    @classmethod
    def of(cls, group: Any) -> Processes | None:
        """From what the user gave: a process group, ``"default"``, or ``None`` for each process by itself.

        Raises:
            MTLWeightError: if it is anything else, or a group that this process is not in.
        """
        if group is None or group == "default":
            return None if group is None else cls()
        if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
            raise MTLWeightError(
                "MultiTaskOptimizer: expected process_group to be a torch.distributed.ProcessGroup that this process "
                f"is in, 'default' or None; found {type(group).__name__}. Choose one."
            )
        return cls(group.group_name)

    @property
    def active(self) -> Processes | None:
        """Itself if there are several processes, else ``None``: a single one has nobody to ask."""
        if not dist.is_available() or not dist.is_initialized():
            return None
        return self if self.count > 1 else None

    @property
    def group(self) -> Any:
        """The group itself."""
        if self.name is None:
            return dist.group.WORLD
        try:
            return torch._C._distributed_c10d._resolve_process_group(self.name)  # type: ignore[arg-type]  # a str type
        except (RuntimeError, ValueError) as error:
            raise MTLWeightError(
                f"The optimizer was copied from a process with another process group: expected one named {self.name!r} "
                "here, found none. Make the groups in the same order, or a new MultiTaskOptimizer."
            ) from error

    @property
    def count(self) -> int:
        """How many processes."""
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """Which of them this is."""
        return dist.get_rank(self.group)

    def told(self, work: Callable[[], T], tell: Callable[[T], Any]) -> tuple[T, list[Any]]:
        """The result of this process's work, and what each process tells of its own.

        Raises:
            MTLWeightError: if another process's work failed; a ``NonFiniteError`` if it failed with one. If its own
                failed, that error.
        """
        failure: Exception | None = None
        message: tuple[str | None, bool, Any] = None, False, None
        try:
            result = work()
            message = None, False, tell(result)
        except Exception as error:  # whatever it is, the others wait for an answer
            failure = error
            message = f"{type(error).__name__}: {error}", isinstance(error, NonFiniteError), None
        messages: list[Any] = [None] * self.count
        dist.all_gather_object(messages, message, group=self.group)
        if failure is not None:
            raise failure
        for rank, (text, not_finite, _) in enumerate(messages):
            if text is not None:
                kind = NonFiniteError if not_finite else MTLWeightError
                raise kind(
                    f"Process {rank} could not do its part, so that none takes the step: expected all to succeed, "
                    f"found {text}"
                )
        return result, [said for _, _, said in messages]

    def total(self, fill: Callable[[Tensor], None], like: Tensor) -> Tensor:
        """The sum over the processes of the vectors that they write, the same bits in each.

        Args:
            fill: writes into zeros.
            like: their shape, dtype and device.

        Raises:
            MTLWeightError: if ``fill`` raised in another process; if here, that error.
        """
        vector, failure = self._filled(fill, like)
        dist.all_reduce(vector, group=self.group)
        self._expect_success(bool(vector[-1] > 0), failure)
        return vector[:-1].view(like.shape)

    def gathered(self, fill: Callable[[Tensor], None], like: Tensor) -> list[Tensor]:
        """What each process writes. Arguments and errors are those of :meth:`total`."""
        vector, failure = self._filled(fill, like)
        found = [torch.empty_like(vector) for _ in range(self.count)]
        dist.all_gather(found, vector, group=self.group)
        self._expect_success(bool(torch.stack([each[-1] for each in found]).any()), failure)
        return [each[:-1].view(like.shape) for each in found]

    @staticmethod
    def _filled(fill: Callable[[Tensor], None], like: Tensor) -> tuple[Tensor, Exception | None]:
        vector = torch.zeros(like.numel() + 1, dtype=like.dtype, device=like.device)  # the last number says: failed
        try:
            fill(vector[:-1].view(like.shape))
        except Exception as error:  # whatever it is, the others wait for an answer
            vector.zero_()[-1] = 1
            return vector, error
        return vector, None

    @staticmethod
    def _expect_success(failed: bool, failure: Exception | None) -> None:
        if failure is not None:
            raise failure
        if failed:
            raise MTLWeightError(
                "Another process could not measure its part of the batch, so that none takes the step: expected all to "
                "succeed, found an error there. Look at its message."
            )

    def averaged(
        self, gradients: Callable[[], Mapping[Tensor, Tensor | None]], parameters: Sequence[Tensor]
    ) -> dict[Tensor, Tensor]:
        """The mean over the processes of each parameter's gradient; only of those that one process at least has.

        Args:
            gradients: computes this process's. A parameter that it leaves out counts with zero.
            parameters: the same ones, in the same order, in all processes.
        """
        dtype = torch.float32
        for p in parameters:
            dtype = torch.promote_types(dtype, p.dtype)
        sizes = [p.numel() for p in parameters]
        device = parameters[0].device if parameters else None

        def fill(vector: Tensor) -> None:
            found = gradients()
            *pieces, present = vector.split([*sizes, len(sizes)])
            for k, (p, piece) in enumerate(zip(parameters, pieces, strict=True)):
                gradient = found.get(p)
                if gradient is not None:
                    piece.copy_(gradient.detach().flatten())
                    present[k] = 1

        total = self.total(fill, torch.empty(sum(sizes) + len(sizes), dtype=dtype, device=device))
        *pieces, present = total.split([*sizes, len(sizes)])
        there = (present > 0).tolist()
        return {
            p: (piece / self.count).view(p.shape).to(p.device, torch.promote_types(p.dtype, torch.float32))
            for p, piece, known in zip(parameters, pieces, there, strict=True)
            if known
        }

    def agree(self, fine: bool, parameters: Sequence[Tensor], *, averaged: bool) -> bool:
        """Whether all is fine everywhere; where all processes have the same gradients, they know without asking."""
        if averaged and not sharded(parameters):
            return fine

        def fill(wrong: Tensor) -> None:
            wrong.fill_(not fine)

        return not self.total(fill, torch.empty((), device=parameters[0].device)).item()

    def expect_averaged(self, gradients: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        """Raises, in all processes, unless all have the same gradients: this library leaves their mean to others."""
        if flattened(parameters):
            raise MTLWeightError(
                f"{self.count} processes weigh their batches as one: expected the model in DistributedDataParallel or "
                f"fully_shard, found it in {FSDP1}. Use one of these; or pass process_group=None, and each "
                "process weighs its own batch."
            )
        if sharded(parameters):
            return

        def fill(square: Tensor) -> None:
            square.add_(sum(float(g.detach().double().square().sum()) for g in gradients))

        like = torch.empty((), dtype=statistics_dtype(parameters[0].device), device=parameters[0].device)
        found = torch.stack(self.gathered(fill, like))
        low, high = float(found.min()), float(found.max())
        if high - low > 1e-3 * high:
            raise MTLWeightError(
                f"{self.count} processes weigh their batches as one, and their gradients are to be averaged: expected "
                "the same gradients in all of them after backward, found others in each. Wrap the model in "
                "DistributedDataParallel, without static_graph=True where gradients are measured; or pass "
                "process_group=None, and each weighs its own batch."
            )


class _Said(NamedTuple):
    """What a process tells of itself: ``stamp``, torch's seed, the tasks it has heard of, and what its losses are."""

    stamp: Mapping[str, Any]
    seed: int
    tasks: list[str]
    present: tuple[str, ...]
    size: int | None
    kinds: list[torch.dtype]


@dataclass(frozen=True)
class Layout:
    """Which process has which tasks, and how many samples.

    Args:
        processes: who takes part.
        tasks: of all of them.
        sizes: the number of samples in each; for scalar losses 1.
        present: the tasks that each has.
        per_sample: whether the losses come per sample.
        dtype: of the losses.
        device: of this process.
    """

    processes: Processes
    tasks: tuple[str, ...]
    sizes: tuple[int, ...]
    present: tuple[tuple[str, ...], ...]
    per_sample: bool
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, plan: Plan, work: Callable[[], T], losses: Callable[[T], Mapping[str, Tensor]]) -> tuple[T, Layout]:
        """Computes this process's losses and asks what the others have.

        From then on tasks have the same places in all processes, and where no seed was given it is the first one's.

        Args:
            plan: names the processes, and what must be the same in all of them.
            work: computes the losses.
            losses: takes them from what ``work`` gives.

        Raises:
            MTLWeightError: in all processes, if it failed in one; if their stamps differ; or if losses come per sample
                in some processes alone.
        """
        processes, stamp, seed = plan.processes, plan.stamp, torch.initial_seed()
        assert processes is not None
        device = plan.trainable[0].device if plan.trainable else torch.device("cpu")

        def tell(result: T) -> _Said:
            nonlocal device
            rows = losses(result)
            row = next(iter(rows.values()), None)
            device = device if row is None else row.device
            kinds = [row.dtype for row in rows.values()]
            size = None if row is None or row.ndim == 0 else len(row)
            return _Said(stamp, seed, plan.tasks, tuple(rows), size, kinds)

        result, told = processes.told(work, tell)
        for name, value in stamp.items():
            values = [said.stamp[name] for said in told]
            if any(other != value for other in values):
                raise MTLWeightError(
                    f"The processes take different steps: expected the same {name} in all of them, found "
                    f"{', '.join(dict.fromkeys(map(str, values)))}. Make the optimizers and the calls alike, and load "
                    "a checkpoint in every process."
                )
        agreed = plan.agreed
        agreed.tasks = _losses.placed(stamp["tasks"], [said.tasks for said in told])
        agreed.seed = told[0].seed if agreed.seed is None else agreed.seed
        sizes = [said.size for said in told if said.present]
        if any(size is None for size in sizes) and any(size is not None for size in sizes):
            raise MTLWeightError(
                "Expected losses of one kind in all processes, all scalars or all [b]; found both. Use the same "
                "reduction everywhere."
            )
        dtype = torch.float32
        for kind in (kind for said in told for kind in said.kinds):
            dtype = torch.promote_types(dtype, kind)
        layout = cls(
            processes,
            tuple(task for task in plan.tasks if any(task in said.present for said in told)),
            tuple((1 if said.size is None else said.size) if said.present else 0 for said in told),
            tuple(said.present for said in told),
            any(size is not None for size in sizes),
            dtype,
            device,
        )
        return result, layout

    @property
    def own(self) -> slice:
        """The columns of this process."""
        start = sum(self.sizes[: self.processes.rank])
        return slice(start, start + self.sizes[self.processes.rank])

    def joined(self, *work: Callable[[], Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Values per task, and per sample where losses are: side by side, or their mean over the processes with a task.

        Args:
            work: each gives this process's values; all are sent at once.
        """
        shape = (len(work), len(self.tasks), max([*self.sizes, 1]))

        def fill(values: Tensor) -> None:
            for block, compute in zip(values, work, strict=True):
                for task, row in compute().items():
                    block[self.tasks.index(task), : row.numel()] = row.detach().reshape(-1)

        like = torch.empty(shape, dtype=statistics_dtype(self.device), device=self.device)
        found = self.processes.gathered(fill, like)
        if self.per_sample:
            blocks = torch.cat([each[..., :size] for each, size in zip(found, self.sizes, strict=True)], dim=2)
        else:
            counts = torch.tensor([self.holders(task) for task in self.tasks], dtype=like.dtype, device=self.device)
            blocks = torch.stack(found).sum(dim=0)[..., 0] / counts
        return [dict(zip(self.tasks, block.to(self.dtype).unbind(), strict=True)) for block in blocks]

    def masked(self, losses: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], ...]:
        """The losses of all processes, and which samples have a label; nothing is masked among scalars."""
        present = {task: masks.get(task, torch.ones_like(loss)) for task, loss in losses.items()}
        every, there = self.joined(lambda: losses, lambda: present)
        return every, {task: mask.bool() for task, mask in there.items()} if self.per_sample else {}

    def holders(self, task: str) -> int:
        """How many processes have the task."""
        return sum(task in names for names in self.present)


def local(gradients: Iterable[Tensor]) -> list[Tensor]:
    """The numbers that this process has of each gradient."""
    mine = [
        g if type(g) is Tensor or not sharded([g]) else g.to_local()  # type: ignore[attr-defined]  # a DTensor has it
        for g in gradients
    ]
    return [g.coalesce().values() if g.is_sparse else g for g in mine]


def sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether one of them is a piece of what the processes hold together (FSDP, tensor parallelism)."""
    module = sys.modules.get("torch.distributed.tensor")  # where it has not been imported, there are none
    return module is not None and any(isinstance(tensor, module.DTensor) for tensor in tensors)


FSDP1 = "FullyShardedDataParallel (FSDP1)"


def flattened(tensors: Iterable[Tensor]) -> bool:
    """Whether some are flat parameters of FSDP1, or its pieces of them."""
    return any(getattr(tensor, "_fsdp_flattened", False) for tensor in tensors)


def expect_whole(tensors: Iterable[Tensor], reader: str) -> None:
    """Raises for sharded parameters: the losses' graph has other tensors in their place."""
    tensors = [*tensors]
    if flattened(tensors):
        raise MTLWeightError(
            f"{reader}, but the parameters are pieces of flat ones: the losses' graph has other tensors in their "
            f"place, whose gradients cannot be asked for one by one. Expected whole parameters, found {FSDP1}'s. Use "
            "DistributedDataParallel; or fully_shard with a weighting that reads losses alone or engine='features'."
        )
    if sharded(tensors):
        raise MTLWeightError(
            f"{reader}, but the parameters are sharded: the losses' graph has gathered copies in their place, whose "
            "gradients cannot be asked for one by one. Expected whole parameters, found DTensors. Use "
            "DistributedDataParallel, a weighting that reads losses alone, or engine='features'."
        )
