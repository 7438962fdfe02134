"""The tasks' gradients: rows of a Jacobian that need not be built."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mtlweight._statistics import all_finite, cast, gramian_of, settled, statistics_dtype, widest
from mtlweight._weighting import Level
from mtlweight.engines._inject import inject
from mtlweight.engines._precision import in_full_precision
from mtlweight.engines._range import Reached, dense, wide

COPIED = 1 << 20
"""Of what stands for gradients, at most so many numbers are copied in float64 at a time."""
CANCELLED = 1e-4
"""Of the terms of an inner product: below, the result would have less than the twelve digits that solvers count on."""
LONG = 1 << 16
"""Gradients of at most so many numbers are joined: many small products cost more than a copy. Longer ones stay."""


@dataclass
class Product:
    """The gradients of ``m`` outputs with respect to a linear layer's weight, ``δ[t]ᵀ x``, which are not made.

    Args:
        place: of the weight in the inputs.
        x: what came into the layer, ``[N, in]``.
        deltas: for each output the gradient at the layer's, ``[N, out]``, or ``None`` for zero.
    """

    place: int
    x: Tensor
    deltas: list[Tensor | None]

    def made(self, t: int) -> Tensor:
        """The gradient of output ``t``, flat."""
        delta = self.deltas[t]
        if delta is None:
            delta = next(torch.zeros_like(other) for other in self.deltas if other is not None)
        return (delta.T @ cast(self.x, delta.dtype)).flatten()

    def gramian(self) -> Tensor:
        """Their inner products, ``[m, m]``.

        In float64, since terms cancel that are larger than the result. If more cancels than float64 can take, the
        gradients are made after all, a few columns at a time.
        """
        x = self.x.double()
        kernel = x @ x.T
        zero = next(torch.zeros_like(delta) for delta in self.deltas if delta is not None)
        deltas = [zero if delta is None else delta for delta in self.deltas]
        m, (n, width) = len(deltas), x.shape

        def over(columns: int, product: Callable[[Tensor], Tensor]) -> Tensor:
            parts = zip(*(delta.split(max(1, columns), dim=1) for delta in deltas), strict=True)
            return functools.reduce(torch.add, (product(torch.stack(part).double()) for part in parts))

        found = over(COPIED // max(1, m * n), lambda part: part.flatten(1) @ (kernel @ part).flatten(1).T)
        squares, sizes = found.diagonal().tolist(), torch.stack([delta.norm() for delta in deltas]).tolist()
        least = CANCELLED * kernel.diagonal().sum().item()
        if any(square < least * size * size for square, size in zip(squares, sizes, strict=True)):
            found = over(COPIED // max(1, m * width), lambda part: _square((part.mT @ x).flatten(1)))
        return (found + found.T) / 2


@dataclass
class Rows:
    """The gradients of ``m`` outputs: for some groups of inputs a vector each, and one by one over all other leaves.

    Gramians and weighted sums need no Jacobian, which would be the same memory again, and a good part of a step's time.

    Args:
        inputs: the tensors that the columns belong to.
        rest: other leaves.
        groups: places in ``inputs`` whose gradients are one vector.
        long: for each output, a vector for each group that has no block, or ``None`` for zero.
        block: the vectors of the last group, ``[m, *]``, if there are short inputs; ``J``, if the group is all inputs.
        reach: for each output, the places of the inputs that it depends on.
        heads: for each output, its gradients by their place in ``rest``.
        coefficients: ``[m, b]`` weights that the outputs were made with, if any.
        dtype: of the vectors.
        products: what stands for the gradients of the inputs that are in no group.
        rounding: of what the gradients passed through, if that was less precise than float32; else 0.
    """

    inputs: list[Tensor]
    rest: list[Tensor]
    groups: list[list[int]]
    long: list[list[Tensor | None]]
    block: Tensor | None
    reach: list[set[int]]
    heads: list[dict[int, Tensor]]
    coefficients: Tensor | None
    dtype: torch.dtype
    products: list[Product] = field(default_factory=list)
    rounding: float = 0.0

    @classmethod
    def collect(
        cls,
        gradients: Iterable[Reached],
        m: int,
        inputs: list[Tensor],
        rest: list[Tensor],
        coefficients: Tensor | None,
        *,
        whole: bool,
        entering: Mapping[int, Tensor] | None = None,
    ) -> Rows:
        """From the ``m`` outputs' gradients with respect to ``inputs``, then ``rest``.

        Args:
            gradients: of one output after the other.
            m: their number.
            inputs: see above.
            rest: see above.
            coefficients: see above.
            whole: whether all groups are one, so that the block is ``J``.
            entering: for some inputs, what comes into the linear layer that they are the weight of: in the place of
                their gradients are those of the layer's output.
        """
        count, sizes, dtype = len(inputs), [p.numel() for p in inputs], widest(inputs)
        products = [Product(k, x, []) for k, x in (entering or {}).items()]
        made = [k for k in range(count) if not entering or k not in entering]
        single = [] if whole else [k for k in made if sizes[k] > LONG]
        joined = [k for k in made if whole or sizes[k] <= LONG]
        width = sum(sizes[k] for k in joined)
        block = torch.empty(m, width, dtype=dtype, device=inputs[0].device) if joined else None
        groups = [[k] for k in single] + ([joined] if joined else [])
        rows = cls(inputs, rest, groups, [], block, [], [], coefficients, dtype, products)
        for t, found in enumerate(gradients):
            rows.long.append([rows._flat(k, found[k]) if k in found else None for k in single])
            if block is not None:
                torch.cat([rows._flat(k, found.get(k)) for k in joined], out=block[t])
            for product in products:
                delta = found.get(product.place)
                product.deltas.append(None if delta is None else wide(dense(delta)))
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

    def vectors(self, t: int) -> list[Tensor | None]:
        """Those of output ``t``, one a group."""
        return self.long[t] if self.block is None else [*self.long[t], self.block[t]]

    def bad_input(self, t: int) -> Tensor | None:
        """The first input for which the gradient of output ``t`` is not finite."""
        parts = self._split(t)
        parts.update((each.place, each.made(t)) for each in self.products if each.deltas[t] is not None)
        return next((self.inputs[k] for k in sorted(parts) if not parts[k].isfinite().all()), None)

    def parts(self) -> Iterator[dict[Tensor, Tensor]]:
        """For each output, its gradients by leaf, as far as they are made."""
        for t, heads in enumerate(self.heads):
            made = {self.inputs[k]: g.view(self.inputs[k].shape) for k, g in self._split(t).items()}
            yield {**made, **{self.rest[k]: wide(g) for k, g in heads.items()}}

    def _split(self, t: int) -> dict[int, Tensor]:
        parts: dict[int, Tensor] = {}
        for group, vector in zip(self.groups, self.vectors(t), strict=True):
            if vector is not None:
                parts.update(zip(group, vector.split([self.inputs[k].numel() for k in group]), strict=True))
        return parts

    @property
    def finite(self) -> list[bool]:
        """Whether each output's gradients are."""
        each = [[*self._split(t).values(), *heads.values()] for t, heads in enumerate(self.heads)]
        if all_finite([g for gradients in each for g in gradients]):
            return [True] * len(each)
        return [all_finite(gradients) for gradients in each]

    @property
    def gramian(self) -> Tensor:
        """``J Jᵀ``, ``[m, m]``."""
        m, device = len(self.reach), self.inputs[0].device
        dtype = statistics_dtype(device)
        total = gramian_of(*self._columns()) if self.groups else torch.zeros(m, m, dtype=dtype, device=device)
        for each in self.products:
            if any(delta is not None for delta in each.deltas):
                total = total + each.gramian().to(device)
        return settled(total, self.rounding) if self.rounding else total

    @property
    def widths(self) -> list[int]:
        """How many columns each group has."""
        return [sum(self.inputs[k].numel() for k in group) for group in self.groups]

    def like(self, matrix: Tensor, coefficients: Tensor | None, *, reached: bool) -> Rows:
        """Other rows for the same inputs, group after group in the columns of a matrix."""
        assert not self.products  # they are for rows that nothing is added to
        columns = list(matrix.split(self.widths, dim=1))
        block = None if self.block is None else columns.pop()
        long: list[list[Tensor | None]] = [[column[t] for column in columns] for t in range(len(matrix))]
        reach = [set(range(len(self.inputs)) if reached else ()) for _ in matrix]
        return self._of(long, block, reach, coefficients)

    def zero(self, m: int, coefficients: Tensor | None) -> Rows:
        """``m`` rows of zeros for the same inputs, to be added to."""
        assert not self.products  # as above
        block = None if self.block is None else self.block.new_zeros(m, self.block.shape[1])
        long: list[list[Tensor | None]] = [[None] * (len(self.groups) - (block is not None)) for _ in range(m)]
        reach: list[set[int]] = [set() for _ in range(m)]
        return self._of(long, block, reach, coefficients)

    def _of(
        self, long: list[list[Tensor | None]], block: Tensor | None, reach: list[set[int]], coefficients: Tensor | None
    ) -> Rows:
        heads: list[dict[int, Tensor]] = [{} for _ in reach]
        return Rows(self.inputs, [], self.groups, long, block, reach, heads, coefficients, self.dtype)

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
            products=[replace(each, deltas=[each.deltas[t] for t in keep]) for each in self.products],
        )

    def combined(self, value: Tensor, weights: Tensor, writes: Level, heads: str) -> Tensor:
        """The scalar of a given value whose backward writes the weighted sum of the rows.

        Args:
            value: the scalar's.
            weights: ``[m]`` or ``[m, n]``.
            writes: ``"task"`` or ``"entry"``.
            heads: ``"weighted"`` or ``"unweighted"``.
        """
        dtype, groups = self.dtype, self.groups
        shapes = [p.shape for p in self.inputs]
        reached = sorted(set[int]().union(*self.reach))  # no others are in the graph: some reducers count on that
        weighted = writes == "task" and heads == "weighted"
        shared = [
            (t, j, vector) for t, row in enumerate(self.long) for j, vector in enumerate(row) if vector is not None
        ]
        others = [(t, k, g) for t, row in enumerate(self.heads) for k, g in row.items()]
        turns = _turns([k for _, k, _ in others])
        sums = [(p, [(t, delta) for t, delta in enumerate(p.deltas) if delta is not None]) for p in self.products]
        tensors = [weights, *(vector for *_, vector in shared), *(g for *_, g in others)]
        for product, deltas in sums:
            tensors += [product.x, *(delta for _, delta in deltas)]
        tensors += [] if self.block is None else [self.block]
        # What the backward needs goes through autograd, which frees it afterwards: here are only its places.
        places = [(t, j) for t, j, _ in shared], [(t, k) for t, k, _ in others]
        layers = [(product.place, [t for t, _ in deltas]) for product, deltas in sums]
        count, joined = len(self.rest), self.block is not None

        @in_full_precision
        def gradients(incoming: Tensor, saved: Sequence[Tensor]) -> list[Tensor | None]:
            given = iter(saved)
            # What comes in, such as a loss scale, goes into the weights: that spares a pass over every gradient.
            factors = (incoming * next(given)).to(dtype).unbind()
            totals: list[Tensor | None] = [None] * len(groups)
            for t, j in places[0]:
                totals[j] = _plus(totals[j], factors[t], next(given))
            heads = [wide(next(given)) for _ in places[1]]
            tails: list[Tensor | None] = [None] * count
            for turn in turns:
                own = [heads[i] for i in turn]
                scales = [factors[places[1][i][0]] if weighted else incoming for i in turn]
                products = torch._foreach_mul(
                    own, [cast(x, x.dtype, g.device) for x, g in zip(scales, own, strict=True)]
                )
                for i, g in zip(turn, products, strict=True):
                    k = places[1][i][1]
                    tails[k] = g if (before := tails[k]) is None else before.add_(g)
            found: list[Tensor | None] = [None] * len(shapes)
            for k, tasks in layers:
                x, delta = next(given), None
                for t in tasks:
                    delta = _plus(delta, cast(factors[t], dtype, x.device), cast(next(given), dtype))
                found[k] = None if delta is None else delta.T @ cast(x, dtype)
            for factor, vector in zip(factors, next(given), strict=True) if joined else ():
                totals[-1] = _plus(totals[-1], factor, vector)
            for group, total in zip(groups, totals, strict=True):
                if total is not None:
                    for k, part in zip(group, total.split([shapes[k].numel() for k in group]), strict=True):
                        found[k] = part.view(shapes[k])
            return [found[k] for k in reached] + tails

        return inject(value, [*(self.inputs[k] for k in reached), *self.rest], tensors, gradients)

    def _columns(self) -> Iterator[Tensor | list[Tensor]]:
        """For each group, its ``m`` vectors."""
        for (k,), column in zip(self.groups, zip(*self.long, strict=True), strict=False):
            zero = self._flat(k, None) if any(vector is None for vector in column) else torch.empty(0)
            yield [zero if vector is None else vector for vector in column]
        if self.block is not None:
            yield self.block


def _turns(leaves: Sequence[int]) -> list[list[int]]:
    """Places in a list, in groups that name no leaf twice: few operations, and one gradient of each leaf at a time."""
    turns: list[list[int]] = []
    seen: Counter[int] = Counter()
    for i, leaf in enumerate(leaves):
        if seen[leaf] == len(turns):
            turns.append([])
        turns[seen[leaf]].append(i)
        seen[leaf] += 1
    return turns


def _square(rows: Tensor) -> Tensor:
    return rows @ rows.T


def _plus(total: Tensor | None, factor: Tensor, vector: Tensor) -> Tensor:
    return factor * vector if total is None else total.addcmul_(factor, vector)
