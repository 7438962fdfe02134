"""The numbers that weightings read: their dtype, and how they are given by hand."""

import cmath
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtlweight._errors import MTLWeightError


def statistics_dtype(device: torch.device) -> torch.dtype:
    """The dtype of losses, Gramians and alignments: float64, or float32 on a device that has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def cast(tensor: Tensor, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """The tensor in this dtype, on this device."""
    return tensor.to(device, dtype)


def widest(tensors: Iterable[Tensor]) -> torch.dtype:
    """A dtype that holds the numbers of all, float32 at least."""
    return functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors}, torch.float32)


HELD = 1 << 18
"""Of a Jacobian, so many numbers are held in float64 at a time: they fit into a CPU's cache."""


def gramian_of(*blocks: Tensor | Sequence[Tensor]) -> Tensor:
    """``J Jᵀ`` in float64, whatever the dtype and the scale of ``J``: its products are exact, and summed in float64.

    Solvers need that: what is left where rows cancel must be their own rounding, and not that of the products.

    Args:
        blocks: ``J``, or its blocks of columns, each ``[m, *]`` or its ``m`` rows.
    """
    m, device = len(blocks[0]), blocks[0][0].device
    dtype = statistics_dtype(device)
    total = torch.zeros(m, m, dtype=dtype, device=device)
    columns = max(1, (HELD if device.type == "cpu" else 16 * HELD) // m)
    for block in blocks:
        parts: Iterable[Tensor]
        if isinstance(block, Tensor):
            parts = block.split(columns, dim=1)
        else:
            parts = map(torch.stack, zip(*(row.split(columns) for row in block), strict=True))
        for part in parts:
            exact = part.to(dtype)
            total.addmm_(exact, exact.T)
    return (total + total.T) / 2  # symmetric to the last bit, as the sum alone need not be


def settled(gramian: Tensor, of_rows: float = 0.0) -> Tensor:
    """A Gramian in float64, without what rounding leaves where rows depend on each other: its own, or that of the rows.

    It looks like an independent part of a row, and weights that depend on it would be large and of any sign.

    Args:
        gramian: ``[m, m]``; one in less than float64 is known to its rounding.
        of_rows: the rounding of what the rows' gradients passed through, if that was less than float32.
    """
    G = gramian.to(statistics_dtype(gramian.device))
    own = torch.finfo(gramian.dtype).eps if gramian.is_floating_point() and gramian.dtype != G.dtype else 0.0
    # Each layer of a network rounds once more, and inner products have squares of what is left.
    rounding = len(G) * max(own, (2 * of_rows) ** 2)
    norms = G.diagonal().clamp(min=0).sqrt()
    if not (rounding and G.isfinite().all() and norms.any()):
        return G
    unit = torch.where(norms > 0, norms, 1.0)
    cosines = G / unit / unit[:, None]
    values, vectors = torch.linalg.eigh(cosines)
    if not -rounding < values[0] < rounding:  # nothing to take away; or no Gramian, which a solver will refuse
        return G
    # A coefficient as small as the rounding counts as none: a row that only seems to take part in a combination that
    # vanishes would cancel with the others, or would have to be cancelled by weights without bound. The bound is on all
    # coefficients of a combination together, since those of many tasks are all small.
    least = 8 * of_rows / len(G) ** 0.5
    vanishing = torch.where(vectors.abs() > least, vectors, 0.0)[:, values <= rounding]
    basis, _ = torch.linalg.qr(vanishing)
    kept = torch.eye(len(G), dtype=G.dtype, device=G.device) - basis @ basis.T
    cosines = kept @ cosines @ kept
    scale = norms / cosines.diagonal().clamp(min=torch.finfo(G.dtype).tiny).sqrt()
    mended: Tensor = scale * cosines * scale[:, None]
    return mended


def row_sizes(matrix: Tensor) -> Tensor:
    """The largest absolute value of each row; NaN where a row has one."""
    # On the CPU a vector_norm takes seven times as long, and abs().amax() holds the matrix twice.
    if matrix.shape[1] == 0:
        return matrix.new_zeros(len(matrix))
    return torch.maximum(matrix.amax(dim=1), -matrix.amin(dim=1))


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no tensor holds NaN or infinity."""
    # Sums are cheapest on the CPU; elsewhere a norm of all takes one transfer. Either may overflow though all values
    # are finite, and then the largest value decides.
    if all(tensor.is_cpu for tensor in tensors) and all(cmath.isfinite(tensor.sum().item()) for tensor in tensors):
        return True
    some = [tensor for tensor in tensors if tensor.numel()]  # torch takes no largest value of none
    return any(bool(nn.utils.get_total_norm(some, p).isfinite()) for p in (2.0, torch.inf))


def tensors_of(state: Any) -> Iterator[Tensor]:
    """The tensors of floating point in a state."""
    for name, value in state.items():
        if isinstance(value, Mapping):
            yield from tensors_of(value)
        elif not isinstance(value, Tensor):
            raise MTLWeightError(
                f"Expected a weighting's state as nested mappings of tensors, found {type(value).__name__} under "
                f"{name!r}. Keep numbers as tensors: torch.tensor(...)."
            )
        elif value.is_floating_point():
            yield value


_SHAPES = {
    "losses": ((1, 2), "[m] or [m, b]"),
    "gramian": ((2,), "[m, m]"),
    "jacobian": ((2, 3), "[m, n] or [m, b, n]"),
    "alignment": ((1, 2), "[m] or [m, b]"),
}
"""Numbers of dimensions, and what messages call them."""


class Given:
    """A source of values given by hand, for tests, notebooks and people without the optimizer.

    Args:
        losses: ``[m]`` or ``[m, b]``.
        gramian: ``[m, m]``; computed from ``jacobian`` if left out. In less than float64 it is rounded itself: rows
            whose cosines have an eigenvalue below that rounding, ``m · eps``, count as dependent.
        jacobian: ``[m, n]``; or ``[m, b, n]``, one row a sample, which weightings per sample can weigh.
        alignment: ``[m]`` or ``[m, b]``.
        tasks: names of the rows, ``"0"``, ``"1"``, ... if left out.
        known: all tasks that have a place, in order; those of the rows if left out.
        shares: ``[m, b]``, the coefficients of the means; ``1 / b`` if left out.

    Raises:
        MTLWeightError: if nothing is given or the values disagree about the number of tasks.
    """

    def __init__(
        self,
        *,
        losses: Tensor | None = None,
        gramian: Tensor | None = None,
        jacobian: Tensor | None = None,
        alignment: Tensor | None = None,
        tasks: tuple[str, ...] | None = None,
        known: tuple[str, ...] | None = None,
        shares: Tensor | None = None,
    ) -> None:
        self._shares = shares
        self._given: dict[str, Tensor] = {}
        counts = {} if tasks is None else {"tasks": len(tasks)}
        given = {"losses": losses, "gramian": gramian, "jacobian": jacobian, "alignment": alignment}
        for name, value in given.items():
            if value is None:
                continue
            if not isinstance(value, Tensor):
                raise MTLWeightError(
                    f"Expected {name} as a tensor, found {type(value).__name__}. Convert it with torch.as_tensor(...)."
                )
            ranks, words = _SHAPES[name]
            shape = value.shape
            if len(shape) not in ranks or shape[0] == 0 or (name == "gramian" and shape[0] != shape[1]):
                raise MTLWeightError(
                    f"Expected {name} of shape {words} with m >= 1, found {list(shape)}. Pass one row a task."
                )
            self._given[name] = value.detach()
            counts[name] = shape[0]
        if not self._given:
            raise MTLWeightError("Expected at least one of losses, gramian, jacobian, alignment; found none. Pass one.")
        if len({*counts.values()}) > 1:
            raise MTLWeightError(
                f"Expected the same number of tasks in each argument, found {counts}. Make them agree."
            )
        first = next(iter(self._given.values()))
        self.tasks = tasks or tuple(map(str, range(len(first))))
        self.known = known or self.tasks
        self.device = first.device
        self.dtype = first.dtype if first.is_floating_point() else torch.get_default_dtype()

    def losses(self) -> Tensor:
        return self._take("losses").to(statistics_dtype(self.device))

    def shares(self) -> Tensor:
        values = next((v for k, v in self._given.items() if k in ("losses", "alignment") and v.ndim == 2), None)
        if values is None:
            raise MTLWeightError(
                "A weighting per sample needs losses or alignments per sample: expected one of shape [m, b], found "
                f"none in {', '.join(self._given)}. Pass one."
            )
        even = torch.full_like(values, 1 / values.shape[1], dtype=statistics_dtype(self.device))
        return even if self._shares is None else self._shares

    def gramian(self, coefficients: Tensor | None) -> Tensor:
        if "jacobian" in self._given and (coefficients is not None or "gramian" not in self._given):
            return gramian_of(self.jacobian(coefficients))
        self._no(coefficients)
        return settled(self._take("gramian"))

    def jacobian(self, coefficients: Tensor | None) -> Tensor:
        jacobian = self._take("jacobian")
        jacobian = jacobian if jacobian.dtype == torch.float64 else jacobian.float()
        if jacobian.ndim == 2:
            self._no(coefficients)
            return jacobian
        if coefficients is None:
            return jacobian.mean(dim=1)
        return torch.einsum("tb,tbn->tn", coefficients.to(jacobian.dtype), jacobian)

    def alignment(self) -> Tensor:
        return self._take("alignment").to(statistics_dtype(self.device))

    def reference_gradient(self) -> Tensor:
        return self._take("the reference's gradient")

    def _take(self, name: str) -> Tensor:
        if name not in self._given:
            raise MTLWeightError(
                f"The weighting reads {name}, found only {', '.join(self._given)}. Pass {name}=... in the call."
            )
        return self._given[name]

    def _no(self, coefficients: Tensor | None) -> None:
        if coefficients is not None:
            raise MTLWeightError(
                "Gradients of sample-weighted losses cannot be told from a given Gramian or Jacobian of the tasks. "
                "Expected the samples' gradients, found the tasks'. Pass jacobian=... of shape [m, b, n], or use "
                "MultiTaskOptimizer.combine."
            )
