"""Combinators: weightings made of weightings."""

from mtlweight.compose._chain import chain
from mtlweight.compose._clip import clip
from mtlweight.compose._ema import ema
from mtlweight.compose._every import every
from mtlweight.compose._function import weighting
from mtlweight.compose._normalize import normalize

__all__ = ["chain", "clip", "ema", "every", "normalize", "weighting"]
