"""Weightings that read inner products of the tasks' gradients."""

from mtlweight.gramian.gradnorm import GradNorm
from mtlweight.gramian.mgda import MGDA
from mtlweight.gramian.pcgrad import PCGrad

__all__ = ["MGDA", "GradNorm", "PCGrad"]
