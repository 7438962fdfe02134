"""Which gradients cancel: convex combinations of rows that vanish."""

import numpy as np
import numpy.typing as npt

from mtlweight.solvers._nonnegative import shortest
from mtlweight.solvers._rows import DEPENDENT, NONE, NULL, Array, eigen


def cancelling(C: Array) -> Array:
    """A vanishing combination with nonnegative coefficients and the largest support; zeros if there is none."""
    z = np.zeros(len(C))
    while not z.all():
        S, rest = z > 0.0, np.flatnonzero(z == 0.0)
        P, shares = outside(C, S)
        P = P[np.ix_(rest, rest)]
        lengths = np.sqrt(np.maximum(P.diagonal(), 0.0))
        vanished = lengths < DEPENDENT
        if vanished.any():
            more: Array = vanished.astype(np.float64)  # in the span of S, whose cone is all of its span
        else:
            more = shortest(P / lengths / lengths[:, None], np.ones(len(P))) / lengths
            more = _null_part(P, more)  # the ridge cannot tell what cancels from what nearly does
            if not more.any():
                break
        more /= more.max()
        if S.any():
            share = -shares[:, rest] @ more
            z[S] = share + max(((z[S] - share) / z[S]).max(), 1.0) * z[S]
        z[rest] = more
        z /= z.max()
    return z


def outside(C: Array, S: npt.NDArray[np.bool_]) -> tuple[Array, Array]:
    """Inner products of what is left of each row outside of the span of those in S, and its shares in these."""
    if not S.any():
        return C, np.zeros((0, len(C)))
    shares = np.asarray(np.linalg.lstsq(C[np.ix_(S, S)], C[S], rcond=len(C) * NULL)[0], dtype=np.float64)
    P = C - C[:, S] @ shares
    return (P + P.T) / 2, shares


def _null_part(C: Array, z: Array) -> Array:
    """What of a combination vanishes altogether, if its coefficients are not negative; zeros otherwise.

    Where rows cancel, the ridge leaves coefficients of about `1e-10` of the others on rows that take no part.
    """
    support = z > 0.0
    values, vectors = eigen(C[np.ix_(support, support)])
    null = vectors[:, values < NULL * len(values)]
    part = np.zeros_like(z)
    part[support] = null @ (null.T @ z[support])
    part[part < NONE * part.sum()] = 0.0
    return part if np.abs(C @ part).max() <= NONE * part.sum() else np.zeros_like(z)
