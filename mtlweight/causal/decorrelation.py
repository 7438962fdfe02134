"""Modules with different features."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mtlweight.causal._penalty import Penalty, Seen


@dataclass(frozen=True)
class Decorrelation(Penalty):
    """Penalises correlations between the features of different modules.

        mean over i < j, p, q of ρ(Z_i[:, p], Z_j[:, q])²

    with ``ρ`` Pearson's correlation in the batch: centred, and with the same normaliser in covariance and variances.
    Features of one module may correlate with each other. For feature maps ``[b, c, ...]`` the channels are the
    features, and samples and positions together are what ``ρ`` is taken over.

    *Reads* the modules' outputs ``Z``. *Cost* linear in ``b``, quadratic in K times the features of a module.

    *Zero* exactly if all cross-correlations vanish; between 0 and 1. *Invariant* to permuting modules and samples, and
    to shifting and rescaling any feature. *Neutral*: a feature that is constant in the batch correlates with
    nothing, and one module has no pair: 0. In a batch of ``b`` samples, independent features give about
    ``1 / (b - 1)``.

    >>> from mtlweight.causal import Decorrelation
    >>> 0.1 * Decorrelation()
    0.1 * Decorrelation()

    *Reconstruction*: MT-CRL disentangles its modules; that this is done by in-batch correlation is ours.
    """

    def parts(self, seen: Seen) -> dict[str, Tensor]:
        """The penalty, under ``"decorrelation"``."""
        return {"decorrelation": correlation(seen.modules)}


def correlation(modules: Tensor) -> Tensor:
    """The mean squared cross-correlation of ``[K, b, ...]``."""
    z = modules.to(torch.promote_types(modules.dtype, torch.float32))
    z = z[:, :, None] if z.ndim == 2 else z
    k, features = len(z), z.shape[2]
    if k == 1:
        return z.new_zeros(())
    columns = z.transpose(1, 2).flatten(2)  # [K, features, b and positions]
    columns = columns - columns.mean(dim=2, keepdim=True)
    # A constant feature leaves rounding errors of the mean, which must not count as correlations.
    size = torch.linalg.vector_norm(z.detach().transpose(1, 2).flatten(2), dim=2, keepdim=True)
    length = columns.square().sum(dim=2, keepdim=True)
    varies = length > (8 * torch.finfo(z.dtype).eps * size).square()
    unit = (columns * torch.where(varies, length, 1.0).rsqrt() * varies).flatten(0, 1)
    squares = (unit @ unit.T).square().reshape(k, features, k, features).sum(dim=(1, 3))
    total: Tensor = squares.triu(1).sum()
    return total * (2 / (k * (k - 1) * features**2))
