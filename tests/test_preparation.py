"""What holds for a whole model while adapters are attached."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import doratune as dt
from helpers import assert_same, error, gradients, ids, move, snapshot, tiny, tiny_llama

CONV = dt.AdapterConfig(rank=2, targets=["0", "3"])


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))


def steps(model, number=3):
    """Training steps on data whose statistics are not those of the base."""
    model.train()
    optimizer = torch.optim.SGD(dt.trainable_parameters(model).values(), lr=0.1)
    for _ in range(number):
        model(torch.randn(4, 3, 8, 8) * 3 + 2).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


# Running statistics


@pytest.mark.parametrize("bias", ["none", "all"])
def test_running_statistics_are_the_bases_own_and_stay(tmp_path, bias):
    model = convolutional().train()
    before = snapshot(model)
    x = torch.randn(2, 3, 8, 8)
    dt.attach(model, dt.AdapterConfig(rank=2, targets=["0", "3"], bias=bias))
    steps(model)
    with torch.no_grad():
        expected = model.eval()(x)
        dt.save_adapter(model, tmp_path)
        again = dt.load_adapter(convolutional().eval(), tmp_path)
        assert torch.equal(again(x), expected)
        with dt.disabled(model):
            assert torch.equal(model(x), convolutional().eval()(x))
    model.train()
    assert_same(before, snapshot(dt.detach(model)))


def test_training_sees_what_evaluation_sees_in_copies_too():
    model = dt.attach(convolutional(), CONV)
    x = torch.randn(2, 3, 8, 8)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(twin.train()(x), twin.eval()(x))
        assert torch.equal(twin[1].running_mean, torch.zeros(8))
        twin.train()
        dt.merge(twin)
        assert twin[1].training
        twin(x)
        assert twin[1].running_mean.any()


def test_a_normalisation_trained_whole_learns_its_statistics(tmp_path):
    model = convolutional()
    dt.attach(model, CONV)
    config = dt.AdapterConfig(rank=2, targets=["0", "3"], modules_to_save=["1"])
    dt.attach(model, config, "second")
    steps(model)
    x = torch.randn(2, 3, 8, 8)
    copied = model[1].copies["second"]
    assert copied.running_mean.any()
    with torch.no_grad():
        expected = model.eval()(x)
        dt.save_adapter(model, tmp_path, "second")
        assert torch.equal(dt.load_adapter(convolutional().eval(), tmp_path)(x), expected)
        with dt.disabled(model):
            assert torch.equal(model(x), convolutional().eval()(x))
        dt.merge(model)
        assert torch.allclose(model(x), expected, atol=1e-5)


# What is trained


@pytest.mark.parametrize("how", ["assign", "to_empty"])
@pytest.mark.parametrize("leave", [dt.detach, dt.merge])
def test_what_was_trained_is_trained_again_in_replaced_parameters(leave, how):
    with torch.device("meta"):
        model = tiny(tied=True)
    model.layers[0].up.weight.requires_grad_(False)
    model.layers[1] = checkpoint_wrapper(model.layers[1])
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    dt.attach(model, dt.AdapterConfig(rank=2, modules_to_save=["norm"]))
    if how == "to_empty":
        model.to_empty(device="cpu")
    model.load_state_dict(tiny(tied=True).state_dict(), strict=False, assign=how == "assign")
    leave(copy.deepcopy(model))
    leave(model)
    assert {n: p.requires_grad for n, p in model.named_parameters() if n in flags} == flags


# Inputs that require grad


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_.*able. is deprecated:FutureWarning")
def test_a_second_adapter_that_saves_the_embedding_does_not_copy_the_model():
    model = dt.attach(tiny_llama(), dt.AdapterConfig(rank=2, targets=["q_proj"]))
    decoder = model.model

    def copied(memo):
        raise AssertionError("the decoder is copied")

    decoder.__deepcopy__ = copied
    dt.attach(model, dt.AdapterConfig(rank=2, targets=["q_proj"], modules_to_save=["embed_tokens"]), "second")
    del decoder.__deepcopy__
    model.gradient_checkpointing_enable({"use_reentrant": True})
    embedding = copy.deepcopy(model).train().model.embed_tokens.base_layer
    assert embedding(ids()).requires_grad
    dt.detach(model)
    assert not [hook for m in model.modules() for hook in m._forward_hooks.values()]


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0)
    x = ids(vocabulary=32)
    return T5ForConditionalGeneration(config), {"input_ids": x, "labels": x, "use_cache": False}


def llava():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        text_config=LlamaConfig(vocab_size=32, **sizes),
        vision_config=CLIPVisionConfig(image_size=8, patch_size=4, **sizes),
        image_token_id=31,
    )
    torch.manual_seed(0)
    x = torch.tensor([[1, 31, 31, 31, 31, 2, 3]])
    model = LlavaForConditionalGeneration(config)
    return model, {"input_ids": x, "labels": x, "pixel_values": torch.randn(1, 3, 8, 8), "use_cache": False}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_.*able. is deprecated:FutureWarning")
@pytest.mark.parametrize("make", [t5, llava])
def test_all_towers_train_under_reentrant_checkpointing(make):
    model, inputs = make()
    dt.attach(model, dt.AdapterConfig(rank=2))
    move(model.train())

    def loss():
        return model(**inputs).loss

    expected = gradients(model, loss)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    found = gradients(model, loss)
    assert expected.keys() == found.keys()
    assert all(error(found[n], expected[n]) < 1e-4 for n in expected)
    dt.detach(model)
    assert not [hook for m in model.modules() for hook in m._forward_hooks.values() if "doratune" in str(hook)]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_.*able. is deprecated:FutureWarning")
def test_reentrant_checkpointing_after_the_adapter_of_the_embedding_is_deleted():
    model = tiny_llama()
    dt.attach(model, dt.AdapterConfig(rank=2, targets=["embed_tokens", "q_proj"]), "first")
    dt.attach(model, dt.AdapterConfig(rank=2, targets=["q_proj"]), "second")
    dt.delete_adapter(model, "first")
    dt.set_adapter(model, "second")
    model.train().gradient_checkpointing_enable({"use_reentrant": True})
    x = ids(vocabulary=32)
    assert gradients(model, lambda: model(x, labels=x, use_cache=False).loss)


class PositionsInPlace(nn.Module):
    """As GIT: what the embedding gives is written to."""

    def __init__(self):
        super().__init__()
        self.gradient_checkpointing = True
        self.embedding, self.layer = nn.Embedding(8, 4), nn.Linear(4, 4)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, x):
        h = self.embedding(x)
        h += 1
        return torch.utils.checkpoint.checkpoint(self.layer, h, use_reentrant=True)


def test_a_checkpointed_model_may_write_to_its_embeddings():
    model = dt.attach(PositionsInPlace(), dt.AdapterConfig(rank=2))
    assert gradients(model, lambda: model(ids(vocabulary=8)).square().sum())
