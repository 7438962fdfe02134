"""What the processes run: all of it in one set of processes, since starting them takes longer than the rest."""

from mtlweight import DWA, FAMO, L2RW, MGDA, RLW, UW, GradDrop, GradientCosine, NashMTL, PCGrad, SLGrad, UPGrad
from tests.distributed.training import Run
from tests.registry import CASES

PARITY = {repr(case.weighting): Run(case.weighting, tasks=3 if 3 in case.tasks else case.tasks[0]) for case in CASES}

SCENARIOS = {}


def scenario(function):
    """A function of ``(count, rank, device)`` that is run in each process, and what it returns is sent back."""
    SCENARIOS[function.__name__] = function
    return function
