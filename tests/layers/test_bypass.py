"""Models that compute with a layer's weight and never call the layer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import doratune as dt
from doratune.layers.bypass import UnreadWeight
from helpers import DORA, LORA, error, gradients, ids, move, tiny


class Reader(nn.Module):
    """Computes with the weight of one layer and calls the other, of which it asks the dtype, as T5 does."""

    def __init__(self):
        super().__init__()
        self.read = nn.Linear(6, 8)
        self.called = nn.Linear(8, 6)

    def forward(self, x):
        return self.called(F.linear(x, self.read.weight).to(self.called.weight.dtype))


@pytest.mark.parametrize("config", [DORA, LORA])
def test_a_weight_that_is_computed_with_is_an_error(config):
    torch.manual_seed(0)
    model, x = nn.Sequential(Reader()), torch.randn(3, 6)
    before = model(x)
    dt.attach(model, config)
    with pytest.raises(dt.AdapterError, match=r"0\.read: .*\(linear\).*exclude"):
        model(x)
    with dt.disabled(model):
        assert torch.equal(model(x), before)
        assert type(model[0].read.weight) is nn.Parameter
    assert torch.equal(dt.detach(model)(x), before)
    dt.attach(model, dt.AdapterConfig(exclude=["read"]))
    assert torch.equal(model(x), before)


def test_what_can_be_asked_of_a_weight():
    model = dt.attach(nn.Sequential(nn.Linear(6, 8)), DORA)
    shown, weight = model[0].weight, model[0].base_layer.weight
    assert isinstance(shown, torch.Tensor)
    assert (shown.dtype, shown.device, shown.shape, shown.ndim) == (torch.float32, weight.device, weight.shape, 2)
    assert (shown.is_meta, shown.requires_grad, shown.is_floating_point(), shown.size(0)) == (False, False, True, 8)
    assert (len(shown), str(shown), shown.numel(), shown.T.shape) == (8, str(weight.data), 48, (6, 8))
    assert torch.zeros(2, dtype=torch.float64).to(shown).dtype == torch.float32
    assert type(torch.zeros_like(shown)) is torch.Tensor
    weight.requires_grad_(True)
    assert model[0].weight.requires_grad
    x = torch.randn(2, 6)
    for computation in (
        lambda: x @ shown.T,
        lambda: x @ shown.detach().data.mT,
        lambda: torch.cat([shown, shown]),
        lambda: F.linear(input=x, weight=shown),
        lambda: shown[0],
        lambda: shown.to(torch.float64),
        lambda: shown.data_ptr(),  # handed to a kernel
        lambda: shown.numpy(),
    ):
        with pytest.raises(dt.AdapterError, match="0: the model computes with"):
            computation()


def test_a_packed_weight_of_attention_is_guarded_too():
    model = dt.attach(nn.Sequential(nn.MultiheadAttention(8, 2)), dt.AdapterConfig(rank=2, targets=["out_proj"]))
    assert model[0].in_proj_weight.dtype == torch.float32
    with pytest.raises(dt.AdapterError, match="out_proj"):
        model[0].in_proj_weight + 1


def test_a_head_tied_to_an_adapted_embedding_reads_its_weight():
    model = dt.attach(tiny(), dt.AdapterConfig(rank=2, targets=["embed"]))
    assert F.linear(torch.randn(2, 16), model.embed.weight).shape == (2, 13)


def test_transformers_ties_weights_all_the_same():
    from helpers import tiny_llama

    model = dt.attach(tiny_llama(tie_word_embeddings=True), DORA)
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_copies_and_files_see_plain_weights():
    model = move(dt.attach(tiny(), DORA))
    assert not any(isinstance(t, UnreadWeight) for t in [*model.state_dict().values(), *model.parameters()])
    assert torch.equal(copy.deepcopy(model)(ids()), model(ids()))


def test_compiled_code_may_ask_too():
    model = dt.attach(nn.Sequential(Reader()), dt.AdapterConfig(rank=2, exclude=["read"]))
    x = torch.randn(3, 6)
    assert error(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x)) < 1e-6


def t5():
    from transformers import T5Config, T5Model

    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2, "vocab_size": 13}
    model = T5Model(T5Config(**sizes))
    return model, lambda: model(input_ids=ids(), decoder_input_ids=ids()).last_hidden_state, set()


def mamba():
    from transformers import MambaConfig, MambaModel

    model = MambaModel(MambaConfig(hidden_size=8, num_hidden_layers=1, state_size=4, vocab_size=13))
    past = {f"layers.0.mixer.{name}" for name in ("x_proj", "dt_proj", "out_proj")}
    return model, lambda: model(ids()).last_hidden_state, past


def wavlm():
    from transformers import WavLMConfig, WavLMModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    convolutions = {"conv_dim": (8,), "conv_kernel": (4,), "conv_stride": (2,), "num_conv_pos_embedding_groups": 2}
    model = WavLMModel(WavLMConfig(**sizes, **convolutions, num_conv_pos_embeddings=4))
    past = {f"encoder.layers.0.attention.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    return model, lambda: model(torch.randn(1, 64)).last_hidden_state, past


class QKVBiases(nn.Module):
    """As timm's attention of BEiT, EVA and Swin V2."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24, bias=False), nn.Linear(24, 8)
        self.q_bias = nn.Parameter(torch.zeros(24))

    def forward(self, x):
        return self.proj(F.linear(x, self.qkv.weight, self.q_bias))


def beit():
    model = nn.Sequential(QKVBiases())
    return model, lambda: model(torch.randn(2, 8)), {"0.qkv"}


@pytest.mark.parametrize("make", [t5, mamba, wavlm, beit], ids=lambda make: make.__name__)
def test_all_linear_layers_are_those_that_are_called(make):
    torch.manual_seed(0)
    model, run, past = make()
    dt.attach(model, DORA)
    left = dt.summary(model).left_alone
    assert {path for path, reason in left.items() if "computes with its weight" in reason} == past
    assert not past & {layer.path for layer in dt.summary(model).layers}
    found = gradients(move(model.eval()), lambda: run().square().sum())
    assert found.keys() == dt.trainable_parameters(model).keys()
    assert all(g.any() for g in found.values())


def test_what_is_named_all_the_same_is_an_error_when_it_is_read():
    model, run, _ = mamba()
    dt.attach(model, dt.AdapterConfig(rank=2, targets=["dt_proj"]))
    with pytest.raises(dt.AdapterError, match=r"layers\.0\.mixer\.dt_proj"):
        run()


# Calls past a layer's place


class Aside(nn.Module):
    """Keeps a reference to one of its layers besides."""

    def __init__(self, keep):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        keep(self)


KEEPS = {
    "list": lambda m: setattr(m, "heads", [m.second]),
    "dict": lambda m: setattr(m, "heads", {"head": m.second}),
    "method": lambda m: setattr(m, "heads", m.second.forward),
    "attribute": lambda m: object.__setattr__(m, "heads", m.second),
}


@pytest.mark.parametrize("how", KEEPS)
def test_layers_that_are_also_called_from_elsewhere_are_left_alone(how):
    reason = r"Aside\.heads refers to it.*ModuleList"
    model = dt.attach(Aside(KEEPS[how]), DORA)
    assert [layer.path for layer in dt.summary(model).layers] == ["first"]
    assert "Aside.heads" in dt.summary(model).left_alone["second"]
    with pytest.raises(dt.AdapterError, match="second: " + reason):
        dt.attach(model, dt.AdapterConfig(rank=2, targets=["second"]), "another")
    with pytest.raises(dt.AdapterError, match="modules_to_save second: " + reason):
        dt.attach(model, dt.AdapterConfig(rank=2, targets=["first"], modules_to_save=["second"]), "another")
