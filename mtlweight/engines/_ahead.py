"""One step ahead of the present, and back as if it had not been taken."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from mtlweight._errors import MTLWeightError

Gradients = Mapping[Tensor, Tensor | None]


@contextlib.contextmanager
def one_step_ahead(optimizer: Optimizer, gradients: Gradients) -> Iterator[None]:
    """Within the context, parameters are where one step of the optimizer along these gradients leads.

    A twin of the optimizer takes the step, so that the optimizer's own state, whatever it is made of, is not touched.
    Afterwards parameters have the values that they had. No hooks run, and ``.grad`` is left alone.

    Memory: a copy of the parameters and of the optimizer's state.

    Args:
        optimizer: any optimizer that keeps its state in ``state`` and ``param_groups``.
        gradients: the gradient of each parameter; one without is not moved.

    Raises:
        MTLWeightError: if the optimizer needs a closure, or keeps its state elsewhere.
    """
    within = any(isinstance(value, Optimizer) for value in vars(optimizer).values())
    if within or not {"state", "param_groups"} <= vars(optimizer).keys():
        raise MTLWeightError(
            "Looking ahead takes a step with a copy of the optimizer's state: expected a wrapped optimizer with "
            f"`state` and `param_groups` of its own, found {type(optimizer).__name__}, which has them elsewhere. Wrap "
            "the innermost optimizer."
        )
    parameters = _parameters(optimizer)
    before = [p.detach().clone() for p in parameters]
    twin = object.__new__(type(optimizer))
    vars(twin).update(vars(optimizer))
    copied = copy.deepcopy((optimizer.state, optimizer.param_groups), {id(p): p for p in parameters})
    twin.state, twin.param_groups = copied
    try:
        step(twin, gradients)
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)


def step(optimizer: Optimizer, gradients: Gradients) -> None:
    """One step along given gradients: without the optimizer's hooks, and with ``.grad`` left as it was.

    Raises:
        MTLWeightError: if the optimizer needs a closure.
    """
    function = type(optimizer).step
    if inspect.signature(function).parameters.get("closure", _OPTIONAL).default is inspect.Parameter.empty:
        raise MTLWeightError(
            "Looking ahead takes one step along given gradients: expected an optimizer whose step needs no closure, "
            f"found {type(optimizer).__name__}. Use another optimizer, or lookahead=False."
        )
    if getattr(function, "hooked", False):  # torch wraps it once more, to run hooks and the profiler
        function = inspect.unwrap(function, stop=lambda f: not getattr(f, "hooked", False))
    parameters = _parameters(optimizer)
    own = [p.grad for p in parameters]
    hooks = {name: value for name, value in vars(optimizer).items() if name in _HOOKS}
    vars(optimizer).update({name: type(value)() for name, value in hooks.items()})  # a step may call another's
    try:
        for p in parameters:
            p.grad = gradients.get(p)
        function(optimizer)
    finally:
        vars(optimizer).update(hooks)
        for p, gradient in zip(parameters, own, strict=True):
            p.grad = gradient


_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_OPTIONAL = inspect.Parameter("closure", inspect.Parameter.KEYWORD_ONLY, default=None)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
