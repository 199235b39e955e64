"""What holds for a model as a whole while adapters are attached: frozen weights, and no fast path past an adapter.

``freeze`` and ``prepare`` set it, ``thaw`` undoes it when the last adapter goes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from doratune.layers import quantised
from doratune.layers.attention import NoNestedTensors
from doratune.targets import holders

_RECORD = "_doratune_trained_before"


def freeze(root: nn.Module) -> None:
    """Freeze everything but adapters, and note once what was trained before, for ``detach``."""
    own = {id(p) for h in holders(root) for n in h.adapter_names() for p in h.adapter_parameters(n)}
    base = {n: p for n, p in root.named_parameters() if id(p) not in own}
    if _RECORD not in root.__dict__:
        root.__dict__[_RECORD] = [p for p in base.values() if p.requires_grad]
        _let_inputs_require_grad(root)
    for parameter in base.values():
        parameter.requires_grad_(False)


def prepare(root: nn.Module) -> None:
    """Settings that keep other libraries' evaluation paths from going past adapters; undone by ``thaw``."""
    for module in root.modules():
        quantised.prepare(module)
        if isinstance(module, nn.TransformerEncoder) and not _nested_hooks(module):
            hook = NoNestedTensors()
            module.register_forward_pre_hook(hook.enter)
            module.register_forward_hook(hook.leave, always_call=True)


def _nested_hooks(module: nn.Module) -> list[tuple[Any, int]]:
    found = []
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        found += [(hooks, k) for k, h in hooks.items() if isinstance(getattr(h, "__self__", None), NoNestedTensors)]
    return found


def trained_before(root: nn.Module) -> list[nn.Parameter]:
    """The parameters that were trained before the first adapter was attached."""
    return root.__dict__.get(_RECORD, [])


def thaw(root: nn.Module) -> None:
    """Undo what ``attach`` set on the model as a whole; the adapters have to be gone."""
    for parameter in root.__dict__.pop(_RECORD, []):
        parameter.requires_grad_(True)
    for module in root.modules():
        quantised.release(module)
        for hooks, key in _nested_hooks(module):
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, _InputsRequireGrad):
                del module._forward_hooks[key]


class _InputsRequireGrad:
    """Forward hook on the input embeddings: reentrant checkpointing needs an input that requires grad."""

    def __init__(self, checkpointed: list[nn.Module]) -> None:
        self.checkpointed = checkpointed

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output  # Swin's embeddings also tell the size
        if torch.is_grad_enabled() and not first.requires_grad and self.is_checkpointing():
            first.requires_grad_(True)

    def is_checkpointing(self) -> bool:
        return any(m.gradient_checkpointing for m in self.checkpointed)


def _let_inputs_require_grad(root: nn.Module) -> None:
    """As transformers does for PEFT's models, but only while checkpointing is on."""
    checkpointed = [m for m in root.modules() if isinstance(getattr(m, "gradient_checkpointing", None), bool)]
    get_embeddings = getattr(root, "get_input_embeddings", None)
    if not checkpointed or not callable(get_embeddings):
        return
    try:
        embeddings = get_embeddings()
    except NotImplementedError:
        return
    if isinstance(embeddings, nn.Module):
        embeddings.register_forward_hook(_InputsRequireGrad(checkpointed))
