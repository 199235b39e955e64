"""Switching doratune on and off in PEFT's layer classes, for one model or for the whole process.

A served class gets a forward that asks each layer for its service and otherwise calls PEFT's own. So an instance keeps
its class, and everything PEFT does with it works as before.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from doratune.errors import AdapterError
from doratune.interop.peft.adapter import call_refusal, servable_adapter
from doratune.interop.peft.report import Report, layers_of, report
from doratune.interop.peft.service import ATTRIBUTE, DROPOUTS, Service, State
from doratune.ops.once import transformed


class Handle:
    """One accelerated model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def report(self) -> Report:
        """Which layers are served as the model is now, which are not, and why."""
        return report(self.model)

    def undo(self) -> None:
        """Make every layer of the model PEFT's again."""
        for _, layer in layers_of(self.model):
            Service.remove(layer)
        _restore_classes()

    def __repr__(self) -> str:
        return f"<doratune.peft.Handle: {self.report.headline}>"


def accelerate(model: nn.Module, dropout: str = "peft") -> Handle:
    """Serve the DoRA layers of a PEFT model with doratune's functions, in place.

    Outputs and gradients are PEFT's within rounding; parameters, names and files stay as they are.

    Args:
        model: a ``PeftModel``, or any module with PEFT's LoRA layers in it.
        dropout: ``"peft"`` drops the input of the base's correction, too, as PEFT does; ``"adapter"`` that of the
            low-rank path only, which saves a product with W.

    Returns:
        A handle, whose ``report`` says what is served and whose ``undo()`` gives everything back.

    Raises:
        AdapterError: if PEFT is missing, or the model has no LoRA layer of PEFT's.
    """
    _check(dropout)
    layers = [layer for _, layer in layers_of(model)]
    if not layers:
        raise AdapterError(
            f"accelerate: expected a model with PEFT's LoRA layers (get_peft_model, PeftModel.from_pretrained); "
            f"found none in this {type(model).__name__}"
        )
    _patch_classes()
    for layer in layers:
        Service.remove(layer)
        if State.serves(type(layer)):
            Service(dropout).enter(layer)
    return Handle(model)


def install(dropout: str = "peft") -> None:
    """Serve every PEFT DoRA layer of this process, also of models made later by other libraries.

    Args:
        dropout: as for ``accelerate``.

    Raises:
        AdapterError: if PEFT is missing.
    """
    _check(dropout)
    if State.installed not in (None, dropout):
        uninstall()
    State.installed = dropout
    _patch_classes()


def uninstall() -> None:
    """Undo ``install``; models given to ``accelerate`` stay accelerated."""
    State.installed = None
    for layer in list(State.served):
        if getattr(layer, ATTRIBUTE).installed:
            Service.remove(layer)
    _restore_classes()


def _check(dropout: str) -> None:
    if dropout not in DROPOUTS:
        raise AdapterError(f"dropout: expected one of {', '.join(map(repr, DROPOUTS))}; found {dropout!r}")
    try:
        importlib.import_module("peft.tuners.lora.variants")
    except ImportError as error:
        raise AdapterError(f"dt.peft needs PEFT, tested with 0.21: pip install -U peft ({error})") from error


def _classes() -> Iterator[Any]:
    """PEFT's classes of layers that know DoRA, as far as their libraries are there."""
    from peft.import_utils import is_bnb_available, is_hqq_available
    from peft.tuners.lora import layer

    yield from (layer.Linear, layer.Embedding, layer._ConvNd)
    if is_bnb_available():
        from peft.tuners.lora import bnb

        yield from (getattr(bnb, name) for name in ("Linear8bitLt", "Linear4bit") if hasattr(bnb, name))
    if is_hqq_available():
        from peft.tuners.lora import hqq

        yield hqq.HqqLoraLinear


def _patch_classes() -> None:
    for cls in _classes():
        if cls not in State.originals:
            State.originals[cls] = cls.forward
            cls.forward = _serving(cls.forward)


def _restore_classes() -> None:
    """Give PEFT's classes their own forward again when nothing is served any more."""
    if State.installed is not None or len(State.served):
        return
    cls: Any
    for cls, original in list(State.originals.items()):
        # Somebody else may have put a forward of theirs over ours, which then goes on to PEFT's.
        if getattr(cls.forward, "__wrapped__", None) is original:
            cls.forward = original
            del State.originals[cls]


def _serving(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """PEFT's forward with ours before it."""

    @functools.wraps(original)
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        service = getattr(self, ATTRIBUTE, None)
        if service is None and State.installed is not None:
            service = Service(State.installed, installed=True)
            service.enter(self)
        # The adapters that transforms hand over may be many in one.
        if service is None or call_refusal(args, kwargs) is not None or transformed():
            return original(self, x, *args, **kwargs)
        adapter = servable_adapter(self)
        if isinstance(adapter, str):
            return original(self, x, *args, **kwargs)
        return service.forward(self, adapter, x)

    return forward
