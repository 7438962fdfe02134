"""What this library adds to the wrapped optimizer's state dict, and whether it may be loaded."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from mtlweight._errors import MTLWeightError
from mtlweight._weighting import Weighting

KEY = "mtlweight"
"""The one key of this library."""
VERSION = 3
"""Of what is under that key."""
ADDED = ("engines", "fallbacks", "uncommitted")
"""What version 2 did not have."""
CONTENT = ("version", "weighting", "seed", "step", "tasks", "skipped", "dropped", "state", "memory", *ADDED)
"""What is under it."""


def saved(record: Any) -> dict[str, Any]:
    """What goes under the key.

    Args:
        record: the optimizer's.
    """
    engines = {**_place(record.settings.optimizer), "broken": dict(record.broken), "uses": dict(record.uses)}
    return {
        "version": VERSION,
        "weighting": signature(record.settings.weighting),
        "seed": record.seed,
        "step": record.step,
        "tasks": [*record.tasks],
        "skipped": record.skipped,
        "dropped": dict(record.dropped),
        "state": record.state,
        "memory": record.memory,
        "engines": engines,
        "fallbacks": dict(record.fallbacks),
        "uncommitted": record.uncommitted,
    }


def restore(record: Any, own: Mapping[str, Any]) -> None:
    """Puts back into the record what was under the key. What is missing there stays as it is.

    Args:
        record: the optimizer's.
        own: what :func:`saved` gave.
    """
    seed = own.get("seed")
    record.seed = record.seed if seed is None else seed
    record.step, record.tasks, record.state = own["step"], tuple(own["tasks"]), own["state"]
    record.memory, record.skipped, record.dropped = own["memory"], own["skipped"], Counter(own["dropped"])
    if "engines" in own:
        # What an engine could not do may be possible elsewhere: it costs one attempt to see.
        place, engines = _place(record.settings.optimizer), own["engines"]
        here = engines if {name: engines.get(name) for name in place} == place else {}
        record.broken, record.uses = dict(here.get("broken", {})), Counter(here.get("uses", {}))
        record.fallbacks, record.uncommitted = Counter(own["fallbacks"]), own["uncommitted"]


def _place(optimizer: Optimizer) -> dict[str, str]:
    """What decides, beside the model, which engines can run."""
    kinds = {p.device.type for group in optimizer.param_groups for p in group["params"]}
    return {"torch": str(torch.__version__), "devices": ", ".join(sorted(kinds))}


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
    if version not in (2, VERSION):
        raise MTLWeightError(
            f"The checkpoint is of another version: expected {VERSION}, found {version}. Load it with the release that "
            f"saved it; or delete the key {KEY!r} from the state dict to start afresh."
        )
    missing = [name for name in CONTENT if name not in own and (version == VERSION or name not in ADDED)]
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
