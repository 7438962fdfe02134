"""Krum."""

from dataclasses import dataclass

from torch import Tensor

from mtlweight._checks import expect_count
from mtlweight._errors import MTLWeightError
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting

_ROUNDING = 1e-6  # of a squared distance, relative to the largest squared length, that rounded gradients leave


@dataclass(frozen=True)
class Krum(Weighting):
    """Follows the one gradient that lies closest to its nearest neighbours: the others may be anything.

    The score of task ``i`` is ``s_i = Σ_j |g_i - g_j|²`` over its ``m - f - 2`` nearest neighbours ``j``, where ``f``
    gradients may be faulty. The ``k`` tasks with the lowest scores get the weight ``1 / k`` (Krum for ``k = 1``,
    Multi-Krum for more). It comes from distributed learning, where the rows are one task's gradients by many workers.

    *Reads* the Gramian. *Writes* ``[m]``, on the simplex. *State* none. *Cost* the gradients of all tasks.

    Tasks with equal scores share what is left for them, so that the order of tasks does not matter: duplicates share,
    and if all gradients are alike, or there are two, the weights are ``1 / m``.

    Args:
        faulty: ``f``. Default ``None``: as many as the paper's theory allows, the largest with ``2 f + 2 < m``, and 0
            for fewer than three tasks; the paper has no number. With one or two tasks all others are neighbours.
        selected: ``k``. Default 1, the paper's.

    Raises:
        MTLWeightError: if ``faulty`` is negative, ``selected < 1``, or there are fewer tasks than ``k`` or, where
            ``faulty`` is given, than ``2 f + 3``.

    >>> Krum()(jacobian=torch.tensor([[1.0, 0.0], [1.0, 1.0], [-9.0, 0.0], [1.0, 0.1]]))
    tensor([0., 0., 0., 1.])

    *Differs from the paper*: of equal scores, it takes the worker with the lowest number.

    References:
        Blanchard, El Mhamdi, Guerraoui, Stainer, "Machine Learning with Adversaries: Byzantine Tolerant Gradient
        Descent", NeurIPS 2017, sections 4 and 6.
    """

    faulty: int | None = None
    selected: int = 1

    needs = Needs.GRAMIAN
    traits = Traits(nonnegative=True, total=1.0, scale_degree=0)

    def __post_init__(self) -> None:
        if self.faulty is not None:
            expect_count("Krum", "faulty", self.faulty, low=0)
        expect_count("Krum", "selected", self.selected)

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """A share for each of the lowest scores."""
        gramian = view.gramian
        m = len(gramian)
        least = max(self.selected, 1 if self.faulty is None else 2 * self.faulty + 3)
        if m < least:
            raise MTLWeightError(
                f"Krum: expected at least {least} tasks for {self}, found {m} ({', '.join(view.tasks)}). Lower faulty "
                "or selected."
            )
        faulty = max((m - 3) // 2, 0) if self.faulty is None else self.faulty
        neighbours = m - faulty - 2 if m > 2 else m - 1

        squares = gramian.diagonal()
        distances = (squares[:, None] + squares - 2 * gramian).clamp(min=0)
        distances.fill_diagonal_(-1.0)  # a task comes first in its own order, and is left out
        scores = distances.sort(dim=1).values[:, 1 : neighbours + 1].sum(dim=1)

        last = scores.sort().values[self.selected - 1]
        rounding = _ROUNDING * (squares.amax() * m + last)
        below, level = scores < last - rounding, (scores - last).abs() <= rounding
        left = self.selected - below.sum()
        shares = below.to(view.dtype) + level.to(view.dtype) * (left / level.sum())
        return shares / self.selected, state
