"""What concerns models on several processes and can be seen on one; ``tests/distributed`` starts several."""

import copy

import pytest
import torch
from torch import nn

import doratune as dt
from doratune.distributed import load_base
from doratune.train.checkpoints import restore_adapter
from helpers import error, ids, output, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # as it is meant to be


@pytest.mark.parametrize("bias", ["none", "all"])
def test_copies_of_modules_start_from_a_base_that_is_loaded_late(tmp_path, bias):
    base = tiny_llama(attention_bias=True)
    with torch.no_grad():
        for name, p in base.named_parameters():
            p.add_(0.1 if "bias" in name else 0)
    base.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = tiny_llama(attention_bias=True)
    model.model.rotary_emb = base.model.rotary_emb  # buffers are in no file
    config = dt.AdapterConfig(rank=2, targets=["q_proj"], bias=bias, modules_to_save=["lm_head"])
    load_base(dt.attach(model, config), tmp_path)
    x = ids(vocabulary=32)
    with torch.no_grad():
        assert error(model(x).logits, base(x).logits) < 1e-6
    assert model.lm_head.copies["default"].weight is not model.lm_head.base_layer.weight
    assert model.lm_head.weight.requires_grad
    if bias == "all":
        projection = model.model.layers[0].self_attn.k_proj
        assert torch.equal(projection.copies["default"].bias, projection.base_layer.bias)


@pytest.mark.parametrize("assign", [True, False])
def test_copies_of_modules_start_from_a_state_dict(assign):
    base = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        base[1].running_mean.add_(1)
    dt.attach(model, dt.AdapterConfig(rank=2, targets=["0"], modules_to_save=["1", "2"]))
    if not assign:
        model.to_empty(device="cpu")
    missing = model.load_state_dict(base.state_dict(), strict=False, assign=assign).missing_keys
    assert missing == []
    # An optimiser that is made now trains what the forward uses.
    trained = dt.trainable_parameters(model)
    x = torch.randn(2, 3)
    assert torch.equal(output(model, x), output(base, x))
    after = dt.trainable_parameters(model)
    assert trained.keys() == after.keys()
    assert all(trained[name] is after[name] and not trained[name].is_meta for name in trained)


def test_a_restored_adapter_is_not_overwritten_by_the_base(tmp_path):
    def made(device):
        with torch.device(device):
            return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).eval()

    base, config = made("cpu"), dt.AdapterConfig(rank=2, targets=["0"], modules_to_save=["1"])
    learnt = dt.attach(copy.deepcopy(base), config)
    with torch.no_grad():
        learnt[1].copies["default"].weight.add_(1)
    dt.save_adapter(learnt, tmp_path)
    x = torch.randn(2, 3)
    for base_first in (True, False):
        model = dt.attach(made("meta"), config).to_empty(device="cpu")
        steps = [
            lambda model=model: model.load_state_dict(base.state_dict(), strict=False),
            lambda model=model: restore_adapter(model, tmp_path),
        ]
        for step in steps if base_first else reversed(steps):
            step()
        assert error(output(model, x), output(learnt, x)) < 1e-6


def test_copies_come_with_a_state_dict_of_an_adapted_model():
    base = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).eval()
    learnt = dt.attach(copy.deepcopy(base), dt.AdapterConfig(rank=2, targets=["0"], bias="all"))
    with torch.no_grad():
        learnt[1].copies["default"].bias.add_(1)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).eval()
    dt.attach(model, dt.AdapterConfig(rank=2, targets=["0"], bias="all")).to_empty(device="cpu")
    model.load_state_dict(learnt.state_dict())
    x = torch.randn(2, 3)
    assert torch.equal(output(model, x), output(learnt, x))


def test_a_tied_model_stays_tied_when_its_base_is_loaded(tmp_path):
    base = tiny_llama(tie_word_embeddings=True)
    base.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = tiny_llama(tie_word_embeddings=True)
    model.tie_weights()
    model.model.rotary_emb = base.model.rotary_emb
    load_base(dt.attach(model, dt.AdapterConfig(rank=2)), tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    x = ids(vocabulary=32)
    with torch.no_grad():
        assert error(model(x).logits, base(x).logits) < 1e-6
