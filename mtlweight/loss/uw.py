"""Uncertainty weighting."""

from dataclasses import dataclass

from torch import Tensor

from mtlweight._checks import expect, nonnegative
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting
from mtlweight.loss._implicit import implicit_step


@dataclass(frozen=True)
class UW(Weighting):
    """Each task's loss is divided by a learned noise variance, so that tasks of any unit can be added.

    ``w_t = exp(-s_t)``; the log-variances ``s_t = log σ_t²`` descend on ``exp(-s_t) ℓ_t + s_t``, whose minimum is
    ``s_t = log ℓ_t``. Each step is implicit, ``s_t' = s_t - η (1 - exp(-s_t') ℓ_t)``: for small ``η`` it equals
    gradient descent, and it stays stable for losses of any size, where explicit descent overshoots once ``ℓ_t`` is
    large.

    *Reads* the losses, which must be >= 0. *Writes* ``[m]``, positive. *State* ``s_t`` per task, which
    no weight decay or momentum touches. *Cost* none.

    The objective ``Σ_t exp(-s_t) ℓ_t + s_t`` may become negative, since a density may exceed 1; the value that
    ``optimizer.combine`` returns does not, since it is the plain sum of the losses.

    Args:
        step_size: ``η``. Default 0.02, ours; the paper trains ``s`` by the network's optimizer and states no rate of
            its own. As ``η`` grows, ``w_t`` goes to ``1 / ℓ_t``.
        initial: ``s_t`` of a new task. Default 0: weight 1, as in the official code.

    Raises:
        MTLWeightError: if ``step_size`` is not positive and finite, ``initial`` is not finite, or a loss is negative
            (it has no variance: the objective has no minimum).

    >>> UW()(losses=torch.tensor([3.0, 0.5]))
    tensor([1., 1.])

    *Differs from the paper*: both terms are doubled (``ℓ + log σ²`` for ``ℓ/2 + log σ``), as in common use; the minimum
    is the same. At a loss of exactly 0, such as a constraint that is met, the objective has no minimum, and ``s``
    stays instead of falling for ever.

    References:
        Kendall, Gal, Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses", CVPR 2018, arXiv 1705.07115,
        eq. 7 and 10.
    """

    step_size: float = 0.02
    initial: float = 0.0

    needs = Needs.LOSSES
    traits = Traits(nonnegative=True, losses="nonnegative")

    def __post_init__(self) -> None:
        expect(self, "> 0", "step_size")
        expect(self, "finite", "initial")

    def init(self, view: View) -> State:
        """No task is known."""
        return {"log_variance": {}}

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """The committed variances' weights; the state takes one implicit step."""
        losses = nonnegative("UW", view)
        s = view.gather(state["log_variance"], self.initial)
        stepped = implicit_step(s, losses, self.step_size)
        return (-s).exp(), {"log_variance": view.scatter(state["log_variance"], stepped)}
