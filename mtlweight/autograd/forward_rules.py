"""Forward derivatives of layers with parameters: the same numbers as torch's own, for less time and memory.

Torch lets a graph save dual numbers, and with them their tangents, and gives the tangents a graph too, which nobody
differentiates. A normalization then takes several times the time of its value, and twice the memory. Here the graph is
that of the values alone, and tangents are computed without any: a gradient that is taken of it has no tangent.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn import functional


def _bilinear(
    func: Callable[..., Tensor], given: Tensor, weight: Tensor, bias: Tensor | None = None, *options: Any, **named: Any
) -> Tensor:
    """A layer of data and parameters, with one product for each tangent that there is: torch multiplies zeros too."""
    (x, dx), (w, dw), (b, db) = _unpacked(given, weight, bias)
    value = func(x, w, b, *options, **named)
    if dx is None and dw is None:
        return value if db is None else func(given, weight, bias, *options, **named)
    with torch.no_grad():
        if dw is None:
            tangent = func(dx, w, db, *options, **named)
        elif dx is not None and func is not functional.linear and w.shape[1] == x.shape[1 - w.ndim]:
            # Of one group: both sums over channels are one.
            tangent = func(torch.cat([x, dx], 1 - w.ndim), torch.cat([dw, w], 1), db, *options, **named)
        else:
            tangent = func(x, dw, db, *options, **named)
            if dx is not None:
                tangent += func(dx, w, None, *options, **named)
    return _dual(value, tangent)


def _batch_norm(
    func: Callable[..., Tensor],
    given: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    (x, dx), (w, dw), (b, db) = _unpacked(given, weight, bias)
    others = [t for t in (w, b, running_mean, running_var) if t is not None]
    estimated = training or not (running_mean is None or running_var is None)
    usual = x.ndim > 1 and x.numel() > x.shape[1] and all(t.shape == x.shape[1:2] for t in others) and eps > 0
    if dx is None or not (usual and estimated):  # no more than one value a channel, or what torch has errors for
        return func(given, running_mean, running_var, weight, bias, training, momentum, eps)
    value, mean, scale = torch.native_batch_norm(x, w, b, running_mean, running_var, training, momentum, eps)
    with torch.no_grad():
        if running_mean is not None and running_var is not None and not training:
            mean, scale = running_mean, (running_var + eps).rsqrt()
        # The Jacobian of the normalization is symmetric: its product with a tangent is that of the backward.
        statistics = (running_mean, running_var, mean, scale, training, eps, [True, False, False])
        tangent = torch.ops.aten.native_batch_norm_backward(dx, x, w, *statistics)[0]
        channel = (-1, *[1] * (x.ndim - 2))
        if dw is not None:
            tangent.addcmul_(x - mean.view(channel), (dw * scale).view(channel))
        if db is not None:
            tangent += db.view(channel)
    return _dual(value, tangent)


def _normalized(func: Callable[..., Tensor], given: Tensor, *options: Any, **named: Any) -> Tensor:
    """Computes the value twice, with a graph and with tangents: cheap next to what torch makes of both in one."""
    parts = {k: _unpacked(v)[0] for k, v in {"": given, **named}.items() if isinstance(v, Tensor)}
    if all(tangent is None for _, tangent in parts.values()):
        return func(given, *options, **named)

    def at(values: Mapping[str, Tensor]) -> Tensor:
        rest = {name: values.get(name, value) for name, value in named.items()}
        return func(values[""], *options, **rest)

    value = at({name: primal for name, (primal, _) in parts.items()})
    with torch.no_grad():
        duals = {n: p if t is None else forward_ad.make_dual(p, t) for n, (p, t) in parts.items()}
        tangent = forward_ad.unpack_dual(at(duals)).tangent
    return _dual(value, tangent)


def _embedding(
    func: Callable[..., Tensor],
    indices: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """As the backward has it: the row of the padding is a constant, and others may be divided by their number of uses.

    Torch's own forward mode knows of neither.
    """
    ((rows, moves),) = _unpacked(weight)
    value = func(indices, rows, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    if moves is None:
        return value
    with torch.no_grad():
        tangent = functional.embedding(indices, moves)
        if padding_idx is not None:
            tangent.masked_fill_((indices == padding_idx % len(rows))[..., None], 0)
        if scale_grad_by_freq:
            tangent /= indices.flatten().bincount(minlength=len(rows))[indices][..., None]
    return _dual(value, tangent)


def _unpacked(*values: Tensor | None) -> list[tuple[Any, Any]]:
    return [(None, None) if value is None else tuple(forward_ad.unpack_dual(value)) for value in values]


def _dual(value: Tensor, tangent: Tensor) -> Tensor:
    dual: Tensor = forward_ad.make_dual(value, tangent)
    return dual


RULES: dict[Any, Callable[..., Any]] = {
    functional.linear: _bilinear,
    functional.conv1d: _bilinear,
    functional.conv2d: _bilinear,
    functional.conv3d: _bilinear,
    functional.batch_norm: _batch_norm,
    functional.embedding: _embedding,
    functional.group_norm: _normalized,
    functional.layer_norm: _normalized,
}
