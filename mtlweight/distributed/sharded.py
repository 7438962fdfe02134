"""Parameters and gradients of which each process holds a piece."""

import sys
from collections.abc import Iterable

from torch import Tensor

from mtlweight._errors import MTLWeightError

FSDP1 = "FullyShardedDataParallel (FSDP1)"


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
