"""The error of a solver that could not reach its residual."""

from mtlweight._errors import MTLWeightError


class SolverError(MTLWeightError):
    """A solver stopped above its KKT residual, so its answer is withheld."""
