"""Runs a user's closure with dual parameters, and corrects what torch's forward mode does otherwise than is right."""

import contextlib
import functools
import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from mtlweight.autograd.forward_rules import RULES

_saved_tensors_hooks: Callable[[bool], Any] = torch._C._autograd._top_saved_tensors_default_hooks


class Closure(nn.Module):
    """The user's closure as a module that owns the user's modules, so that ``functional_call`` can swap parameters."""

    def __init__(self, modules: Sequence[nn.Module], closure: Callable[[], Any]) -> None:
        super().__init__()
        self.owned = nn.ModuleList(modules)
        self.closure = closure

    def forward(self) -> Any:
        """What the closure returns."""
        return self.closure()


def names(modules: Sequence[nn.Module]) -> dict[int, list[str]]:
    """The names of each parameter in a :class:`Closure` that owns the modules, by the parameter's ``id``.

    Tied parameters have several; those of a module that is reached by several names have one.
    """
    found: dict[int, list[str]] = {}
    seen: set[nn.Module] = set()
    for i, module in enumerate(modules):
        for prefix, part in module.named_modules(seen, f"owned.{i}"):
            for name, parameter in part.named_parameters(recurse=False):
                found.setdefault(id(parameter), []).append(f"{prefix}.{name}")
    return found


@contextlib.contextmanager
def dual_level() -> Iterator[None]:
    """Within the context there are dual numbers, also where gradients are off."""
    _load_formulas()
    with forward_ad.dual_level(), forward_ad._set_fwd_grad_enabled(True):
        yield


def run(closure: Callable[[], Any], modules: Sequence[nn.Module], duals: Mapping[str, Tensor]) -> Any:
    """What the closure returns where the modules have dual parameters.

    Scaled dot-product attention runs through its math kernel, the only one with a forward derivative.

    Args:
        closure: may use the modules in any way.
        modules: own the parameters.
        duals: by the :func:`names` of the parameters.

    Raises:
        RuntimeError: torch's own, for an operator without a forward derivative.
    """
    _own_gradients(duals.values())
    with Corrections() as corrections, sdpa_kernel(SDPBackend.MATH):
        returned = torch.func.functional_call(Closure(modules, closure), dict(duals), (), tie_weights=False)
    if corrections.checkpointed:
        # Torch would notice in the backward: the second forward has no dual numbers, and saves fewer tensors.
        raise RuntimeError("activation checkpointing recomputes without forward derivatives")
    return returned


class Corrections(TorchFunctionMode):
    """Things that torch's forward mode does otherwise than is right, or cheap."""

    checkpointed = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        hooks = _saved_tensors_hooks(True)
        if hooks is not None and "checkpoint_hook" in hooks[0].__qualname__:
            self.checkpointed = True  # no error yet: an older torch that is left by one keeps its hooks
        plain = torch._C._functorch.peek_interpreter_stack() is None  # not inside of vmap and the like
        if plain and func in (torch.autograd.grad, torch.autograd.backward, Tensor.backward):
            raise RuntimeError("a gradient inside the losses has no forward derivative")
        rule = RULES.get(func) if args and plain else None
        result = func(*args, **(kwargs or {})) if rule is None else rule(func, *args, **(kwargs or {}))
        if func is torch._C._set_grad_enabled:
            # `no_grad` is to stop forward derivatives too: torch itself lets them through.
            torch._C._set_fwd_grad_enabled(torch.is_grad_enabled())
        return result


@functools.cache
def _load_formulas() -> None:
    """Torch loads some forward formulas when first asked for one, and warns whoever asked of how it compiles them."""
    with warnings.catch_warnings(), contextlib.suppress(ImportError):
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
        importlib.import_module("torch._decomp.decompositions_for_jvp")


def _own_gradients(duals: Iterable[Tensor]) -> None:
    """Lets no two parameters share the memory of their gradient, where changes in place would act on both.

    Of two that were added torch copies the one gradient; but not if it comes by way of two dual numbers.
    """
    seen: set[int] = set()

    def own(gradient: Tensor) -> Tensor | None:
        try:
            place = gradient.untyped_storage().data_ptr()
        except NotImplementedError:  # several gradients at once, which are for nobody to change in place
            return None
        if place in seen:
            return gradient.clone()
        seen.add(place)
        return None

    for dual in {id(dual): dual for dual in duals}.values():
        if dual.requires_grad:  # not without gradients, of which the losses will say more
            dual.register_hook(own)
