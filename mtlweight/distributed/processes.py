"""What several processes with one model tell each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mtlweight._errors import MTLWeightError, NonFiniteError
from mtlweight._statistics import statistics_dtype
from mtlweight.distributed.sharded import FSDP1, flattened, sharded

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

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a value that each process has its own of."""

        def fill(total: Tensor) -> None:
            total.copy_(value)

        return self.total(fill, value) / self.count

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
