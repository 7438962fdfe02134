"""Forward engine: losses and all alignments from one forward pass with dual numbers."""

from __future__ import annotations

import contextlib
import functools
import importlib
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.graph import Node
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from mtlweight.engines._again import snapshot
from mtlweight.engines._graph import Backward
from mtlweight.engines._layers import Factors, made
from mtlweight.engines._tangents import RULES, along_factors


class _Closure(nn.Module):
    """The user's closure as a module that owns the user's modules, so that ``functional_call`` can swap parameters."""

    def __init__(self, modules: Sequence[nn.Module], closure: Callable[[], Any]) -> None:
        super().__init__()
        self.owned = nn.ModuleList(modules)
        self.closure = closure

    def forward(self) -> Any:
        return self.closure()


class _Factored:
    """Weights of linear layers that move along a gradient which is not made: see :class:`Factors`.

    Only a linear layer can use them so. Wherever else one is used, a dual number takes its place.

    Args:
        factors: by weight, under the name that the modules have for it.
    """

    def __init__(self, factors: Mapping[Tensor, Factors]) -> None:
        self._factors = {id(weight): (weight, gradient) for weight, gradient in factors.items()}
        self._duals: dict[int, Tensor] = {}
        self._seen: set[Node | None] = set()

    def layer(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether a call is a linear layer with one of them."""
        if func is not functional.linear or kwargs or not torch.is_grad_enabled():
            return False
        (weight, factors), given = self._factors.get(id(args[1]), (None, None)), args[0]
        if weight is None or factors is None or id(given) in self._factors:
            return False
        return given.dtype == factors.x.dtype and not torch.is_autocast_enabled(given.device.type)

    def linear(self, given: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """What the layer gives."""
        own = weight.view_as(weight)  # by whose node this use is known
        self._seen.add(own.grad_fn)
        return along_factors(given, own, bias, self._factors[id(weight)][1])

    def replaced(self, value: Any) -> Any:
        """Arguments of another function, with dual numbers in the place of these weights."""
        if type(value) in (list, tuple):
            return type(value)(map(self.replaced, value))
        if id(value) not in self._factors or not torch.is_grad_enabled():
            return value
        if id(value) not in self._duals:
            weight, factors = self._factors[id(value)]
            self._duals[id(value)] = dual = forward_ad.make_dual(weight, factors.dense.to(weight.dtype))
            self._seen.add(dual.grad_fn)
        return self._duals[id(value)]

    def unseen(self, graph: Backward) -> bool:
        """Whether a weight was used without anyone seeing it, so that a derivative is missing."""
        nodes = [weight.grad_fn for weight, _ in self._factors.values()]
        return any(user not in self._seen for node in nodes if node is not None for user in graph.users.get(node, ()))


class _Corrections(TorchFunctionMode):
    """Things that torch's forward mode does otherwise than is right, or cheap."""

    checkpointed = False

    def __init__(self, factored: _Factored | None = None) -> None:
        super().__init__()
        self._factored = factored

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        hooks = _saved_tensors_hooks(True)
        if hooks is not None and "checkpoint_hook" in hooks[0].__qualname__:
            self.checkpointed = True  # no error yet: an older torch that is left by one keeps its hooks
        plain = torch._C._functorch.peek_interpreter_stack() is None  # not inside of vmap and the like
        if plain and func in (torch.autograd.grad, torch.autograd.backward, Tensor.backward):
            raise RuntimeError("a gradient inside the losses has no forward derivative")
        kwargs, factored = kwargs or {}, self._factored
        if factored is not None and func not in NO_ARITHMETIC and (func in VIEWS or not _gets(func)):
            if plain and factored.layer(func, args, kwargs):
                return factored.linear(*args)
            args, kwargs = factored.replaced(args), {name: factored.replaced(v) for name, v in kwargs.items()}
        rule = RULES.get(func) if args and plain else None
        result = func(*args, **kwargs) if rule is None else rule(func, *args, **kwargs)
        if func is torch._C._set_grad_enabled:
            # `no_grad` is to stop forward derivatives too: torch itself lets them through.
            torch._C._set_fwd_grad_enabled(torch.is_grad_enabled())
        return result


NO_ARITHMETIC = (Tensor.register_hook, Tensor.retain_grad)
"""What a weight is asked for itself, whatever stands for it in its uses."""
VIEWS = (Tensor.T.__get__, Tensor.mT.__get__, Tensor.H.__get__)  # type: ignore[attr-defined]  # descriptors
"""Attributes that are uses."""


def _gets(func: Any) -> bool:
    return getattr(func, "__name__", "") == "__get__"


_saved_tensors_hooks: Callable[[bool], Any] = torch._C._autograd._top_saved_tensors_default_hooks


def names(modules: Sequence[nn.Module]) -> dict[int, list[str]]:
    """Under which names :func:`losses_and_tangents` swaps each parameter, by its ``id``.

    Tied parameters have several; those of a module that is reached by several names have one.
    """
    found: dict[int, list[str]] = {}
    seen: set[nn.Module] = set()
    for i, module in enumerate(modules):
        for prefix, part in module.named_modules(seen, f"owned.{i}"):
            for name, parameter in part._parameters.items():  # named_parameters takes ten times as long
                found.setdefault(id(parameter), []).append(f"{prefix}.{name}")
    return found


def losses_and_tangents(
    closure: Callable[[], Any],
    named: Callable[[Any], dict[str, Tensor]],
    modules: Sequence[nn.Module],
    names: Mapping[int, Sequence[str]],
    parameters: Sequence[Tensor],
    tangents: Sequence[Tensor | Factors],
    judge: Callable[[dict[str, Tensor], dict[str, Tensor]], dict[str, Tensor]],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Runs the closure with dual parameters ``p + ε g``: each loss is ``ℓ + ε <∇ℓ, g>``.

    The losses keep their graph, so that the weighted backward needs no second forward. Scaled dot-product attention
    runs through its math kernel, the only one with a forward derivative.

    Args:
        closure: returns the losses; may use ``modules`` in any way.
        named: what the closure returns, by task.
        modules: own all ``parameters``.
        names: what :func:`names` says of the modules.
        parameters: the point.
        tangents: ``g``, one a parameter.
        judge: takes losses and derivatives, and returns the derivatives, or raises a ``RuntimeError``.

    Returns:
        tuple: the present tasks' losses, and their derivatives in the direction ``g``.

    Raises:
        Exception: that of a custom function's ``jvp``.
        RuntimeError: torch's own, for an operator without a forward derivative; or because the closure got hold of a
            parameter without asking its module; or the judge's. Buffers and random state are as before the call.
    """
    _load_formulas()
    module = _Closure(modules, closure)
    restore = snapshot(modules)
    try:
        with forward_ad.dual_level(), forward_ad._set_fwd_grad_enabled(True):
            pairs = list(zip(parameters, tangents, strict=True))
            duals = {  # of a weight whose gradient is not made, another name alone
                p: p.view_as(p) if isinstance(g, Factors) else forward_ad.make_dual(p, g.to(p.dtype).reshape(p.shape))
                for p, g in pairs
            }
            _own_gradients(duals.values())
            swapped = {name: dual for p, dual in duals.items() for name in names[id(p)]}
            factors = {duals[p]: g for p, g in pairs if isinstance(g, Factors)}
            factored = _Factored(factors) if factors else None
            with _Corrections(factored) as corrections, sdpa_kernel(SDPBackend.MATH):
                returned = torch.func.functional_call(module, swapped, (), tie_weights=False)
            if corrections.checkpointed:
                # Torch would notice in the backward: the second forward has no dual numbers, and saves fewer tensors.
                raise RuntimeError("activation checkpointing recomputes without forward derivatives")
            losses = named(returned)
            graph = Backward(losses.values())
            if factored is not None and factored.unseen(graph):
                raise _UnseenError
            for p in graph.bypassed(duals):  # its derivative would be missing
                raise RuntimeError(f"a parameter of shape {list(p.shape)} is used outside model= and shared=")
            parts = {task: _split(loss) for task, loss in losses.items()}
        primals, found = ({task: part[k] for task, part in parts.items()} for k in (0, 1))
        return primals, judge(primals, found)
    except _UnseenError:
        restore()
        every = [made(g) for g in tangents]
        return losses_and_tangents(closure, named, modules, names, parameters, every, judge)
    except Exception:  # a `jvp` may raise anything
        restore()
        raise


class _UnseenError(Exception):
    """A weight whose gradient was not made was used past torch's function modes: it has to be made."""


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

    for dual in duals:
        if dual.requires_grad:  # not without gradients, of which the losses will say more
            dual.register_hook(own)


def cause(error: BaseException) -> str:
    """Which module and custom function failed, and the first sentence of why."""
    module = function = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner, called = frame.f_locals.get("self"), frame.f_locals.get("cls")
        if isinstance(owner, nn.Module) and not isinstance(owner, _Closure):
            module, function = f"{type(owner).__name__}: ", ""
        elif isinstance(called, type) and issubclass(called, Function) and frame.f_code.co_name == "apply":
            function = f"{called.__name__}: "
    sentence = str(error).split("\n")[0].split(". ")[0].strip()
    kind = "" if isinstance(error, RuntimeError) else f"{type(error).__name__} "
    return f"{module}{function}{kind}{sentence}".rstrip()


def _split(loss: Tensor) -> tuple[Tensor, Tensor]:
    primal, tangent = forward_ad.unpack_dual(loss)
    return primal, torch.zeros_like(primal) if tangent is None else tangent.detach()
