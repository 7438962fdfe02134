"""Fast adaptive multitask optimization."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mtlweight._checks import expect, expect_one_of, nonnegative
from mtlweight._view import Needs, State, View
from mtlweight._weighting import Traits, Weighting
from mtlweight.loss._domain import alive
from mtlweight.loss._per_task import PerTask, frozen, row


@dataclass(frozen=True)
class FAMO(Weighting):
    """Decreases all losses at about the same rate, from the losses before and after each step alone.

    ``w_t = c z_t / ℓ_t`` with ``z = softmax(ξ)`` and ``c = 1 / Σ_t (z_t / ℓ_t)``, where ``ℓ`` is the loss above its
    lower bound. After the step the logits ``ξ`` descend by ``∇_ξ Σ_t z_t δ_t + γ ξ`` with ``δ_t = log ℓ_t - log ℓ_t'``,
    the log-loss's decrease: what improved fastest loses weight.

    *Reads* the losses, and reads them again after the step (``observe``): pass them to ``combine`` as a callable.
    *Writes* ``[m]``, on the simplex. *State* per task: ``ξ``, for Adam its two moments and their age, and the last
    log-loss. *Cost* one forward pass of the same batch.

    A task at its lower bound has weight 0 unless all are there, and its logit stays for this step, since its loss has
    no logarithm.

    Args:
        step_size: the logits' learning rate ``β``. Default 0.025, the paper's.
        decay: ``γ``. Default 0.001, the paper's; the official code's two copies default to 0.01 and to 0.00001, and its
            experiments set 0.001 or 0.01.
        ideal: lower bound of the losses: one number for all tasks, one a task, or a mapping from task name. Default 0.
        epsilon: added to each loss above its bound, as in the paper's ``ℓ ≥ ε``. Default 0: weights that do not depend
            on the losses' unit. The official code adds 1e-8.
        rule: ``"adam"``, the default, updates the logits by Adam with ``γ`` as its weight decay, as in the official
            code and the paper's listing; ``"gradient"``: plain descent, as in the paper's Algorithm 1.

    Raises:
        MTLWeightError: if a hyperparameter is out of range, or a loss is below ``ideal``.

    >>> FAMO()(losses=torch.tensor([3.0, 1.0]))
    tensor([0.2500, 0.7500])

    *Differs from the paper* in ``epsilon``. Its official code also clips the shared gradient's norm to 1: clip as
    usual, between ``backward`` and ``step``.

    References:
        Liu, Feng, Stone, Liu, "FAMO: Fast Adaptive Multitask Optimization", NeurIPS 2023, arXiv 2306.03792, Algorithm
        1.
    """

    step_size: float = 0.025
    decay: float = 1e-3
    ideal: PerTask = 0.0
    epsilon: float = 0.0
    rule: Literal["adam", "gradient"] = "adam"

    needs = Needs.LOSSES
    observes = True
    layout = ("rule",)

    def __post_init__(self) -> None:
        expect(self, "> 0", "step_size")
        expect(self, ">= 0", "decay", "epsilon")
        expect_one_of(self, "rule", "adam", "gradient")
        object.__setattr__(self, "ideal", frozen("FAMO", "ideal", self.ideal))

    @property
    def traits(self) -> Traits:
        """Invariant to the losses' scale as long as nothing is added to them."""
        unbound = self.ideal == 0
        return Traits(
            nonnegative=True,
            total=1.0,
            scale_degree=0 if unbound and self.epsilon == 0 else None,
            losses="nonnegative" if unbound else "real",
        )

    def init(self, view: View) -> State:
        """No task is known."""
        adam = ("first", "second", "age") if self.rule == "adam" else ()
        return {name: {} for name in ("logit", "before", *adam)}

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """The committed logits' weights; the log-losses are kept for :meth:`observe`."""
        above = self._above(view)
        what = "losses >= 0" if self.ideal == 0 else f"losses >= ideal = {self.ideal}"
        losses = nonnegative("FAMO", view, above, what) + self.epsilon
        logits = view.gather(state["logit"])
        counts = alive(losses)
        logs = torch.where(counts, losses, 1.0).log()
        shares = torch.where(counts, logits - logs, -math.inf) if counts.any() else logits
        # Beside each log-loss: whether it exists.
        kept = {"before": view.scatter(state["before"], torch.stack([logs, counts.to(logs.dtype)], dim=1))}
        return shares.softmax(dim=0), {**state, **kept}

    def observe(self, view: View, state: State) -> State:
        """The logits descend by how much each log-loss fell."""
        after = self._above(view) + self.epsilon
        logs, counted = view.gather(state["before"], torch.zeros(2, dtype=view.dtype)).unbind(dim=1)
        moves = (counted > 0) & alive(after)
        if not moves.any():
            return state
        delta = torch.where(moves, logs - torch.where(moves, after, 1.0).log(), 0.0)
        logits = view.gather(state["logit"])
        z = torch.where(moves, logits, -math.inf).softmax(dim=0)
        slope = z * (delta - (z * delta).sum()) + self.decay * logits
        if self.rule == "gradient":
            values = {"logit": logits - self.step_size * slope}
        else:
            first = 0.9 * view.gather(state["first"]) + 0.1 * slope
            second = 0.999 * view.gather(state["second"]) + 0.001 * slope**2
            age = view.gather(state["age"]) + 1
            rate = self.step_size / (1 - 0.9**age)
            stepped = logits - rate * first / ((second / (1 - 0.999**age)).sqrt() + 1e-8)
            values = {"logit": stepped, "first": first, "second": second, "age": age}
        kept = {name: torch.where(moves, value, view.gather(state[name])) for name, value in values.items()}
        return {**state, **{name: view.scatter(state[name], value) for name, value in kept.items()}}

    def _above(self, view: View) -> Tensor:
        return view.losses - row("FAMO", "ideal", self.ideal, view)
