"""From what users name as parameters to the parameters."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from mtlweight._errors import MTLWeightError

Parts: TypeAlias = nn.Module | Tensor | Iterable[nn.Module | Tensor]
"""Parameters, a module, or several of either."""


def parts(name: str, value: Parts) -> list[nn.Module | Tensor]:
    """The modules and parameters, one by one; raises, under this name, if one is neither."""
    several = isinstance(value, Iterable) and not isinstance(value, (nn.Module, Tensor))
    each: list[Any] = list(value) if several else [value]  # type: ignore[arg-type]  # checked next
    for part in each:
        if not isinstance(part, (nn.Module, Tensor)):
            raise MTLWeightError(
                f"MultiTaskOptimizer: expected {name} to be parameters, a module, or several of either, found "
                f"{type(part).__name__}. See its docstring."
            )
    return each


def parameters(parts: Sequence[nn.Module | Tensor], without: Sequence[Tensor] = ()) -> list[Tensor]:
    """The parameters that require grad, as they are now: modules may have gained or frozen some."""
    left_out = {id(p) for p in without}
    each = [p for part in parts for p in (part.parameters() if isinstance(part, nn.Module) else [part])]
    return list({id(p): p for p in each if p.requires_grad and id(p) not in left_out}.values())


def called(parameter: Tensor, modules: Iterable[nn.Module], groups: Sequence[Mapping[str, Any]]) -> str:
    """What messages call a parameter: its name in one of the modules, else its place in the optimizer's groups."""
    shape = f"of shape {list(parameter.shape)}"
    for module in modules:
        for name, each in module.named_parameters():
            if each is parameter:
                return f"{name!r} {shape}"
    for i, group in enumerate(groups):
        for j, each in enumerate(group["params"]):
            if each is parameter:
                return f"parameter {j} of group {i}, {shape}"
    return f"a parameter {shape}"
