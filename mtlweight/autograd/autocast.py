"""Autocast is for the user's computations, not for what is measured of them."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")
DEVICES = ("cpu", "cuda", "mps", "xpu")


def full_precision() -> contextlib.AbstractContextManager[Callable[[Any], Any]]:
    """Within the context nothing is autocast, but for the user's callables: it yields what puts it back on in them.

    That takes a callable, or a collection of these, and returns one that runs under the autocast that was on outside;
    anything else it returns as it is.
    """
    on = {device: torch.get_autocast_dtype(device) for device in DEVICES if torch.is_autocast_enabled(device)}
    return _switched_off(on) if on else contextlib.nullcontext(_as_it_is)


def in_full_precision(function: Callable[P, T]) -> Callable[P, T]:
    """The function, with nothing of it autocast."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with full_precision():
            return function(*args, **kwargs)

    return run


def _as_it_is(given: Any) -> Any:
    return given


@contextlib.contextmanager
def _switched_off(on: Mapping[str, torch.dtype]) -> Iterator[Callable[[Any], Any]]:
    def as_outside(given: Any) -> Any:
        if isinstance(given, Tensor):
            return given
        if isinstance(given, (list, tuple)):
            return type(given)(map(as_outside, given)) if type(given) in (list, tuple) else given
        if isinstance(given, Mapping):
            return {key: as_outside(value) for key, value in given.items()}
        if not callable(given):
            return given

        @functools.wraps(given, updated=())
        def run(*args: Any) -> Any:
            # Casts are cached by parameter as long as the outermost autocast is on; the parameter may have moved since,
            # or have been cast without a graph.
            torch.clear_autocast_cache()
            with contextlib.ExitStack() as stack:
                stack.callback(torch.clear_autocast_cache)
                for device, dtype in on.items():
                    stack.enter_context(torch.autocast(device, dtype))
                return given(*args)

        return run

    with contextlib.ExitStack() as stack:
        for device in on:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield as_outside
