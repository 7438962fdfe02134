"""Running a user's closure once more as if it had not been run."""

import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def snapshot(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """A function that puts the modules' buffers and the global random states back to what they are now.

    These are torch's, Python's and numpy's. Generators that someone has made are not known here.
    """
    owners = dict.fromkeys(owner for module in modules for owner in module.modules())
    buffers = [(owner, name, b, b.clone()) for owner in owners for name, b in owner.named_buffers(recurse=False)]
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002  # augmentations draw from it
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore() -> None:
        with torch.no_grad():
            for owner, name, buffer, value in buffers:
                setattr(owner, name, buffer.copy_(value))  # the module may have put another tensor in its place
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)

    return restore


def uncompiled(losses: Any) -> Any:
    """Losses whose callables run without compiled code, so that all their evaluations draw the same masks.

    Compiled code has no forward derivative, or drops it without a word, and has no second derivative. For as long as a
    call lasts, other threads do without it too.

    Args:
        losses: a callable, or a list of these; anything else is returned as it is.
    """
    if isinstance(losses, (list, tuple)):
        return [uncompiled(each) for each in losses]
    if not callable(losses) or isinstance(losses, Tensor):
        return losses

    call: Callable[[], Any] = losses

    def run() -> Any:
        with torch.compiler.set_stance("force_eager"):
            return call()

    return run
