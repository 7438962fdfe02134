"""From what the user passed to ``combine`` to a batch."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from mtlweight._errors import MTLWeightError
from mtlweight.batch.batch import Batch
from mtlweight.batch.evaluate import evaluated
from mtlweight.batch.in_parts import InParts
from mtlweight.batch.joined import Joined
from mtlweight.batch.lookahead import look_ahead
from mtlweight.batch.losses import deferred
from mtlweight.batch.reference import Reference
from mtlweight.batch.source import Source
from mtlweight.batch.step import Step
from mtlweight.batch.whole import Whole
from mtlweight.distributed.sharded import expect_whole

Known = Callable[[], Reference] | None


def read(losses: Any, reference: Any, step: Step) -> Batch:
    """Evaluates losses and reference as the weighting needs them.

    Args:
        losses: mapping, tensor, or callable that returns one of these; or a list of callables, one a part of the batch.
        reference: scalar or ``[b]`` tensor; several in a list (their mean) or a mapping by main task (their sum);
            a callable that returns one of these; or ``None``.
        step: what was known before.

    Raises:
        MTLWeightError: for losses or a reference of the wrong form.
    """
    name, use = step.settings.name, step.reference_use
    wanted = step.compares or bool(step.outer)
    if wanted:
        expect_whole(step.trainable, f"{name} takes the gradient of a reference")
    # Where it is missing in some processes alone, these learn of it in the exchange of its gradient.
    expected = reference is not None or (step.processes is not None and wanted)
    known: Known = functools.cache(lambda: Reference(reference, step)) if expected else None

    def evaluate(step: Step, known: Known) -> Source:
        return joined(step, known, None, lambda: _own(losses, known, step))

    def plain(step: Step, known: Known = None, aligned: dict[str, Tensor] | None = None) -> Source:
        def own() -> Whole | InParts:
            if _in_parts(losses):
                return InParts(losses, step, known, None if step.processes else aligned)
            return Whole(step.named(losses()), step, known, None if step.processes else aligned)

        return joined(step, known, aligned, own)

    def joined(step: Step, known: Known, aligned: Any, own: Callable[[], Whole | InParts]) -> Source:
        return own() if step.processes is None else Joined(own, step, known, aligned)

    if known is not None and step.compares and use is not None and use.lookahead is not None:
        for what, passed in (("losses", losses), ("reference", reference)):
            if not deferred(passed):
                raise MTLWeightError(
                    f"{name} looks one step ahead and evaluates everything there: expected {what} as a callable, "
                    "found computed tensors. Pass combine(lambda: losses(model, batch), reference=lambda: ...)."
                )
        batch = Batch(look_ahead(evaluate, plain, known, step))
    else:
        if known is not None and wanted:
            known()  # before the losses, if the weighting has announced that it compares; else when it does so
        batch = Batch(evaluate(step, known))
    batch.expect_main()
    return batch


def _in_parts(losses: Any) -> bool:
    return isinstance(losses, (list, tuple)) and bool(losses) and deferred(losses)


def _own(losses: Any, known: Known, step: Step) -> Whole | InParts:
    """This process's losses."""
    if not _in_parts(losses):
        return evaluated(losses, known, step)
    if step.settings.engine == "features":
        raise MTLWeightError(
            "engine='features' reads the representation of the whole batch: expected its losses at once, found "
            "them in parts. Use engine='rows'."
        )
    return InParts(losses, step, known)
