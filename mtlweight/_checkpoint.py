"""What this library adds to the wrapped optimizer's state dict, and whether it may be loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtlweight._errors import MTLWeightError
from mtlweight._weighting import Weighting

KEY = "mtlweight"
"""The one key of this library."""
VERSION = 2
"""Of what is under that key."""
CONTENT = ("version", "weighting", "seed", "step", "tasks", "skipped", "dropped", "state", "memory")
"""What is under it."""


def signature(weighting: Weighting) -> str:
    """The classes that a weighting is made of, and their arguments that the layout of its state depends on."""
    named = [(name, getattr(weighting, name)) for name in weighting.layout]
    words = [
        signature(each) if isinstance(each, Weighting) else f"{name}={each!r}"
        for name, value in named
        for each in (value if isinstance(value, tuple) else [value])
    ]
    return type(weighting).__name__ + (f"({', '.join(words)})" if words else "")


def expect_loadable(own: Any, weighting: Weighting) -> None:
    """Raises if what is under the key was saved by a version with another format or with another weighting."""
    version = own.get("version") if isinstance(own, Mapping) else own
    if version != VERSION:
        raise MTLWeightError(
            f"The checkpoint is of another version: expected {VERSION}, found {version}. Load it with the release that "
            f"saved it; or delete the key {KEY!r} from the state dict to start afresh."
        )
    missing = [name for name in CONTENT if name not in own]
    if missing:
        raise MTLWeightError(
            f"The checkpoint is damaged: expected {', '.join(missing)} under the key {KEY!r}, found none. Load another "
            "one; or delete the key from the state dict to start the weighting afresh."
        )
    if own["weighting"] != signature(weighting):
        raise MTLWeightError(
            f"The checkpoint holds the state of another weighting: expected {signature(weighting)}, found "
            f"{own['weighting']}. Build the optimizer with that weighting; or delete the key {KEY!r} from the state "
            "dict to start the weighting afresh."
        )
