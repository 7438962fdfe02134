"""Weightings that read the tasks' gradients entry by entry."""

from mtlweight.jacobian.graddrop import GradDrop

__all__ = ["GradDrop"]
