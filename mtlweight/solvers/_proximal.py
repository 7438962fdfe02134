"""The min-norm point in lengths and cosines, by a proximal point iteration."""

import numpy as np

from mtlweight.solvers._nonnegative import nonnegative_quadratic
from mtlweight.solvers._rows import EPS, RIDGE, Array, ridged


def proximal(C: Array, d: Array) -> Array:
    """Minimise ½zᵀCz - dᵀz over z >= 0, up to the length of z, which is infinite where the rows cancel."""
    H = ridged(C)
    z = nonnegative_quadratic(H, d, np.maximum(np.linalg.solve(H, d), 0.0))
    residual = kkt(C, d, z)
    while residual > EPS:
        closer = nonnegative_quadratic(H, d + RIDGE * z, z)
        last, residual = residual, kkt(C, d, closer)
        if residual < last:
            z = closer
        if residual > last / 2:
            break
    return z


def kkt(C: Array, d: Array, z: Array) -> float:
    """The residual of z, whatever its length."""
    v = z / (z @ d)
    x = C @ v
    return float(np.maximum((v @ x) * d - x, 0.0).max() / v.sum())
