"""PEFT 0.21.2 as an oracle: the same outputs and gradients in float32, magnitudes and B moved."""

import copy

import peft
import pytest
import torch
from torch import nn

import doratune as dt
from helpers import error
from helpers_cases import CASES, Host, setup, upstream

PARITY = ["linear", "linear-no-bias", "linear-square", "linear-narrow", "conv1d-transformers", "embedding"]
PARITY += ["conv1d", "conv2d", "conv3d"]


@pytest.mark.parametrize("method", ["dora", "lora"])
@pytest.mark.parametrize("stabilized", [False, True], ids=["alpha/r", "rslora"])
@pytest.mark.parametrize("name", PARITY)
def test_outputs_and_gradients_are_pefts(name, stabilized, method):
    (case,) = (c for c in CASES if c.name == name)
    s = setup(case, method, rank_stabilized=stabilized)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        lora_dropout=0.0,
        target_modules=["layer"],
        use_dora=method == "dora",
        use_rslora=stabilized,
        fan_in_fan_out=name == "conv1d-transformers",
    )
    theirs = peft.get_peft_model(Host(copy.deepcopy(s.layer.base_layer)), config)
    parts = _parts_of_peft(theirs.base_model.model.layer, embedding=not case.differentiable)
    ours = s.parameters()
    assert parts.keys() == ours.keys()
    kind, base = s.layer.kind, s.layer.base_layer
    names = dict(zip("ABm", kind.file_names, strict=True))
    with torch.no_grad():
        for part, p in parts.items():
            theirs_shaped = kind.to_file(base, names[part], ours[part])
            assert p.shape == theirs_shaped.shape
            p.copy_(theirs_shaped)
    x1, x2 = s.x.clone(), s.x.clone()
    if case.differentiable:
        x1.requires_grad_(), x2.requires_grad_()
    y1, y2 = s.model(x1), theirs(x2)
    assert error(y1, y2) < 1e-5
    dy = upstream(y1)
    y1.backward(dy)
    y2.backward(dy)
    for part, p in parts.items():
        assert error(kind.to_file(base, names[part], ours[part].grad), p.grad) < 1e-5, part
    if case.differentiable:
        assert error(x1.grad, x2.grad) < 1e-5
    s.model.eval(), theirs.eval()
    with torch.no_grad():
        assert error(s.model(s.x), theirs(s.x)) < 1e-5
        assert error(dt.merge(s.model)(s.x), theirs.merge_and_unload()(s.x)) < 1e-5


def _parts_of_peft(layer: nn.Module, embedding: bool) -> dict[str, nn.Parameter]:
    if embedding:
        parts = {"A": layer.lora_embedding_A["default"], "B": layer.lora_embedding_B["default"]}
    else:
        parts = {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}
    if len(layer.lora_magnitude_vector):
        parts["m"] = layer.lora_magnitude_vector["default"].weight
    return parts
