"""Weightings that read the losses alone."""

from mtlweight.loss.constant import Constant
from mtlweight.loss.cosmos import COSMOS
from mtlweight.loss.cov import CoV
from mtlweight.loss.dwa import DWA
from mtlweight.loss.equal import Equal
from mtlweight.loss.famo import FAMO
from mtlweight.loss.gls import GLS
from mtlweight.loss.imtll import IMTLL
from mtlweight.loss.pbi import PBI
from mtlweight.loss.relobralo import ReLoBRaLo
from mtlweight.loss.rlw import RLW
from mtlweight.loss.si import SI
from mtlweight.loss.slaw import SLAW
from mtlweight.loss.softadapt import SoftAdapt
from mtlweight.loss.stch import STCH
from mtlweight.loss.uw import UW

__all__ = [
    "COSMOS",
    "DWA",
    "FAMO",
    "GLS",
    "IMTLL",
    "PBI",
    "RLW",
    "SI",
    "SLAW",
    "STCH",
    "UW",
    "CoV",
    "Constant",
    "Equal",
    "ReLoBRaLo",
    "SoftAdapt",
]
