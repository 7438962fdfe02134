"""Weightings per sample, from a reference objective."""

from mtlweight.sample.slgrad import SLGrad

__all__ = ["SLGrad"]
