"""Weightings one after the other."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight._view import MIXED_LEVELS, State, View
from mtlweight._weighting import Traits, Weighting, evaluate
from mtlweight.compose._combinator import Combinator, ahead_of, expect_weighting, ones, substate


@dataclass(frozen=True, repr=False)
class Chain(Combinator):
    """Weightings one after the other; see :func:`chain`."""

    links: tuple[Weighting, ...]

    def __post_init__(self) -> None:
        if {"sample", "entry"} <= {link.writes for link in self.links}:
            raise MTLWeightError(MIXED_LEVELS)
        uses = {link.reference for link in self.links} - {None}
        if len(uses) > 1:
            raise MTLWeightError(
                "One reference objective serves the whole chain: expected links that agree on main task, scope and "
                f"learn_reference, found {uses}. Give all of them the same."
            )

    @property
    def parts(self) -> tuple[Weighting, ...]:
        """The links."""
        return self.links

    @property
    def traits(self) -> Traits:
        """What a product of the links' weights keeps of their claims."""
        traits = [link.traits for link in self.links]
        degrees = [trait.scale_degree for trait in traits if trait.scale_degree is not None]
        domains = {trait.losses for trait in traits}
        return Traits(
            nonnegative=all(trait.nonnegative for trait in traits),
            # Losses times c reach a link as losses times c ** (1 + degree of the links before it).
            scale_degree=math.prod(1 + d for d in degrees) - 1 if len(degrees) == len(traits) else None,
            random=any(trait.random for trait in traits),
            losses="positive" if "positive" in domains else "nonnegative" if "nonnegative" in domains else "real",
            samples=max(trait.samples for trait in traits),
        )

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """Each link sees the problem weighted by the links before it; the weights multiply."""
        total = scale = ones(view)
        states: dict[str, Tensor | State] = {}
        for i, link in enumerate(self.links):
            weights, states[str(i)] = evaluate(link, view, substate(state, i))
            if link.observes_at(view.step):
                states[f"{i} sees"] = view.scatter(state.get(f"{i} sees", {}), scale)
            if link.writes != "entry":  # weights per gradient entry do not change the losses
                scale = _product(scale, weights)
            view = view.scaled(weights, link.writes)
            total = _product(total, weights)
        return total, states

    def ahead(self, view: View, state: State) -> Tensor:
        """The product of the links' weights of the look-ahead step; each sees the problem weighted by those before."""
        total = ones(view)
        for i, link in enumerate(self.links):
            weights = ahead_of(link, view, substate(state, i))
            view = view.scaled(weights, "task" if weights.ndim == 1 else "sample")
            total = _product(total, weights)
        return total

    def observe(self, view: View, state: State) -> State:
        """Each link that observes sees the losses times the weights that the links before it had in this step."""
        seen: dict[str, Any] = dict(state)
        for i, link in enumerate(self.links):
            if link.observes_at(view.step):
                scale = view.gather(seen[f"{i} sees"])
                scaled = view.scaled(scale, "task" if scale.ndim == 1 else "sample")
                seen[str(i)] = link.observe(scaled, substate(state, i))
        return seen

    def __repr__(self) -> str:
        return " >> ".join(map(repr, self.links))


def chain(*weightings: Weighting) -> Weighting:
    """Chains weightings: each sees the problem as weighted by those before it, and all weights multiply.

    ``chain(A, B, C)`` is ``A >> B >> C``; nested chains are flattened, so it is associative, and ``Constant(1)`` is its
    identity. A weighting per sample followed by one per task: the second sees the tasks' weighted totals.

    Beside a weighting per gradient entry, the weights of all links are the shared parameters' alone, and heads get the
    gradient of the plain sum: ``Constant(10) >> GradDrop()`` multiplies no head's gradient by 10.

    Args:
        weightings: one or more weightings.

    Raises:
        MTLWeightError: if there is none, if one writes ``[m, b]`` and another ``[m, n]``, or if two of them use the
            reference objective differently.
    """
    links = [
        link for weighting in weightings for link in (weighting.links if isinstance(weighting, Chain) else [weighting])
    ]
    for link in links:
        expect_weighting(link, "a chain")
    if not links:
        raise MTLWeightError("Expected at least one weighting in a chain, found none. Use Constant(1) for no effect.")
    return links[0] if len(links) == 1 else Chain(tuple(links))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The product of weights of any two levels."""
    if a.ndim != b.ndim:
        a, b = (x if x.ndim == 2 else x[:, None] for x in (a, b))
    return a * b
