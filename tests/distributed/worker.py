"""``python -m tests.distributed.worker RANK COUNT FOLDER DEVICE [WORD]``: one of several processes.

Writes what each case gave, or how it failed; only of cases with the word in their name, if one is given.
"""

import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed.cases import SCENARIOS, parity
from tests.distributed.training import Training


def main(rank, count, folder, device, word=""):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # A collective that not all processes enter fails after this time, instead of never.
    options = {"rank": rank, "world_size": count, "timeout": timedelta(seconds=30)}
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", **options)
    cases = {name: lambda run=run: Training(run, count, rank, device=device).train() for name, run in parity(count).items()}
    cases.update({name: lambda work=work: work(count, rank, device) for name, work in SCENARIOS.items()})
    found = {}
    for name, work in cases.items():
        if word in name:
            try:
                found[name] = {"result": work()}
                dist.barrier()
            except Exception:
                found[name] = {"error": traceback.format_exc()}
                break  # the processes may be at different places now
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
