"""In which order each task meets the others."""

import torch
from torch import Tensor

from mtlweight._view import View


def random_orders(view: View) -> Tensor:
    """For each present task a random order of the other present ones, by their rows: ``[m, m - 1]``.

    It is drawn for all tasks that have a place: who is absent is left out, and changes nothing else.
    """
    known, places = len(view.known), list(view.places)
    keys = torch.rand(known, known, dtype=view.dtype, device=view.device, generator=view.generator)
    keys = keys[places][:, places].fill_diagonal_(2.0)  # a task comes last in its own order, and is left out
    return keys.argsort(dim=1)[:, :-1]
