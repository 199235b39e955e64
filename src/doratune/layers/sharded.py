"""Weights whose parts lie on several processes (DTensor): each works on its own part, and W never travels.

A row's squared norm is a sum over columns, so what has to be exchanged is at most one number a row, ``[out]``: summed
where processes hold columns (row-wise tensor parallelism), gathered where they hold rows and all of them are asked for.

Under FSDP a layer's forward sees whole parameters, and only what happens between forwards (initialising, saving,
loading, checking) meets parts. Under tensor parallelism the forward meets them, too: ``forward`` computes an adapted
layer from this process's part, in the place where the base would multiply by W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from doratune.config import AdapterConfig
from doratune.layers.kind import Kind, Options
from doratune.layers.weights import WeightRows, is_dtensor


def whole(t: Tensor) -> Tensor:
    """All of a tensor, on every process; for small tensors (A, B, m). Every process of its mesh has to call it."""
    return t.full_tensor() if is_dtensor(t) else t  # type: ignore[attr-defined]


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, the same on every process, into a parameter; of a DTensor each process fills its part."""
    if is_dtensor(target):
        target.to_local().copy_(_part(value, target))  # type: ignore[attr-defined]
    else:
        target.copy_(value)


def local(t: Tensor) -> Tensor:
    """This process's part of a tensor; all of it where it does not lie in parts."""
    return t.to_local() if is_dtensor(t) else t  # type: ignore[attr-defined]


def as_part_of(weight: Any, part: Tensor) -> Tensor:
    """A tensor of which every process gives its part, cut as ``weight`` is."""
    from torch.distributed.tensor import DTensor

    shape, stride = weight.shape, weight.stride()
    return DTensor.from_local(part, weight.device_mesh, weight.placements, run_check=False, shape=shape, stride=stride)


def on_all(weight: Any, t: Tensor) -> Tensor:
    """A tensor that is the same everywhere, as something to multiply a weight with that lies in parts."""
    if not is_dtensor(weight):
        return t
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(t, weight.device_mesh, [Replicate()], run_check=False)


def largest(weight: Any, value: float) -> float:
    """The largest of the values that the processes of a weight's mesh have, so that they decide alike."""
    if not is_dtensor(weight):
        return value
    highest = torch.tensor(value, device=weight.to_local().device)
    torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX, weight.device_mesh.get_group())
    return float(highest)


def same_everywhere(tensors: Iterable[Tensor]) -> None:
    """Give every process the first one's values: they may have drawn theirs from other seeds."""
    for t in tensors:
        torch.distributed.broadcast(t, 0)


def _part(value: Tensor, like: Any) -> Tensor:
    """This process's part of a whole tensor."""
    shape, offset = _place(like)
    for dim, (size, start) in enumerate(zip(shape, offset, strict=True)):
        value = value.narrow(dim, start if size else 0, size)
    return value


def _place(t: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and offset of this process's part."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(t.shape, t.device_mesh, t.placements)
    return tuple(shape), tuple(offset)


def rows_of_part(weight: Any, transposed: bool = False) -> WeightRows:
    """The rows and columns of W that this process holds; ``collect`` makes whole sums of its sums."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    local = weight.detach().to_local()
    sizes, starts = _place(weight)
    parts = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    out, columns = weight.shape
    if transposed:
        local, parts, out, columns = local.T, parts[::-1], columns, out

    def placement(p: Any) -> Any:
        if not p.is_shard():
            return Replicate()
        if p.dim != (1 if transposed else 0):
            return Partial()
        return Shard(0) if transposed else p

    def collect(sums: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        placements = [placement(p) for p in weight.placements]
        mesh = weight.device_mesh
        return DTensor.from_local(
            sums, mesh, placements, run_check=False, shape=torch.Size([out]), stride=(1,)
        ).full_tensor()

    return WeightRows((out, columns), weight, _one_tile(local), part=(parts[0], parts[1]), collect=collect)


# Tensor parallelism


def refusal(base: nn.Module, config: AdapterConfig) -> str | None:
    """Why a layer whose weight lies in parts cannot be adapted, or None."""
    weight: Any = getattr(base, "weight", None)
    if not is_dtensor(weight):
        return None
    if type(base) is not nn.Linear:
        return f"tensor parallelism is served for nn.Linear only, this is a {type(base).__name__}"
    if type(weight.to_local()) not in (Tensor, nn.Parameter):
        return "its weight is quantised and lies in parts on several processes; load one of both ways"
    if len(weight.placements) != 1 or not weight.placements[0].is_shard():
        return f"its weight lies on {weight.device_mesh} as {weight.placements}; served are rows or columns of W"
    if config.bias != "none" and base.bias is not None:
        return f"bias {config.bias!r} is not trained under tensor parallelism; use bias 'none'"
    return None


def new_parameter(weight: Tensor, name: str, *shape: int) -> nn.Parameter:
    """An uninitialised parameter A, B or m (``name``), cut over the processes as its part of W is."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    by_rows = _holds_rows(weight)
    placement = Replicate() if by_rows == (name == "A") else Shard(0 if by_rows else 1)
    local: Any = weight.to_local()  # type: ignore[attr-defined]
    whole = torch.empty(shape, dtype=torch.float32, device=local.device)
    return nn.Parameter(distribute_tensor(whole, weight.device_mesh, [placement], src_data_rank=None))  # type: ignore[attr-defined]


def _holds_rows(weight: Any) -> bool:
    """Whether processes hold rows of W (column-wise parallelism of ``x W^T``) and not columns (row-wise)."""
    return bool(weight.placements[0].is_shard(0))


class _Summed(torch.autograd.Function):
    """A sum over processes of values, of gradients, or of both."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, mesh: Any, values: bool, gradients: bool) -> Tensor:
        ctx.mesh, ctx.gradients = mesh, gradients
        return _sum(t, mesh) if values else t.view_as(t)

    @staticmethod
    def backward(ctx: Any, dt: Tensor) -> tuple[Tensor | None, ...]:
        return (_sum(dt, ctx.mesh) if ctx.gradients else dt), None, None, None


def _sum(t: Tensor, mesh: Any) -> Tensor:
    from torch.distributed._functional_collectives import all_reduce, wait_tensor

    return wait_tensor(all_reduce(t.contiguous(), "sum", mesh))


class _InsteadOfLinear(TorchFunctionMode):
    """Runs a function in the place of ``F.linear``, wherever the base layer, its hooks and wrappers call it."""

    def __init__(self, instead: Callable[..., Tensor]) -> None:
        super().__init__()
        self.instead = instead

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return self.instead(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def forward(
    kind: Kind,
    base: nn.Module,
    x: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    magnitude: Tensor | None,
    scale: float,
    options: Options,
) -> Tensor:
    """The adapted layer's output, whatever the layer's plan makes of its input and output.

    Where processes hold rows of W, each computes its outputs. Where they hold columns, each computes its share of all
    outputs, ``g (W x + s B A x)`` over its own columns, and the plan's own sum over processes completes them: the
    adapter adds no communication of activations.
    """
    weight: Any = base.weight
    mesh, by_rows = weight.device_mesh, _holds_rows(weight)
    part = local_layer(options, base, weight)

    def own(t: Tensor | None, gradients_summed: bool) -> Tensor | None:
        if t is None or not (gradients_summed and torch.is_grad_enabled()):
            return t if t is None else local(t)
        return _Summed.apply(local(t), mesh, False, True)

    def collect(squared: Tensor) -> Tensor:
        return squared if by_rows else _Summed.apply(squared, mesh, True, True)

    rows = WeightRows((part.out_features, part.in_features), part.weight, _one_tile(part.weight), collect=collect)
    cache = options.cache.of_part
    frozen = options.cache.frozen
    cache.frozen = _part(frozen, like=magnitude) if frozen is not None and by_rows else frozen
    inside = options._replace(cache=cache, rows=rows)
    tensors = own(A, by_rows), own(B, not by_rows), own(magnitude, not by_rows)

    def instead(x: Any, W: Tensor, bias: Any = None) -> Tensor:
        spread = is_dtensor(x)
        if spread:
            x = _input(x, by_rows)
        if is_dtensor(bias):
            bias = _own_bias(bias, by_rows)
        part._parameters["bias"] = bias
        y = kind.forward(part, x, *tensors, scale, inside)
        return _output(y, mesh, by_rows, weight.shape[0]) if spread else y

    with _InsteadOfLinear(instead):
        y: Tensor = base(x)
    return y


def local_layer(options: Options, base: nn.Module, weight: Any) -> nn.Linear:
    """A plain layer with this process's part of W; the same object as long as W is."""
    with torch.no_grad():
        local = weight.to_local()
    cache = options.cache.of_part
    if cache.part is None or cache.part[0] is not local:
        layer = nn.Linear(local.shape[1], local.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(local, requires_grad=False)
        cache.part = local, layer
    layer = cache.part[1]
    layer.training = base.training
    return layer


def _one_tile(matrix: Tensor) -> Callable[[], Iterable[tuple[slice, Tensor]]]:
    return lambda: ((slice(0, matrix.shape[0]), matrix.detach()),)


def _input(x: Any, by_rows: bool) -> Tensor:
    """What this process sees of x: all of it, or its columns' features."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    wanted = Replicate() if by_rows else Shard(x.ndim - 1)
    if x.placements != (wanted,):
        x = x.redistribute(placements=[wanted])
    local: Tensor = x.to_local(grad_placements=[Partial() if by_rows else wanted])
    return local


def _own_bias(bias: Any, by_rows: bool) -> Tensor:
    """The bias of this process's outputs; where all processes' outputs are summed, the first one has it."""
    local: Tensor = bias.to_local()
    return local if by_rows or bias.device_mesh.get_local_rank() == 0 else torch.zeros_like(local)


def _output(y: Tensor, mesh: Any, by_rows: bool, out: int) -> Tensor:
    from torch.distributed.tensor import DTensor, Partial, Shard

    if not by_rows:
        return DTensor.from_local(y, mesh, [Partial()], run_check=False)
    shape = torch.Size([*y.shape[:-1], out])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(y, mesh, [Shard(y.ndim - 1)], run_check=False, shape=shape, stride=stride)
