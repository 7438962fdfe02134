"""Pure functions on small float64 matrices, each exact to a stated KKT residual."""

from mtlweight.solvers._errors import SolverError
from mtlweight.solvers.min_norm import Solution, min_norm

__all__ = ["Solution", "SolverError", "min_norm"]
