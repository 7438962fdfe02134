"""The errors of the library: one base class, and one for values that are not finite."""

from collections.abc import Sequence


class MTLWeightError(ValueError):
    """Every error that this library raises: what was expected, what was found, and what to do."""


class NonFiniteError(MTLWeightError):
    """A loss, a gradient, a weight or a state is NaN or infinite.

    Args:
        message: the sentence for the user.
        tasks: the tasks that can be blamed, and therefore dropped; empty if no single task can.
    """

    def __init__(self, message: str, tasks: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.tasks = tuple(tasks)


class SolverError(MTLWeightError):
    """A solver stopped above the residual that it promises, so its answer is withheld."""
