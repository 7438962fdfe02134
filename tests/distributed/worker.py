"""``python -m tests.distributed.worker RANK COUNT FOLDER DEVICE``: one of several processes; writes what each case gave."""

import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed.cases import PARITY, SCENARIOS
from tests.distributed.training import Training


def attempt(work):
    """What it gives, or how it failed."""
    try:
        return {"result": work()}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}


def main(rank, count, folder, device):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = f"file://{folder / 'store'}"
    # A collective that not all processes enter fails after this time, instead of never.
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count, timeout=timedelta(seconds=60))
    found = {}
    for name, run in PARITY.items():
        found[name] = attempt(lambda run=run: Training(run, count, rank, device=device).train())
        torch.save(found, folder / f"{rank}.pt")
    for name, work in SCENARIOS.items():
        found[name] = attempt(lambda work=work: work(count, rank, device))
        torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
