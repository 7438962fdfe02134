"""The tasks' gradients: rows of a Jacobian that need not be built."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtlweight._statistics import gramian_of
from mtlweight._weighting import Level
from mtlweight.engines._inject import inject
from mtlweight.engines._range import Gradients, dense, wide

LONG = 1 << 16
"""Gradients of fewer numbers are joined: many small products cost more than a copy. Longer ones stay where they are."""


@dataclass
class Rows:
    """The gradients of ``m`` outputs: for some groups of inputs a vector each, and one by one over all other leaves.

    Gramians and weighted sums need no Jacobian, which would be the same memory again, and a good part of a step's time.

    Args:
        inputs: the tensors that the columns belong to.
        rest: other leaves.
        groups: places in ``inputs`` whose gradients are joined.
        vectors: for each output, a vector a group, or ``None`` for zero.
        reach: for each output, the places of the inputs that it depends on.
        heads: for each output, its gradients by their place in ``rest``.
        coefficients: ``[m, b]`` weights that the outputs were made with, if any.
        matrix: ``J``, ``[m, n]``, if it was asked for: the one group is its rows then.
    """

    inputs: list[Tensor]
    rest: list[Tensor]
    groups: list[list[int]]
    vectors: list[list[Tensor | None]]
    reach: list[set[int]]
    heads: list[dict[int, Tensor]]
    coefficients: Tensor | None
    matrix: Tensor | None = None

    @classmethod
    def collect(
        cls,
        gradients: Iterable[Gradients],
        inputs: list[Tensor],
        rest: list[Tensor],
        coefficients: Tensor | None,
        matrix: Tensor | None,
    ) -> Rows:
        """From each output's gradients with respect to ``inputs``, then ``rest``; into the matrix, if one is given."""
        count = len(inputs)
        long = [[k] for k, p in enumerate(inputs) if p.numel() > LONG]
        short = [k for k, p in enumerate(inputs) if p.numel() <= LONG]
        groups = [list(range(count))] if matrix is not None else [*long, short] if short else long
        rows = cls(inputs, rest, groups, [], [], [], coefficients, matrix)
        for t, found in enumerate(gradients):
            out = None if matrix is None else matrix[t]
            rows.vectors.append([rows._joined([found[k] for k in group], group, out) for group in groups])
            rows.reach.append({k for k in range(count) if found[k] is not None})
            rows.heads.append({k: dense(g) for k, g in enumerate(found[count:]) if g is not None})
        return rows

    def _joined(self, found: list[Tensor | None], group: list[int], out: Tensor | None) -> Tensor | None:
        if out is None and all(g is None for g in found):
            return None
        dtype, device = row_dtype(self.inputs), self.inputs[0].device
        parts = [
            torch.zeros(self.inputs[k].numel(), dtype=dtype, device=device)
            if g is None
            else dense(g).flatten().to(device, dtype)
            for k, g in zip(group, found, strict=True)
        ]
        return parts[0] if len(parts) == 1 and out is None else torch.cat(parts, out=out)

    @property
    def reached(self) -> bool:
        """Whether any output depends on any input."""
        return any(self.reach)

    def bad_input(self, t: int) -> Tensor | None:
        """The first input for which the gradient of output ``t`` is not finite."""
        parts: dict[int, Tensor] = {}
        for group, vector in zip(self.groups, self.vectors[t], strict=True):
            if vector is not None:
                parts.update(zip(group, vector.split([self.inputs[k].numel() for k in group]), strict=True))
        return next((self.inputs[k] for k in sorted(parts) if not parts[k].isfinite().all()), None)

    @property
    def gramian(self) -> Tensor:
        """``J Jᵀ``, ``[m, m]``."""
        return gramian_of(*self._columns())

    @property
    def widths(self) -> list[int]:
        """How many columns each group has."""
        return [sum(self.inputs[k].numel() for k in group) for group in self.groups]

    def like(self, matrix: Tensor, coefficients: Tensor | None, *, reached: bool) -> Rows:
        """Other rows for the same inputs, group after group in the columns of a matrix."""
        vectors: list[list[Tensor | None]] = [list(row.split(self.widths)) for row in matrix]
        reach = [set(range(len(self.inputs)) if reached else ()) for _ in matrix]
        whole = None if self.matrix is None else matrix
        return Rows(self.inputs, [], self.groups, vectors, reach, [{} for _ in matrix], coefficients, whole)

    def zero(self, m: int, coefficients: Tensor | None) -> Rows:
        """``m`` rows of zeros for the same inputs, to be added to."""
        matrix = None if self.matrix is None else self.matrix.new_zeros(m, self.matrix.shape[1])
        vectors: list[list[Tensor | None]] = [
            [None for _ in self.groups] if matrix is None else [matrix[t]] for t in range(m)
        ]
        reach: list[set[int]] = [set() for _ in range(m)]
        return Rows(self.inputs, [], self.groups, vectors, reach, [{} for _ in range(m)], coefficients, matrix)

    def add(self, places: Sequence[int], others: Rows) -> None:
        """Adds other rows to the ones in these places."""
        for t, row, reach in zip(places, others.vectors, others.reach, strict=True):
            self.reach[t] |= reach
            for j, vector in enumerate(row):
                if vector is not None:
                    mine = self.vectors[t][j]
                    if self.matrix is not None:
                        self.matrix[t] += vector
                    else:  # not in place: autograd may give one gradient to two inputs, or one number for many entries
                        self.vectors[t][j] = vector if mine is None else mine + vector

    def subset(self, keep: Sequence[int]) -> Rows:
        """Some of the rows."""
        vectors, reach, heads = ([each[t] for t in keep] for each in (self.vectors, self.reach, self.heads))
        matrix = None if self.matrix is None else self.matrix[keep]
        return Rows(self.inputs, self.rest, self.groups, vectors, reach, heads, self.coefficients, matrix)  # type: ignore[arg-type]  # lists of each kind

    def combined(self, value: Tensor, weights: Tensor, writes: Level, heads: str) -> Tensor:
        """The scalar of a given value whose backward writes the weighted sum of the rows.

        Args:
            value: the scalar's.
            weights: ``[m]`` or ``[m, n]``.
            writes: ``"task"`` or ``"entry"``.
            heads: ``"weighted"`` or ``"unweighted"``.
        """
        dtype, groups = row_dtype(self.inputs), self.groups
        shapes = [p.shape for p in self.inputs]
        reached = sorted(set[int]().union(*self.reach))  # no others are in the graph: some reducers count on that
        weighted = writes == "task" and heads == "weighted"
        shared = [(t, j) for t, row in enumerate(self.vectors) for j, vector in enumerate(row) if vector is not None]
        others = [(t, k) for t, row in enumerate(self.heads) for k in row]
        count = len(self.rest)

        def gradients(incoming: Tensor, saved: Sequence[Tensor]) -> list[Tensor | None]:
            # What comes in, such as a loss scale, goes into the weights: that spares a pass over every gradient.
            factors = (incoming * saved[0]).to(dtype).unbind()
            totals: list[Tensor | None] = [None] * len(groups)
            for (t, j), vector in zip(shared, saved[1:], strict=False):
                totals[j] = _plus(totals[j], factors[t], vector)
            tails: list[Tensor | None] = [None] * count
            for (t, k), g in zip(others, saved[1 + len(shared) :], strict=True):
                tails[k] = _plus(tails[k], (factors[t] if weighted else incoming).to(g.device), wide(g))
            found: list[Tensor | None] = [None] * len(shapes)
            for group, total in zip(groups, totals, strict=True):
                if total is not None:
                    for k, part in zip(group, total.split([shapes[k].numel() for k in group]), strict=True):
                        found[k] = part.view(shapes[k])
            return [found[k] for k in reached] + tails

        tensors = [vector for row in self.vectors for vector in row if vector is not None]
        tensors += [g for row in self.heads for g in row.values()]
        leaves = [*(self.inputs[k] for k in reached), *self.rest]
        return inject(value, leaves, [weights, *tensors], gradients)

    def _columns(self) -> Iterator[list[Tensor]]:
        """For each group, its ``m`` vectors."""
        for group, column in zip(self.groups, zip(*self.vectors, strict=True), strict=True):
            like = next((vector for vector in column if vector is not None), None)
            if like is None:  # a group that no output depends on
                n = sum(self.inputs[k].numel() for k in group)
                like = torch.zeros(n, dtype=row_dtype(self.inputs), device=self.inputs[0].device)
            zero = torch.zeros_like(like) if any(vector is None for vector in column) else like
            yield [zero if vector is None else vector for vector in column]


def _plus(total: Tensor | None, factor: Tensor, vector: Tensor) -> Tensor:
    return factor * vector if total is None else total.addcmul_(factor, vector)


def row_dtype(parameters: Sequence[Tensor]) -> torch.dtype:
    """The dtype of their gradients as rows: float32, or float64 if one of them is."""
    dtype = torch.float32
    for p in parameters:
        dtype = torch.promote_types(dtype, p.dtype)
    return dtype
