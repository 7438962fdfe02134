"""Pure functions on small float64 matrices, each exact to a stated residual."""

from mtlweight._errors import SolverError
from mtlweight.solvers._alpha_fair import alpha_fair
from mtlweight.solvers._conflict_averse import conflict_averse
from mtlweight.solvers._conflict_free import conflict_free
from mtlweight.solvers._dual_cone import dual_cone
from mtlweight.solvers._equal_projection import equal_projection
from mtlweight.solvers._min_norm import min_norm
from mtlweight.solvers._rows import Solution

__all__ = [
    "Solution",
    "SolverError",
    "alpha_fair",
    "conflict_averse",
    "conflict_free",
    "dual_cone",
    "equal_projection",
    "min_norm",
]
