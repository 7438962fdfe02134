"""Task weights learned on the main tasks' held-out loss one step ahead."""

from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from torch import Tensor

from mtlweight._checks import expect
from mtlweight._errors import MTLWeightError
from mtlweight._view import Needs, State, View
from mtlweight._weighting import ReferenceUse, Traits, Weighting


@dataclass(frozen=True)
class AutoLambda(Weighting):
    """Learns all tasks' weights so that the weighted step lowers the main tasks' loss on other data.

    ``λ`` descends on ``L_ref(θ')`` with the look-ahead ``θ' = θ - α Σ_t λ_t ∇ℓ_t(θ)``. Its derivative is
    ``∂L_ref(θ') / ∂λ_t = -α <∇ℓ_t(θ), ∇L_ref(θ')>``: the alignment, with the reference's gradient at ``θ'`` and the
    tasks' gradients at ``θ``. ``λ`` takes one step of Adam on it, then ``w_t = max(0, λ_t)``; the main tasks' weights
    are learned like the others.

    *Reads* the alignment. *Writes* ``[m]``, non-negative. *State* per task: ``λ`` and Adam's two averages and count.
    *Cost* a forward, a backward and a step to look ahead, the reference's forward and backward, and one more forward.

    Args:
        main: name of the task that the reference belongs to; or several, with a reference for each, whose sum counts.
        step_size: Adam's rate for ``λ``. Default 1e-4, from memory the paper's and the official code's.
        initial: the first ``λ``. Default 0.1, the paper's and the official code's.
        decay: Adam's two decays. Default (0.9, 0.999), torch's.
        lookahead: whether the reference's gradient is taken at ``θ'``, where one step of the wrapped optimizer leads,
            which is then undone. Default true, as published; losses and reference must be callables. False takes it
            here, for less.
        scope: parameters over which gradients are compared: ``"all"``, the default and the official code's;
            ``"shared"`` and ``"main"`` as in :class:`SLGrad`.

    Raises:
        MTLWeightError: if ``step_size`` is not positive and finite, ``initial`` is negative, or a decay is not in
            ``[0, 1)``.

    >>> AutoLambda("0", step_size=0.01)(alignment=torch.tensor([4.0, 0.0, -1.0]))
    tensor([0.1100, 0.1000, 0.0900])

    *Differs from the paper*: the product of the two gradients is computed as it is, where the official code takes a
    central difference of the losses along ``∇L_ref``, which has the same limit. The step ahead is the wrapped
    optimizer's own; the official code rebuilds that of SGD. Adam has no epsilon, so that the losses' unit does not
    matter. ``λ`` is kept from becoming negative. In the official code the reference is the main tasks' loss on another
    training batch.

    References:
        Liu, James, Davison, Johns, "Auto-Lambda: Disentangling Dynamic Task Relationships", TMLR 2022, arXiv
        2202.03091; formulas as in the official code (lorenmt/auto-lambda).
    """

    main: str | tuple[str, ...]
    _: KW_ONLY
    step_size: float = 1e-4
    initial: float = 0.1
    decay: tuple[float, float] = (0.9, 0.999)
    lookahead: bool = True
    scope: Literal["shared", "main", "all"] = "all"

    needs = Needs.ALIGNMENT
    traits = Traits(nonnegative=True, scale_degree=0)

    def __post_init__(self) -> None:
        expect(self, "> 0", "step_size")
        expect(self, ">= 0", "initial")
        if not all(0 <= decay < 1 for decay in self.decay):
            raise MTLWeightError(f"AutoLambda: expected two decays in [0, 1), found {self.decay}.")
        ReferenceUse.of("AutoLambda", self.main, scope=self.scope)

    @property
    def reference(self) -> ReferenceUse:
        """The main tasks' loss, over the scope, one step ahead."""
        lookahead = "reference" if self.lookahead else None
        return ReferenceUse.of("AutoLambda", self.main, scope=self.scope, lookahead=lookahead)

    def init(self, view: View) -> State:
        """No task is known."""
        return {"lambda": {}, "mean": {}, "square": {}, "count": {}}

    def ahead(self, view: View, state: State) -> Tensor:
        """``λ`` as it is."""
        return view.gather(state["lambda"], self.initial)

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """``λ`` after one step of Adam along the alignments."""
        alignment, (slow, slower) = view.alignment, self.decay
        count = view.gather(state["count"]) + 1
        mean = slow * view.gather(state["mean"]) + (1 - slow) * alignment
        square = slower * view.gather(state["square"]) + (1 - slower) * alignment.square()
        size = (square / (1 - slower**count)).sqrt()
        step = torch.where(size > 0, mean / (1 - slow**count) / size, 0.0)
        weights = (view.gather(state["lambda"], self.initial) + self.step_size * step).clamp(min=0)
        return weights, {
            "lambda": view.scatter(state["lambda"], weights),
            "mean": view.scatter(state["mean"], mean),
            "square": view.scatter(state["square"], square),
            "count": view.scatter(state["count"], count),
        }
