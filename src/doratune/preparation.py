"""What holds for a model as a whole while adapters are attached: frozen weights, and no fast path past an adapter.

``freeze`` and ``prepare`` set it, ``thaw`` undoes it when the last adapter goes.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from doratune.layers import quantised, running_statistics
from doratune.layers.attention import NoNestedTensors
from doratune.layers.holder import plain, plain_parameters
from doratune.layers.input_gradients import InputsRequireGrad, hooks_of
from doratune.targets import own_parameters, plain_path, walk

_RECORD = "_doratune_trained_before"


def freeze(root: nn.Module) -> None:
    """Freeze everything but adapters, and note once what was trained before, for ``detach``."""
    own = own_parameters(root)
    if _RECORD not in root.__dict__:
        # Names: parameters may be replaced meanwhile, by loading or moving the model.
        root.__dict__[_RECORD] = {plain_path(n) for n, p in plain_parameters(root) if p.requires_grad}
    for parameter in root.parameters():
        if id(parameter) not in own:
            parameter.requires_grad_(False)


def prepare(root: nn.Module) -> None:
    """Settings that keep the base as it is, and evaluation paths from going past adapters; undone by ``thaw``."""
    let_inputs_require_grad(root)
    for _, module in walk(root):
        running_statistics.hold(module)
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


def trained_before(root: nn.Module) -> set[str]:
    """Plain names of the parameters that were trained before the first adapter was attached."""
    return root.__dict__.get(_RECORD, set())


def keep_frozen(root: nn.Module) -> None:
    """Let ``thaw`` leave everything frozen: the weights belong to another model, too."""
    root.__dict__[_RECORD] = set()


def thaw(root: nn.Module) -> None:
    """Undo what ``attach`` set on the model as a whole; the adapters have to be gone."""
    trained = root.__dict__.pop(_RECORD, set())
    for name, parameter in plain_parameters(root):
        if plain_path(name) in trained:
            parameter.requires_grad_(True)
    for module in root.modules():
        quantised.release(module)
        running_statistics.release(module)
        for hooks, key in _nested_hooks(module):
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)
        for key in hooks_of(module):
            del module._forward_hooks[key]


def let_inputs_require_grad(root: nn.Module) -> None:
    """Put hooks on input embeddings that lack one: those of the model, and of the towers and decoders inside it."""
    checkpointed = [m for m in root.modules() if isinstance(getattr(m, "gradient_checkpointing", None), bool)]
    if not checkpointed:
        return
    for module in root.modules():
        get_embeddings = getattr(module, "get_input_embeddings", None)
        try:
            embeddings = get_embeddings() if callable(get_embeddings) else None
        except NotImplementedError:
            continue
        if isinstance(embeddings, nn.Module) and not any(map(hooks_of, (embeddings, plain(embeddings)))):
            embeddings.register_forward_hook(InputsRequireGrad(checkpointed))
