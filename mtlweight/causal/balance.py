"""All modules in use."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mtlweight.causal._penalty import Penalty, Seen


@dataclass(frozen=True)
class Balance(Penalty):
    """Penalises modules that are used little: ``log K - H(p)`` with ``p_k = Σ_t A[t, k] / Σ A`` and ``H`` the entropy.

    *Reads* the graph. *Zero* exactly if all modules are used alike (always, for one module), ``log K`` at most.
    *Invariant* to permuting tasks and modules, and to rescaling the graph.

    >>> from mtlweight.causal import Balance
    >>> 0.1 * Balance()
    0.1 * Balance()

    *Reconstruction* of MT-CRL's graph regularisation; the constant ``log K`` makes 0 its least value.
    """

    def parts(self, seen: Seen) -> dict[str, Tensor]:
        """The penalty, under ``"balance"``."""
        use = seen.gates.sum(dim=0)
        total = use.sum()
        share = use / torch.where(total > 0, total, 1.0)
        logs = share.clamp(min=torch.finfo(share.dtype).tiny).log()  # finite slope where a module is not used at all
        return {"balance": math.log(len(share)) + (share * logs).sum()}
