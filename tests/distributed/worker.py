"""``python -m tests.distributed.worker FOLDER DEVICE COUNT...``: as many processes, once for each count.

Each writes what each case gave, or how it failed. ``MTLWEIGHT_CASES`` in the environment restricts them to cases with
that word in their names.
"""

import multiprocessing
import os
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch._decomp.decompositions_for_jvp
import torch._dynamo
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.optim
import torch.onnx  # all of these are imported by what the cases call, and are so once instead of in each process

from tests.distributed.cases import OF_TWO, SCENARIOS, parity
from tests.distributed.training import Training


def work(rank, count, folder, device):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # A collective that not all processes enter fails after this time, instead of never.
    options = {"rank": rank, "world_size": count, "timeout": timedelta(seconds=30)}
    dist.init_process_group("gloo", init_method=f"file://{folder / f'store-{count}'}", **options)
    cases = {name: lambda r=r: Training(r, count, rank, device=device).train() for name, r in parity(count).items()}
    scenarios = {name: run for name, run in SCENARIOS.items() if count == 2 or name not in OF_TWO}
    cases.update({name: lambda run=run: run(count, rank, device) for name, run in scenarios.items()})
    found = {}
    for name, case in cases.items():
        if os.environ.get("MTLWEIGHT_CASES", "") in name:
            try:
                found[name] = {"result": case()}
                dist.barrier()
            except Exception:
                found[name] = {"error": traceback.format_exc()}
                break  # the processes may be at different places now
    torch.save(found, folder / f"{count}-{rank}.pt")
    dist.destroy_process_group()


def main(folder, device, *counts):
    fork = multiprocessing.get_context("fork")  # to import torch takes longer than to run the cases
    for count in map(int, counts):
        processes = [fork.Process(target=work, args=(rank, count, Path(folder), device)) for rank in range(count)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
