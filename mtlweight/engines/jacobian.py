"""The tasks' gradients: rows of a Jacobian that need not be built."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from mtlweight._statistics import all_finite, cast, gramian_of, settled, statistics_dtype, widest
from mtlweight._weighting import Level
from mtlweight.autograd.autocast import in_full_precision
from mtlweight.autograd.half_precision import dense, wide
from mtlweight.autograd.inject import inject

Reached: TypeAlias = dict[int, Tensor]
"""Gradients by the place of their input; there is no entry where there is none."""
LONG = 1 << 16
"""Gradients of at most so many numbers are joined: many small products cost more than a copy. Longer ones stay."""


@dataclass
class Rows:
    """The gradients of ``m`` outputs: one vector for each group of inputs, and one tensor for each other leaf.

    Gramians and weighted sums need no Jacobian: to copy all gradients into one matrix would take twice the memory, and
    a good part of a step's time.

    Args:
        inputs: the tensors that the columns belong to.
        rest: other leaves.
        groups: places in ``inputs`` whose gradients are one vector.
        long: for each output, a vector for each group that has no block, or ``None`` for zero.
        block: the vectors of the last group, ``[m, *]``, if there are short inputs; ``J``, if the group is all inputs.
        reach: for each output, the places of the inputs that it depends on.
        heads: for each output, its gradients by their place in ``rest``.
        dtype: of the vectors.
        rounding: ``eps`` of what the gradients passed through, if that was less precise than float32; else 0.
    """

    inputs: list[Tensor]
    rest: list[Tensor]
    groups: list[list[int]]
    long: list[list[Tensor | None]]
    block: Tensor | None
    reach: list[set[int]]
    heads: list[Reached]
    dtype: torch.dtype
    rounding: float = 0.0

    @classmethod
    def collect(
        cls, gradients: Iterable[Reached], m: int, inputs: list[Tensor], rest: Sequence[Tensor] = (), *, whole: bool
    ) -> Rows:
        """From the ``m`` outputs' gradients with respect to ``inputs``, then ``rest``.

        Args:
            gradients: of one output after the other.
            m: their number.
            inputs: what the columns belong to.
            rest: other leaves.
            whole: whether all inputs are one group, so that the block is ``J``.
        """
        count = len(inputs)
        single = [] if whole else [k for k in range(count) if inputs[k].numel() > LONG]
        joined = [k for k in range(count) if k not in single]
        rows = cls(inputs, [*rest], [[k] for k in single], [], None, [], [], widest(inputs))
        if joined:
            rows.groups.append(joined)
            rows.block = torch.empty(m, rows.widths[-1], dtype=rows.dtype, device=inputs[0].device)
        for t, found in enumerate(gradients):
            rows.long.append([rows._flat(k, found[k]) if k in found else None for k in single])
            if rows.block is not None:
                torch.cat([rows._flat(k, found.get(k)) for k in joined], out=rows.block[t])
            rows.reach.append({k for k in found if k < count})
            rows.heads.append({k - count: dense(g) for k, g in found.items() if k >= count})
        return rows

    def _flat(self, k: int, gradient: Tensor | None) -> Tensor:
        device = self.inputs[0].device
        if gradient is None:
            return torch.zeros(self.inputs[k].numel(), dtype=self.dtype, device=device)
        return cast(dense(gradient).flatten(), self.dtype, device)

    @property
    def reached(self) -> bool:
        """Whether any output depends on any input."""
        return any(self.reach)

    @property
    def widths(self) -> list[int]:
        """How many columns each group has."""
        return [sum(self.inputs[k].numel() for k in group) for group in self.groups]

    def vectors(self, t: int) -> list[Tensor | None]:
        """Those of output ``t``, one a group."""
        return self.long[t] if self.block is None else [*self.long[t], self.block[t]]

    def parts(self, t: int) -> dict[Tensor, Tensor]:
        """The gradients of output ``t`` by leaf."""
        found: dict[Tensor, Tensor] = {}
        for group, vector in zip(self.groups, self.vectors(t), strict=True):
            if vector is not None:
                inputs = [self.inputs[k] for k in group]
                pieces = vector.split([p.numel() for p in inputs])
                found.update((p, piece.view(p.shape)) for p, piece in zip(inputs, pieces, strict=True))
        return {**found, **{self.rest[k]: wide(g) for k, g in self.heads[t].items()}}

    def bad_input(self, t: int) -> Tensor | None:
        """The first input for which the gradient of output ``t`` is not finite."""
        parts = self.parts(t)
        return next((p for p in self.inputs if p in parts and not parts[p].isfinite().all()), None)

    @property
    def finite(self) -> list[bool]:
        """Whether each output's gradients are."""
        each = [[*self.parts(t).values()] for t in range(len(self.reach))]
        if all_finite([g for gradients in each for g in gradients]):
            return [True] * len(each)
        return [all_finite(gradients) for gradients in each]

    @property
    def gramian(self) -> Tensor:
        """``J Jᵀ``, ``[m, m]``."""
        m, device = len(self.reach), self.inputs[0].device
        if not self.groups:
            return torch.zeros(m, m, dtype=statistics_dtype(device), device=device)
        blocks: list[Tensor | list[Tensor]] = []
        for (k,), column in zip(self.groups, zip(*self.long, strict=True), strict=False):
            zero = self._flat(k, None) if any(vector is None for vector in column) else torch.empty(0)
            blocks.append([zero if vector is None else vector for vector in column])
        if self.block is not None:
            blocks.append(self.block)
        total = gramian_of(*blocks)
        return settled(total, self.rounding) if self.rounding else total

    def like(self, matrix: Tensor, *, reached: bool) -> Rows:
        """Other rows for the same inputs, group after group in the columns of a matrix."""
        columns = list(matrix.split(self.widths, dim=1))
        block = None if self.block is None else columns.pop()
        long: list[list[Tensor | None]] = [[column[t] for column in columns] for t in range(len(matrix))]
        reach = [set(range(len(self.inputs)) if reached else ()) for _ in matrix]
        return replace(self, rest=[], long=long, block=block, reach=reach, heads=[{} for _ in matrix])

    def zero(self, m: int) -> Rows:
        """``m`` rows of zeros for the same inputs, to be added to."""
        block = None if self.block is None else self.block.new_zeros(m, self.block.shape[1])
        long: list[list[Tensor | None]] = [[None] * len(self.long[0]) for _ in range(m)]
        reach: list[set[int]] = [set() for _ in range(m)]
        return replace(self, rest=[], long=long, block=block, reach=reach, heads=[{} for _ in reach])

    def add(self, places: Sequence[int], others: Rows) -> None:
        """Adds other rows to the ones in these places."""
        self.rounding = max(self.rounding, others.rounding)
        for i, t in enumerate(places):
            self.reach[t] |= others.reach[i]
            for j, vector in enumerate(others.long[i]):
                if vector is not None:  # not in place: autograd may give one gradient to two inputs
                    mine = self.long[t][j]
                    self.long[t][j] = vector if mine is None else mine + vector
            if self.block is not None and others.block is not None:
                self.block[t] += others.block[i]

    def subset(self, keep: Sequence[int]) -> Rows:
        """Some of the rows."""
        return replace(
            self,
            long=[self.long[t] for t in keep],
            block=None if self.block is None else self.block[keep],
            reach=[self.reach[t] for t in keep],
            heads=[self.heads[t] for t in keep],
        )

    def combined(self, value: Tensor, weights: Tensor, writes: Level, heads: str) -> Tensor:
        """The scalar of a given value whose backward writes the weighted sum of the rows.

        Args:
            value: the scalar's.
            weights: ``[m]`` or ``[m, n]``.
            writes: ``"task"`` or ``"entry"``.
            heads: ``"weighted"`` or ``"unweighted"``.
        """
        groups, shapes, count, dtype = self.groups, [p.shape for p in self.inputs], len(self.rest), self.dtype
        reached = sorted(set[int]().union(*self.reach))  # no others are in the graph: some reducers count on that
        weighted = writes == "task" and heads == "weighted"
        vectors = [(t, j, v) for t in range(len(self.reach)) for j, v in enumerate(self.vectors(t)) if v is not None]
        others = [(t, k, g) for t, row in enumerate(self.heads) for k, g in row.items()]
        # What the backward needs goes through autograd, which frees it afterwards: here are only its places.
        saved = [weights, *(v for *_, v in vectors), *(g for *_, g in others)]
        places, tails = [(t, j) for t, j, _ in vectors], [(t, k) for t, k, _ in others]

        @in_full_precision
        def gradients(incoming: Tensor, saved: Sequence[Tensor]) -> list[Tensor | None]:
            given = iter(saved)
            # What comes in, such as a loss scale, goes into the weights: that spares a pass over every gradient.
            factors = (incoming * next(given)).to(dtype).unbind()
            totals: list[Tensor | None] = [None] * len(groups)
            for t, j in places:
                totals[j] = _plus(totals[j], factors[t], next(given))
            found: list[Tensor | None] = [None] * (len(shapes) + count)
            for group, total in zip(groups, totals, strict=True):
                if total is not None:
                    for k, part in zip(group, total.split([shapes[k].numel() for k in group]), strict=True):
                        found[k] = part.view(shapes[k])
            for t, k in tails:
                g = wide(next(given))
                factor = cast(factors[t] if weighted else incoming, g.dtype, g.device)
                found[len(shapes) + k] = _plus(found[len(shapes) + k], factor, g)
            return [found[k] for k in reached] + found[len(shapes) :]

        return inject(value, [*(self.inputs[k] for k in reached), *self.rest], saved, gradients)


def _plus(total: Tensor | None, factor: Tensor, vector: Tensor) -> Tensor:
    return factor * vector if total is None else total.addcmul_(factor, vector)
