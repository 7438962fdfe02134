"""What is known of the engines: which has run, which was confirmed, and which cannot run."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

SUSPECT = {
    "forward": ("reduce=prod", "reduce=amax", "reduce=amin"),  # scatter_reduce: none of prod, wrong at ties
    "pullback": ("scale_grad_by_freq=True",),  # of an embedding: as if it were False
    "samples": ("CdistBackward",),
}
"""Operators whose derivative an engine has wrong for some values: it is confirmed each time."""


@dataclass
class Trust:
    """What is known of the engines in one optimizer.

    Args:
        uses: how often each engine has measured, and was confirmed with each operator.
        broken: engines that have fallen back for good, with the cause.
        warn: called with an engine's name and the cause at each fallback, and with ``wholly=False`` where the engine is
            not given up.
        ran: the engines that have measured something in this step.
    """

    uses: Counter[str]
    broken: Mapping[str, str]
    warn: Callable[..., None]
    ran: list[str] = field(default_factory=list)

    def is_due(self, engine: str, operators: set[str]) -> bool:
        """Counts a use of the engine, and says whether to confirm it.

        It is confirmed at the 1st, 2nd, 4th, 8th, ... use, since compilers may step in after some uses; and when an
        operator is new to it, so that a rare branch is confirmed when it first appears.

        Args:
            engine: its name.
            operators: those in the graph.
        """
        self.uses[engine] += 1
        uses = self.uses[engine]
        known = all(f"{engine}: {operator}" in self.uses for operator in operators)
        suspect = any(mark in operator for mark in SUSPECT.get(engine, ()) for operator in operators)
        return uses & (uses - 1) == 0 or not known or suspect

    def confirmed(self, engine: str, operators: set[str]) -> None:
        """Counts that the engine was confirmed with these operators."""
        self.uses.update(f"{engine}: {operator}" for operator in operators)
