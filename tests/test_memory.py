"""Memory on top of the model: attaching, loading and training, whatever the size of a layer."""

import gc

import bitsandbytes
import pytest
import torch
from bench.peak import peak_bytes
from torch import nn
from torch.utils.checkpoint import checkpoint

import doratune as dt
from doratune.study.footprint import saved_bytes
from helpers import move

MEBIBYTE = 2**20


def large(dtype=torch.bfloat16):
    """A layer of 64 MiB; one float32 copy of its weight takes 128."""
    return nn.Sequential(nn.Linear(8192, 4096, bias=False, dtype=dtype))


def test_attaching_and_loading_take_tiles_of_a_large_layer(tmp_path):
    model = large()
    config = dt.AdapterConfig(rank=4)
    assert peak_bytes(lambda: dt.attach(model, config)) < 64 * MEBIBYTE
    move(model)
    dt.save_adapter(model, tmp_path)
    other = large()
    assert peak_bytes(lambda: dt.load_adapter(other, tmp_path)) < 64 * MEBIBYTE


def test_so_it_is_with_a_quantised_layer():
    base = bitsandbytes.nn.Linear4bit(8192, 4096, bias=False, quant_type="nf4")
    model = nn.Sequential(base).to("cpu")
    assert peak_bytes(lambda: dt.attach(model, dt.AdapterConfig(rank=4))) < 64 * MEBIBYTE


def test_eight_bits_halve_what_is_kept_for_the_magnitude():
    """Where no other operation keeps the layer's output."""
    kept = {}
    for name, options in {
        "lora": {"method": "lora"},
        "dora": {},
        "dora, 8-bit": {"eight_bit_outputs": ["0"]},
    }.items():
        model = nn.Sequential(nn.Linear(256, 256, bias=False, dtype=torch.bfloat16))
        dt.attach(model, dt.AdapterConfig(rank=4, **options))
        x = torch.randn(512, 256, dtype=torch.bfloat16)
        kept[name] = saved_bytes(lambda m=model, x=x: m(x).sum(), [x, *model.parameters()])
    output = 512 * 256
    assert 2 * output <= kept["dora"] - kept["lora"] < 2.1 * output
    assert output <= kept["dora, 8-bit"] - kept["lora"] < 1.1 * output


def test_checkpointing_keeps_no_outputs():
    """torch 2.8 kept each that a function had saved as its own output."""
    blocks = nn.ModuleList([nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)) for _ in range(16)])
    dt.attach(blocks, dt.AdapterConfig(rank=2))
    x = torch.randn(2048, 64, requires_grad=True)

    def step():
        y = x
        for block in blocks:
            y = checkpoint(block, y, use_reentrant=False)
        y.sum().backward()

    step()
    outputs = 2 * len(blocks) * x.nbytes
    assert peak_bytes(step) < 0.9 * outputs, "only the blocks' inputs are kept, half as much"


def test_eight_bits_are_kept_in_files(tmp_path):
    model = nn.Sequential(nn.Linear(32, 32))
    config = dt.AdapterConfig(rank=4, eight_bit_outputs=["0"], norm_refresh="step")
    dt.attach(model, config)
    dt.save_adapter(model, tmp_path)
    other = nn.Sequential(nn.Linear(32, 32))
    dt.load_adapter(other, tmp_path, trainable=True)
    adapter = other[0].adapters["default"]
    assert adapter.eight_bit
    assert adapter.config.norm_refresh == "step"


def tensors():
    # Not isinstance: some objects warn when their __class__ is asked for.
    return [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_under_checkpointing_the_guard_keeps_nothing(kind):
    """Neither dropout's mask nor an input: what autograd does not keep must not stay in a closure."""
    layer = nn.Linear(128, 128) if kind == "linear" else nn.Conv1d(16, 16, 3, padding=1)
    model = nn.Sequential(layer)
    dt.attach(model, dt.AdapterConfig(rank=4, dropout=0.5, targets=["0"]))
    assert model[0].adapters["default"].keep_output  # so that there is a guard
    x = torch.randn(*((64, 128) if kind == "linear" else (4, 16, 128)), requires_grad=True)
    before = {id(t) for t in tensors()}
    y = checkpoint(model, x, use_reentrant=False)
    kept = [t for t in tensors() if id(t) not in before and t is not y]
    assert max((t.numel() for t in kept), default=0) < x.numel()
