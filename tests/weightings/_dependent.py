"""Rows that depend on each other up to their own rounding."""

import torch


def _sum(R, m, _):
    return [*R[: m - 1], R[: m - 1].sum(0)]


def _opposed(R, m, _):
    return [*R[: m - 1], -1.37 * R[0]]


def _multiple(R, m, _):
    return [*R[: m - 1], 1.37 * R[0]]


def _duplicates(R, m, _):
    return [*R[: m - 1], R[0]]


def _vanishing(R, m, generator):
    shares = 0.2 + torch.rand(m, dtype=R.dtype, generator=generator)
    return [*R[: m - 1], -(shares[:-1] / shares[-1]) @ R[: m - 1]]


def _vanishing_on_a_face(R, m, generator):
    return [*_vanishing(R, max(2, m - 1), generator), *R[m - 1 : m]] if m > 2 else _vanishing(R, m, generator)


def _deficient(R, m, generator):
    rank = max(1, m // 2)
    factors = torch.randn(m - rank, rank, dtype=R.dtype, generator=generator)
    return [*R[:rank], *(factors @ R[:rank])]


FAMILIES = {
    "a sum": _sum,
    "an opposed multiple": _opposed,
    "a multiple": _multiple,
    "duplicates": _duplicates,
    "a convex combination that vanishes": _vanishing,
    "one of some rows that vanishes": _vanishing_on_a_face,
    "half as many directions": _deficient,
}
"""How the rows depend on each other; all but the last have one dependence."""


def dependent(family: str, m: int, seed: int, n: int = 1000, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Such rows, ``[m, n]``, in any order: exact but for the rounding to ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    R = torch.randn(m, n, dtype=torch.float64, generator=generator)
    rows = torch.stack(FAMILIES[family](R, m, generator))
    return rows[torch.randperm(m, generator=generator)].to(dtype)
