"""Forward engine: losses and all alignments from one forward pass with dual numbers."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from mtlweight.engines import _losses
from mtlweight.engines._again import snapshot
from mtlweight.engines._graph import bypassed


class _Closure(nn.Module):
    """The user's closure as a module that owns the user's modules, so that ``functional_call`` can swap parameters."""

    def __init__(self, modules: Sequence[nn.Module], closure: Callable[[], Any]) -> None:
        super().__init__()
        self.owned = nn.ModuleList(modules)
        self.closure = closure

    def forward(self) -> Any:
        return self.closure()


class _NoGradHolds(TorchFunctionMode):
    """Makes ``torch.no_grad`` stop forward derivatives too: torch itself lets them through."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch._C._set_grad_enabled:
            torch._C._set_fwd_grad_enabled(torch.is_grad_enabled())
        return result


def owns(modules: Sequence[nn.Module], parameters: Sequence[Tensor]) -> bool:
    """Whether the modules hold all parameters, so that a closure over the modules can be given dual ones."""
    held = {id(p) for module in modules for p in module.parameters()}
    return all(id(p) in held for p in parameters)


def losses_and_tangents(
    closure: Callable[[], Any],
    tasks: Sequence[str],
    modules: Sequence[nn.Module],
    parameters: Sequence[Tensor],
    tangents: Sequence[Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Runs the closure with dual parameters ``p + ε g``: each loss is ``ℓ + ε <∇ℓ, g>``.

    The losses keep their graph, so that the weighted backward needs no second forward. Scaled dot-product attention
    runs through its math kernel, the only one with a forward derivative.

    Args:
        closure: returns the losses; may use ``modules`` in any way.
        tasks: the tasks that the committed state knows.
        modules: own all ``parameters``.
        parameters: the point.
        tangents: ``g``, one tensor a parameter.

    Returns:
        tuple: the present tasks' losses, and their derivatives in the direction ``g``.

    Raises:
        RuntimeError: torch's own, for an operator without a forward derivative; or because the closure got hold of a
            parameter without asking its module. Buffers and random state are as before the call.
    """
    module = _Closure(modules, closure)
    names = {id(p): name for name, p in module.named_parameters()}
    restore = snapshot([module])
    try:
        with (
            forward_ad.dual_level(),
            forward_ad._set_fwd_grad_enabled(True),
            _NoGradHolds(),
            sdpa_kernel(SDPBackend.MATH),
        ):
            duals = {
                p: forward_ad.make_dual(p, g.to(p.dtype).reshape(p.shape))
                for p, g in zip(parameters, tangents, strict=True)
            }
            swapped = {names[id(p)]: dual for p, dual in duals.items()}
            losses = _losses.named(torch.func.functional_call(module, swapped, ()), tasks)
            for p in bypassed(losses.values(), duals):  # its derivative would be missing
                raise RuntimeError(f"a parameter of shape {list(p.shape)} is used outside model= and shared=")
            parts = {task: _split(loss) for task, loss in losses.items()}
            return {t: primal for t, (primal, _) in parts.items()}, {t: tangent for t, (_, tangent) in parts.items()}
    except RuntimeError:
        restore()
        raise


def cause(error: BaseException) -> str:
    """Which module failed, and the first sentence of why."""
    inside = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and not isinstance(owner, _Closure):
            inside = type(owner).__name__
    sentence = str(error).split("\n")[0].split(". ")[0].strip()
    return f"{inside}: {sentence}" if inside else sentence


def _split(loss: Tensor) -> tuple[Tensor, Tensor]:
    primal, tangent = forward_ad.unpack_dual(loss)
    return primal, torch.zeros_like(primal) if tangent is None else tangent.detach()
