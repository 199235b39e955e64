"""Bases in fewer bits: every kind of ``--quantize`` trains, and merges into a model of full precision."""

from typing import get_args

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import doratune as dt
from doratune.train import AdapterOptions, TrainConfig, assemble, train
from doratune.train.choices import Quantize
from doratune.train.models import load_model
from doratune.train.placement import loading_options, quantization, quantized
from doratune.train.tasks.prepared import Prepared
from train.tiny import llama, tokenizer, write_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=257, **sizes)).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    write_text(folder / "text.txt")
    return folder


@pytest.mark.parametrize("kind", get_args(Quantize))
def test_a_quantised_base_trains_and_merges_into_full_precision(folder, kind):
    config = TrainConfig(
        str(folder / "model"),
        (str(folder / "text.txt"),),
        folder / kind,
        adapter=AdapterOptions(rank=4),
        quantize=kind,
        max_length=16,
        steps=3,
        batch_size=2,
        learning_rate=1e-2,
    )
    result = train(config)
    assert result.loss_after < result.loss_before
    options = {"quantization_config": quantization(kind, torch.float32)}
    model = load_model(str(folder / "model"), torch.float32, options=options)
    dt.load_adapter(model, folder / kind / "adapter").eval()
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        before = model(ids).logits
        dt.merge(model)
        after = model(ids).logits
    projection = model.model.layers[0].mlp.up_proj
    assert type(projection) is nn.Linear
    assert type(projection.weight) is nn.Parameter
    assert projection.weight.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    # int8 rounds its inputs, too.
    assert (after - before).abs().max() < (0.1 if kind == "int8" else 1e-3) * before.abs().max()


def test_a_kind_that_there_is_none_of():
    with pytest.raises(dt.AdapterError, match="quantize must be one of nf4, int8, torchao-int8, torchao-int4; found"):
        quantized("nf8", torch.float32)


def test_scales_are_quantised_again_and_arithmetic_is_in_the_dtype_asked_for():
    chosen = quantization("nf4", torch.bfloat16)
    assert chosen.bnb_4bit_use_double_quant
    assert chosen.bnb_4bit_compute_dtype == torch.bfloat16
    assert not quantization("nf4", torch.float32, double=False).bnb_4bit_use_double_quant


def test_fsdp_is_refused_where_it_cannot_work(folder, monkeypatch):
    options = {"quantize": "nf4", "method": "lora", "task": "text-classification", "fsdp": True}
    config = TrainConfig(str(folder / "model"), (str(folder / "text.txt"),), **options)
    told = "\n".join(config.problems())
    assert "torchrun --nproc-per-node N -m doratune train" in told
    assert "does not spread quantised weights (nf4)" in told
    assert "serves adapters on language models" in told
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "use --fsdp instead" in "\n".join(TrainConfig("m", ("d",)).problems())


@pytest.mark.parametrize("kind", get_args(Quantize))
def test_each_process_quantises_on_its_own_gpu(kind, monkeypatch):
    config = TrainConfig("model", ("text.txt",), quantize=kind)
    assert "device_map" not in loading_options(config, torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert loading_options(config, torch.float32)["device_map"] == {"": 1}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # each process sees its own alone
    assert loading_options(config, torch.float32)["device_map"] == {"": 0}
    assert "device_map" not in loading_options(TrainConfig("model", ("text.txt",)), torch.float32)


def test_each_of_several_processes_takes_its_own_gpu_before_anything_is_loaded(monkeypatch):
    done = []
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(assemble, "loading_options", lambda *_: {})
    monkeypatch.setattr(assemble, "load_model", lambda *_, **__: done.append("loaded") or llama())
    monkeypatch.setattr(assemble, "to_device", lambda model: done.append("moved") or model)
    monkeypatch.setattr(assemble, "attach", lambda model, config: done.append("adapted") or dt.attach(model, config))

    def made(**options):
        done.clear()
        config = TrainConfig("model", ("text.txt",), **options)
        assemble.make_model(config, Prepared(None, None, len, None, "tokens", ""), None)
        return done

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert made() == ["loaded", "moved", "adapted"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert made() == [1, "loaded", "moved", "adapted"]
    assert made(fsdp=True) == [1, "loaded", "adapted"], "parts find their own places"
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert made() == ["loaded", "moved", "adapted"]
