"""What doratune keeps with a PEFT layer while it serves it: its options and, for each adapter, a memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from doratune.interop.peft.adapter import PeftAdapter, result_dtype, servable_adapter
from doratune.layers import Options, quantised
from doratune.layers.cache import ScaleCache
from doratune.layers.choices import choices
from doratune.layers.weights import on_device

ATTRIBUTE = "_doratune"
"""Where a PEFT layer keeps its service."""
DROPOUTS = {"peft": True, "adapter": False}
"""Where dropout applies: to the base's correction and the low-rank path, as in PEFT, or to the low-rank path only."""
SILENT = 1e-30
"""A magnitude that silences a row as 0 does, without being 0."""
REPACKING = "support_avx512bf16_for_cpu"
"""bitsandbytes' switch that ``quantised.prepare`` turns off."""


class State:
    """What is switched on in this process."""

    installed: str | None = None
    """The dropout convention of ``install``."""
    originals: ClassVar[dict[type, Callable[..., Tensor]]] = {}
    """PEFT's forward of each class that has ours now."""
    served: ClassVar[weakref.WeakSet[nn.Module]] = weakref.WeakSet()
    """Layers with a service."""

    @classmethod
    def serves(cls, layer_class: Any) -> bool:
        """Whether a class, or the one it has its forward from, has ours now."""
        return cls.is_ours(layer_class.forward)

    @classmethod
    def is_ours(cls, forward: Any) -> bool:
        """Whether a function is the forward that we gave to one of PEFT's classes."""
        return getattr(forward, "__wrapped__", None) in cls.originals.values()


class Memory:
    """What is known about one adapter of one layer: its remembered scale, and choices made from its values."""

    def __init__(self) -> None:
        self.cache = ScaleCache()
        self.dense_norm = self.keep_output = False
        self.zero_rows: Tensor | None = None
        """Rows where W, B and m were all 0: PEFT's 0/0."""
        self.silent_rows: Tensor | None = None
        """What keeps rows apart from those where W and m are 0, but not B: PEFT's output is 0 there, ``[out]``."""
        self.shifted: Tensor | None = None
        self.seen: tuple[weakref.ref[Tensor], ...] = ()
        self.mode: bool | None = None
        self.versions: list[int] = []
        self.matrices: tuple[Tensor, Tensor, Tensor] | None = None

    def look(self, layer: Any, adapter: PeftAdapter, reuse: bool) -> None:
        """Choose again what depends on values when they may have changed at once, as by loading a file.

        An optimiser's steps change little, and looking makes the device wait: so look when the mode changes, when
        parameters are replaced, and in evaluation when they have a new version.
        """
        parameters = (adapter.A, adapter.B, adapter.m)
        if self.mode == layer.training and _same(self.seen, parameters) and not (reuse and self._changed(parameters)):
            return
        if _same(self.seen, parameters):
            self.start_zero_rows(adapter)  # a step may have moved B: such a row is told from a silent one by now only
        self.cache.clear()
        A, B, m = (t.detach() for t in adapter.matrices())
        bias = getattr(adapter.base, "bias", None)
        with on_device(adapter.base), torch.no_grad():
            rows = adapter.kind.rows(adapter.base)
            if rows.stored.is_meta or m.is_meta:
                return
            base = self.cache.base_squared(rows)
            zero = ((base == 0) & (m == 0)).nonzero().flatten()
            moved = B[zero].any(1)
            self.zero_rows = zero[~moved] if not moved.all() else None
            self.silent_rows = self.shifted = None
            if moved.any():
                self.silent_rows = torch.zeros_like(m, dtype=torch.float32).index_fill(0, zero[moved], SILENT)
            self.start_zero_rows(adapter)
            self.dense_norm, self.keep_output = choices(self.cache, rows, A, B, m, adapter.scale, bias)
            self.keep_output &= self.silent_rows is None
        self.seen, self.mode = tuple(weakref.ref(p) for p in parameters), layer.training
        self.versions = _versions(parameters)

    def _changed(self, parameters: tuple[Tensor, ...]) -> bool:
        return self.versions != _versions(parameters)

    def magnitude(self, m: Tensor, reuse: bool) -> Tensor:
        """m, a little more where a row would be taken for plain LoRA; with ``reuse`` the same object each time."""
        if self.silent_rows is None:
            return m
        if not reuse:
            return m.float() + self.silent_rows
        if self.shifted is None:
            self.shifted = m.float() + self.silent_rows
        return self.shifted

    def start_zero_rows(self, adapter: PeftAdapter) -> None:
        """Give rows of zeros a magnitude, their norm, once B has moved: files and merges then say what we compute.

        Until then such a row is a plain LoRA row (g = 1), where PEFT divides 0 by 0.
        """
        rows = self.zero_rows
        if rows is None or not adapter.m.requires_grad or adapter.m.is_inference():
            return
        with torch.no_grad():
            A, B, m = (t.detach() for t in adapter.matrices())
            n = (adapter.scale * (B[rows].float() @ A.float())).norm(dim=1).to(m.dtype)
            m[rows] = torch.where(m[rows] == 0, n, m[rows])

    def stable(self, matrices: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The same matrices as the same objects as last time, so that a scale remembered for them fits."""
        if matrices[0]._is_view() and _versions(matrices):
            last = self.matrices
            if last is not None and all(
                old.data_ptr() == new.data_ptr() and old._version == new._version
                for old, new in zip(last, matrices, strict=True)
            ):
                return last
            self.matrices = matrices
        return matrices


def _same(references: tuple[weakref.ref[Tensor], ...], tensors: tuple[Tensor, ...]) -> bool:
    return len(references) == len(tensors) and all(r() is t for r, t in zip(references, tensors, strict=True))


def _versions(tensors: tuple[Tensor, ...]) -> list[int]:
    """Version counters; empty for inference tensors, which have none."""
    return [] if tensors[0].is_inference() else [t._version for t in tensors]


class Service:
    """The presence of doratune in a PEFT layer. It is not pickled, and a copied layer starts with an empty memory."""

    def __init__(self, dropout: str, installed: bool = False) -> None:
        self.dropout = dropout
        self.installed = installed
        self.counted = False
        self.memories: dict[str, Memory] = {}
        self.repacking: bool | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Service:
        copy = Service(self.dropout, self.installed)
        copy.repacking = self.repacking
        return copy

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # whoever unpickles the layer may not have doratune

    def enter(self, layer: Any) -> None:
        """Begin to serve a layer, before any forward of its base."""
        setattr(layer, ATTRIBUTE, self)
        if torch.compiler.is_compiling():
            return
        self.counted = True
        State.served.add(layer)
        base = layer.base_layer
        self.repacking = base.__dict__.get(REPACKING)
        quantised.prepare(base)
        adapter = servable_adapter(layer)
        if not isinstance(adapter, str):
            self._memory(adapter.name, layer).look(layer, adapter, reuse=False)

    @staticmethod
    def remove(layer: Any) -> None:
        """Leave a layer as it was, if it is served."""
        service = layer.__dict__.pop(ATTRIBUTE, None)
        State.served.discard(layer)
        if service is not None and service.repacking is not None:
            setattr(layer.base_layer, REPACKING, service.repacking)

    def forward(self, layer: nn.Module, adapter: PeftAdapter, x: Tensor) -> Tensor:
        """The layer's output, in the dtype of PEFT's."""
        compiling = torch.compiler.is_compiling()
        reuse = not layer.training and not torch.is_grad_enabled() and not compiling
        memory = self._memory(adapter.name, layer)
        if not compiling:
            if not self.counted:
                self.counted = True
                State.served.add(layer)
            memory.look(layer, adapter, reuse)
            if torch.is_grad_enabled() and not layer.training:
                memory.cache.forget_evaluations()
            if layer.training:
                memory.start_zero_rows(adapter)
        matrices = adapter.matrices()
        A, B, m = memory.stable(matrices) if reuse else matrices
        m = memory.magnitude(m, reuse)
        options = Options(
            memory.cache,
            dropout=adapter.dropout,
            dense_norm=memory.dense_norm,
            # The gradient of a bias in training comes from outside the fused product.
            keep_output=memory.keep_output
            and not getattr(adapter.base._parameters.get("bias"), "requires_grad", False),
            reuse_scale=reuse,
            dropout_on_base=DROPOUTS[self.dropout],
        )
        y = adapter.kind.forward(adapter.base, x, A, B, m, adapter.scale, options)
        return y.to(result_dtype(layer, y.dtype, x, adapter.m))

    def _memory(self, name: str, layer: Any) -> Memory:
        if name not in self.memories:
            # Names of adapters that are gone go with them.
            self.memories = {n: memory for n, memory in self.memories.items() if n in layer.lora_variant}
            self.memories[name] = Memory()
        return self.memories[name]
