"""Multi-task weighting: wraps any optimizer and lets a weighting decide how much each task and each sample counts."""

from mtlweight._errors import MTLWeightError, NonFiniteError
from mtlweight._optimizer import MultiTaskOptimizer
from mtlweight._report import Report
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting
from mtlweight.compose import chain, clip, ema, every, normalize, weighting
from mtlweight.gramian import MGDA, GradNorm, PCGrad
from mtlweight.jacobian import GradDrop
from mtlweight.loss import DWA, RLW, UW, Constant, Equal
from mtlweight.sample import SLGrad

__all__ = [
    "DWA",
    "MGDA",
    "RLW",
    "UW",
    "Constant",
    "Equal",
    "GradDrop",
    "GradNorm",
    "MTLWeightError",
    "MultiTaskOptimizer",
    "Needs",
    "NonFiniteError",
    "PCGrad",
    "Report",
    "SLGrad",
    "State",
    "Traits",
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
