"""Engines: how a view is filled. Each computes what a weighting declares, and nothing else."""

from mtlweight.engines._accumulate import Accumulation, expect_own_parts
from mtlweight.engines._again import look_again, snapshot
from mtlweight.engines._batch import Batch
from mtlweight.engines._blame import Hidden, bad_gradient, behind_masks
from mtlweight.engines._losses import deferred
from mtlweight.engines._parts import Parts, parameters, parts
from mtlweight.engines._plan import ENGINES, Agreed, Plan
from mtlweight.engines._precision import full_precision
from mtlweight.engines._processes import Processes, local
from mtlweight.engines._read import read
from mtlweight.engines.features import Capture

__all__ = [
    "ENGINES",
    "Accumulation",
    "Agreed",
    "Batch",
    "Capture",
    "Hidden",
    "Parts",
    "Plan",
    "Processes",
    "bad_gradient",
    "behind_masks",
    "deferred",
    "expect_own_parts",
    "full_precision",
    "local",
    "look_again",
    "parameters",
    "parts",
    "read",
    "snapshot",
]
