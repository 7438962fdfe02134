"""Multi-task weighting: wraps any optimizer and lets a weighting decide how much each task and each sample counts."""

from mtlweight._errors import MTLWeightError, NonFiniteError
from mtlweight._optimizer import MultiTaskOptimizer
from mtlweight._report import Report
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting
from mtlweight.compose import chain, clip, ema, every, normalize, weighting
from mtlweight.gramian import MGDA, GradNorm, PCGrad
from mtlweight.jacobian import (
    ExcessMTL,
    GradDrop,
    MoCo,
    TrimmedMean,
)
from mtlweight.loss import (
    COSMOS,
    DWA,
    FAMO,
    GLS,
    IMTLL,
    PBI,
    RLW,
    SI,
    SLAW,
    STCH,
    UW,
    Constant,
    CoV,
    Equal,
    ReLoBRaLo,
    SoftAdapt,
)
from mtlweight.sample import SLGrad

__all__ = [
    "COSMOS",
    "DWA",
    "FAMO",
    "GLS",
    "IMTLL",
    "MGDA",
    "PBI",
    "RLW",
    "SI",
    "SLAW",
    "STCH",
    "UW",
    "CoV",
    "Constant",
    "Equal",
    "ExcessMTL",
    "GradDrop",
    "GradNorm",
    "MTLWeightError",
    "MoCo",
    "MultiTaskOptimizer",
    "Needs",
    "NonFiniteError",
    "PCGrad",
    "ReLoBRaLo",
    "Report",
    "SLGrad",
    "SoftAdapt",
    "State",
    "Traits",
    "TrimmedMean",
    "View",
    "Weighting",
    "chain",
    "clip",
    "ema",
    "every",
    "normalize",
    "weighting",
]

__version__ = "0.1.0"
