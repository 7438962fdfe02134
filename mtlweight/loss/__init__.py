"""Weightings that read the losses alone."""

from mtlweight.loss.constant import Constant
from mtlweight.loss.dwa import DWA
from mtlweight.loss.equal import Equal
from mtlweight.loss.rlw import RLW
from mtlweight.loss.uw import UW

__all__ = ["DWA", "RLW", "UW", "Constant", "Equal"]
