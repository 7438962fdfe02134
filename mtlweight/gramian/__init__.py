"""Weightings that read inner products of the tasks' gradients.

ConicGrad (arXiv 2502.00217) is not among them: of what it does, only the constrained problem could be read, not how the
constraint's multiplier, the descent on the task weights and the step's length are chosen. What is made up for these
would not be the published method. :class:`CAGrad` is the nearest one here.
"""

from mtlweight.gramian.aligned_mtl import AlignedMTL
from mtlweight.gramian.cagrad import CAGrad
from mtlweight.gramian.config import ConFIG
from mtlweight.gramian.crmogm import CRMOGM
from mtlweight.gramian.dualproj import DualProj
from mtlweight.gramian.fairgrad import FairGrad
from mtlweight.gramian.gradnorm import GradNorm
from mtlweight.gramian.gradvac import GradVac
from mtlweight.gramian.imtlg import IMTLG
from mtlweight.gramian.krum import Krum
from mtlweight.gramian.mgda import MGDA
from mtlweight.gramian.nashmtl import NashMTL
from mtlweight.gramian.pcd import PCD
from mtlweight.gramian.pcgrad import PCGrad
from mtlweight.gramian.upgrad import UPGrad

__all__ = [
    "CRMOGM",
    "IMTLG",
    "MGDA",
    "PCD",
    "AlignedMTL",
    "CAGrad",
    "ConFIG",
    "DualProj",
    "FairGrad",
    "GradNorm",
    "GradVac",
    "Krum",
    "NashMTL",
    "PCGrad",
    "UPGrad",
]
