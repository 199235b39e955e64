"""The module that stands in the place of an adapted layer, whatever its kind."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from doratune.config import AdapterConfig
from doratune.errors import AdapterError
from doratune.layers import sharded
from doratune.layers.adapter import AdapterParameters, LayerAdapter
from doratune.layers.cache import ScaleCache
from doratune.layers.choices import choices
from doratune.layers.holder import AdapterHolder, base_attribute
from doratune.layers.kind import Kind, Options
from doratune.layers.loading import accept_plain_keys, after_load
from doratune.layers.sharded import assign, whole
from doratune.layers.weights import WeightRows, is_dtensor, on_device, remake_weight
from doratune.ops.once import transformed

log = logging.getLogger("doratune")

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def _with_weights(method: Decorated) -> Decorated:
    """Run a method with the base's weights on their device, if accelerate keeps them elsewhere between forwards."""

    @functools.wraps(method)
    def inside(self: AdaptedLayer, *args: Any, **kwargs: Any) -> Any:
        with on_device(self.base_layer):
            return method(self, *args, **kwargs)

    return inside  # type: ignore[return-value]


class AdaptedLayer(AdapterHolder):
    """A base layer with any number of named adapters, one of them active.

    Parameters of adapter ``name``, all float32: ``lora_A[name]`` ``[r, in]`` (``rows.matrices`` times that many rows
    where matrices lie under each other), ``lora_B[name]`` ``[out, r]``,
    ``magnitude[name]`` ``[out]`` (dora), ``adapter_bias[name]`` ``[out]`` (where biases are trained).
    """

    def __init__(self, base: nn.Module, kind: Kind, path: str, gathered: bool = False) -> None:
        super().__init__(base, path)
        self.kind = kind
        self.adapters: dict[str, LayerAdapter] = {}
        self.cache = ScaleCache()
        self.lora_A = AdapterParameters(self.cache)
        self.lora_B = AdapterParameters(self.cache)
        self.magnitude = AdapterParameters(self.cache)
        self.adapter_bias = AdapterParameters(self.cache)
        self.tensor_parallel = is_dtensor(base._parameters.get("weight")) and not gathered
        """W lies in parts on several processes even in a forward; not so if ``gathered``, as FSDP makes it whole."""
        self.started: dict[str, Tensor] = {}
        """What the magnitudes began as: those that are still the same follow a base that is loaded later."""
        self.register_load_state_dict_pre_hook(accept_plain_keys)
        self.register_load_state_dict_post_hook(after_load)

    # Adapters

    @_with_weights
    def add(self, name: str, config: AdapterConfig, trainable: bool = True) -> None:
        """Add an adapter that changes nothing yet: ``B = 0``, ``m = |W|``."""
        remake_weight(self.base_layer)
        rows = self.weight_rows()
        out, columns = rows.shape
        rank = config.rank_of(self.path)
        eight_bit = config.keeps_eight_bits(self.path)
        self.adapters[name] = LayerAdapter(config, rank, repr(config.scale_of(self.path)), trainable, eight_bit)

        def new(what: str, *shape: int) -> nn.Parameter:
            if self.tensor_parallel:
                return sharded.new_parameter(rows.stored, what, *shape)
            return nn.Parameter(torch.empty(shape, dtype=torch.float32, device=rows.stored.device))

        if rank:
            self.lora_A[name] = new("A", rows.matrices * rank, columns)
            self.lora_B[name] = new("B", out, rank)
        if config.method == "dora":
            self.magnitude[name] = new("m", out)
        bias = getattr(self.base_layer, "bias", None)
        if config.bias != "none" and bias is not None:
            self.adapter_bias[name] = new("bias", out)
        self.waiting.add(name)
        self.initialise()

    @_with_weights
    def initialise(self) -> None:
        """Give start values to the adapters that still wait for a base with data."""
        weight = self.weight_rows().stored
        if weight.is_meta:
            return
        for name in sorted(self.waiting):
            for group in self._groups():
                if name in group and group[name].is_meta:
                    old = group[name]
                    group[name] = nn.Parameter(torch.empty_like(old, device=weight.device), old.requires_grad)
            with torch.no_grad():
                if name in self.lora_A:
                    self._initialise_direction(name)
                if name in self.magnitude:
                    self.reset_magnitude(name)
                if name in self.adapter_bias:
                    assign(self.adapter_bias[name], whole(self.base_layer.bias))  # type: ignore[arg-type]
            self.waiting.discard(name)
            self.decide(name)

    def _initialise_direction(self, name: str) -> None:
        """Start values of A and B, drawn whole where they lie in parts: processes with one seed draw the same."""
        A, B = self.lora_A[name], self.lora_B[name]
        parts = is_dtensor(A) or is_dtensor(B)
        drawn = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (A, B)] if parts else [A, B]
        self.kind.init(drawn[0], drawn[1], self.adapters[name].config.init)
        if parts:
            sharded.same_everywhere(drawn)
            assign(A, drawn[0])
            assign(B, drawn[1])

    @_with_weights
    def reset_magnitude(self, name: str) -> None:
        """Set ``m = |W + s B A|``, so that the magnitude changes nothing (0 marks a row trained as plain LoRA)."""
        with torch.no_grad():
            base = self.cache.base_squared(self.weight_rows())
            n = self.squared_norm(name).sqrt()
            if wrong := int((~torch.isfinite(n)).sum()):
                log.warning(
                    "%s: %d rows of the weight have no norm in float32, as they hold NaN, infinite numbers or some "
                    "above 1e19; the adapter cannot work on them",
                    self.path,
                    wrong,
                )
            start = torch.where(base > 0, n, 0.0)
            assign(self.magnitude[name], start)
            self.started[name] = start

    def weight_rows(self) -> WeightRows:
        """W, ``[out, in]``."""
        return self.kind.rows(self.base_layer)

    @_with_weights
    def base_squared(self) -> Tensor:
        """``|W|^2``, float32 ``[out]``."""
        return self.cache.base_squared(self.weight_rows())

    @_with_weights
    def squared_norm(self, name: str) -> Tensor:
        """``|W + s B A|^2``, float32 ``[out]``, from dense tiles, exact."""
        rows = self.weight_rows()
        base = self.cache.base_squared(rows)
        if name not in self.lora_A:
            return base
        A, B = whole(self.lora_A[name].detach()), whole(self.lora_B[name].detach())
        if not B.any() or not A.any():
            return base  # the same sum, so that a fresh adapter has g = 1 to the last bit
        return self.cache.squared_norm(rows, A, B, self.adapters[name].scale, dense=True)

    @_with_weights
    def decide(self, name: str) -> None:
        """Look at the adapter's values and choose what depends on them, away from the hot path."""
        self.cache.clear_scale()
        adapter = self.adapters[name]
        if name not in self.magnitude or name in self.waiting:
            return
        bias = self.adapter_bias[name] if name in self.adapter_bias else getattr(self.base_layer, "bias", None)
        A, B, m = self.whole_parts(name)
        assert m is not None
        rows = self.weight_rows()
        bias = None if bias is None else whole(bias.detach())
        adapter.dense_norm, adapter.keep_output = choices(self.cache, rows, A, B, m, adapter.scale, bias)

    def whole_parts(self, name: str) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """A, B and m of an adapter; what lies in parts on several processes is gathered on each."""
        groups = (self.lora_A, self.lora_B, self.magnitude)
        A, B, m = (whole(group[name]) if name in group else None for group in groups)
        return A, B, m

    @_with_weights
    def row_scale(self, name: str) -> Tensor:
        """g of one adapter, float32 ``[out]``, between forwards."""
        adapter, rows = self.adapters[name], self.weight_rows()
        A, B, m = self.whole_parts(name)
        assert m is not None
        if A is not None and B is not None:
            A, B = rows.own(A, B)
        return self.cache.row_scale(rows, A, B, m, adapter.scale, adapter.config.norm_gradient, adapter.dense_norm)

    def adapter_names(self) -> list[str]:
        return list(self.adapters)

    def adapter_parameters(self, name: str) -> Iterator[nn.Parameter]:
        return (group[name] for group in self._groups() if name in group)

    def trains(self, name: str) -> bool:
        return self.adapters[name].trainable

    def activate(self, name: str | None) -> None:
        self.cache.change_adapter()
        super().activate(name)

    def remove(self, name: str) -> None:
        for group in self._groups():
            if name in group:
                del group[name]
        self.adapters.pop(name, None)
        self.started.pop(name, None)
        super().remove(name)

    def _groups(self) -> tuple[AdapterParameters, ...]:
        return self.lora_A, self.lora_B, self.magnitude, self.adapter_bias

    # The layer

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The active adapter's output, or the base's own if none is active."""
        if self.active is None or not self.enabled:
            return self.base_layer(*args, **kwargs)
        if len(args) + len(kwargs) != 1:
            raise TypeError(f"{self.path}: an adapted {self.kind.name} layer takes one input; found more")
        x = args[0] if args else next(iter(kwargs.values()))  # each class has a name of its own for it
        if self.tensor_parallel:
            return sharded.forward(self.kind, self.base_layer, x, *self.active_tensors())
        return self.kind.forward(self._modules["base_layer"], x, *self.active_tensors())  # type: ignore[arg-type]

    def active_tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, float, Options]:
        """A, B, m, scale and options of the active adapter, as a kind's functions take them."""
        name = self.active
        assert name is not None
        if self.waiting:
            self._initialise_late()
        adapter = self.adapters[name]
        if torch.is_grad_enabled() and not self.training:
            self.cache.forget_evaluations()
        # Looked up past nn.Module's __getattr__: a decode step calls this for every layer and token.
        groups: Any = self._modules
        options = Options(
            self.cache,
            dropout=adapter.config.dropout if self.training else 0.0,
            norm_gradient=adapter.config.norm_gradient,
            dense_norm=adapter.dense_norm,
            keep_output=adapter.keep_output,
            eight_bit=adapter.eight_bit,
            reuse_scale=not (self.training or torch.is_grad_enabled() or transformed()),
            reuse_norm=adapter.config.norm_refresh == "step",
            bias=groups["adapter_bias"]._parameters.get(name),
        )
        A, B = groups["lora_A"]._parameters.get(name), groups["lora_B"]._parameters.get(name)
        m = groups["magnitude"]._parameters.get(name)
        if (adapter.rank and (A is None or B is None)) or (m is None and adapter.config.method == "dora"):
            raise AdapterError(
                f"{self.path}: lora_A, lora_B or magnitude of adapter {name!r} is not a parameter any more, as after "
                "pruning or parametrising it, and would be left out; undo that (prune.remove, remove_parametrizations)"
            )
        return A, B, m, adapter.scale, options

    def _initialise_late(self) -> None:
        if any(group.gathered for group in self._groups()):
            raise AdapterError(
                f"{self.path}: the adapter has no start values, and FSDP's copies of its parameters cannot be given "
                "any; once the base has its weights, call doratune.distributed.initialise(model)"
            )
        self.initialise()

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            changes = self.__dict__.get("active") is not None and self.__dict__["enabled"]
            # A head that is tied to an adapted embedding goes on with the base's weight.
            return base_attribute(self, name, self.path if changes and self.kind.name != "embedding" else None)

    def train(self, mode: bool = True) -> AdaptedLayer:
        """Switch between training and evaluation; what was remembered is forgotten."""
        if mode != self.training:
            self.cache.clear()
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedLayer:
        """Adapter parameters follow the model to its device, but stay float32 masters."""

        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        self.base_layer._apply(fn, recurse)
        for group in self._groups():
            group._apply(keep_dtype, recurse)
        self.cache.clear()
        return self

    def _replicate_for_data_parallel(self) -> AdaptedLayer:
        """Of ``nn.DataParallel``: replicas run in threads, so none of them shares what is remembered."""
        replica: AdaptedLayer = super()._replicate_for_data_parallel()
        replica.cache = ScaleCache()
        replica.cache.frozen = self.cache.frozen
        return replica

    def extra_repr(self) -> str:
        """Adapters of this layer, for ``print(model)``."""
        names = (f"{n}: {a.config.method} rank {a.rank}" for n, a in self.adapters.items())
        return f"{', '.join(names)}; active: {self.active}"
