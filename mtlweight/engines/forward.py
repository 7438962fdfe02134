"""Forward engine: losses and all alignments from one forward pass with dual numbers."""

import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.autograd import Function

from mtlweight.autograd import forward_mode
from mtlweight.autograd.graph import Graph
from mtlweight.autograd.replay import snapshot

Losses = dict[str, Tensor]


def losses_and_alignments(
    closure: Callable[[], Any],
    named: Callable[[Any], Losses],
    modules: Sequence[nn.Module],
    names: Mapping[int, Sequence[str]],
    parameters: Sequence[Tensor],
    tangents: Sequence[Tensor],
    judge: Callable[[Losses, Losses], Losses],
) -> tuple[Losses, Losses]:
    """Runs the closure with dual parameters ``p + ε g``: each loss is ``ℓ + ε <∇ℓ, g>``.

    The losses keep their graph, so that the weighted backward needs no second forward.

    Args:
        closure: returns the losses; may use ``modules`` in any way.
        named: what the closure returns, by task.
        modules: own all ``parameters``.
        names: of the parameters in the modules.
        parameters: the point.
        tangents: ``g``, one a parameter.
        judge: takes losses and alignments, and returns the alignments, or raises a ``RuntimeError``.

    Raises:
        Exception: that of a custom function's ``jvp``.
        RuntimeError: torch's own, for an operator without a forward derivative; or because the closure got hold of a
            parameter without asking its module; or the judge's. Buffers and random state are as before the call.
    """
    restore = snapshot(modules)
    try:
        with forward_mode.dual_level():
            pairs = zip(parameters, tangents, strict=True)
            duals = {p: forward_ad.make_dual(p, g.to(p.dtype).reshape(p.shape)) for p, g in pairs}
            by_name = {name: dual for p, dual in duals.items() for name in names[id(p)]}
            losses = named(forward_mode.run(closure, modules, by_name))
            for p in Graph(losses.values()).bypassed(duals):  # its derivative would be missing
                raise RuntimeError(f"a parameter of shape {list(p.shape)} is used outside model= and shared=")
            parts = {task: _split(loss) for task, loss in losses.items()}
        primals, found = ({task: part[k] for task, part in parts.items()} for k in (0, 1))
        return primals, judge(primals, found)
    except Exception:  # a `jvp` may raise anything
        restore()
        raise


def cause(error: BaseException) -> str:
    """Which module and custom function failed, and the first sentence of why."""
    module = function = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner, called = frame.f_locals.get("self"), frame.f_locals.get("cls")
        if isinstance(owner, nn.Module) and not isinstance(owner, forward_mode.Closure):
            module, function = f"{type(owner).__name__}: ", ""
        elif isinstance(called, type) and issubclass(called, Function) and frame.f_code.co_name == "apply":
            function = f"{called.__name__}: "
    sentence = str(error).split("\n")[0].split(". ")[0].strip()
    kind = "" if isinstance(error, RuntimeError) else f"{type(error).__name__} "
    return f"{module}{function}{kind}{sentence}".rstrip()


def _split(loss: Tensor) -> tuple[Tensor, Tensor]:
    primal, tangent = forward_ad.unpack_dual(loss)
    return primal, torch.zeros_like(primal) if tangent is None else tangent.detach()
