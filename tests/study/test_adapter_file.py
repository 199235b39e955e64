import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import doratune as dt
from doratune.own_options import METADATA
from doratune.study.adapter_file import inspect_adapter
from doratune.study.stored_adapter import StoredAdapter
from train.tiny import llama

UP = "base_model.model.model.layers.0.mlp.up_proj."


@pytest.fixture
def folder(tmp_path):
    model = dt.attach(llama(), dt.AdapterConfig(rank=4, rank_pattern={"q_proj": 2}))
    with torch.no_grad():
        for name, parameter in dt.trainable_parameters(model).items():
            if "lora_B" in name:
                parameter.normal_()
    dt.save_adapter(model, tmp_path)
    return tmp_path


def change(folder, **tensors):
    """Replace tensors of the first up_proj; None removes one."""
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    for part, tensor in tensors.items():
        key = UP + {"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"}[part]
        if tensor is None:
            del state[key]
        else:
            state[key] = tensor(state[key]) if callable(tensor) else tensor
    save_file(state, file, metadata={"format": "pt"})


def test_a_good_file(folder):
    report = inspect_adapter(folder)
    assert not report.broken
    assert not report.suspicious
    assert report.method == "dora"
    ranks = {layer.path.rpartition(".")[2]: layer.rank for layer in report.layers}
    assert (ranks["q_proj"], ranks["up_proj"]) == (2, 4)
    assert report.layers[0].path.startswith("model.layers.0.")
    assert report.parameters == sum(t.numel() for t in load_file(folder / "adapter_model.safetensors").values())


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"B": lambda t: t * float("nan")}, "NaN or infinite"),
        ({"B": lambda t: t.int()}, "not floating-point"),
        ({"A": None}, "lora_A is missing"),
        ({"m": None}, "there is no magnitude"),
        ({"m": lambda t: t[:3].contiguous()}, "3 magnitudes for 32 rows"),
        ({"A": lambda t: t[:2].contiguous()}, "do not belong together"),
        ({"A": lambda t: t[:0], "B": lambda t: t[:, :0]}, "A, B without a single number"),
        ({"m": lambda t: t[:0]}, "m without a single number"),
        (
            {"A": lambda t: t[:2].contiguous(), "B": lambda t: t[:, :2].contiguous()},
            "rank 2, adapter_config.json says 4",
        ),
    ],
)
def test_what_breaks_a_file_is_named(folder, tensors, said):
    change(folder, **tensors)
    assert any(said in line and "up_proj" in line for line in inspect_adapter(folder).broken)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"B": lambda t: t * 0}, "B is 0"),
        ({"A": lambda t: t * 0}, "A is 0"),
        ({"B": lambda t: t * 1e6}, "B has values up to"),
        ({"m": lambda t: t * 1e6}, "m has values up to"),
        ({"m": lambda t: -t}, "32 magnitudes are negative"),
        ({"m": lambda t: t * 0}, "32 magnitudes are 0"),
    ],
)
def test_what_is_rarely_meant_is_named(folder, tensors, said):
    change(folder, **tensors)
    report = inspect_adapter(folder)
    assert not report.broken
    assert any(said in line and "up_proj" in line for line in report.suspicious)


def test_metadata_that_no_adapter_is_loaded_with_breaks_a_file(folder):
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", METADATA: "{"})
    (line,) = inspect_adapter(folder).broken
    assert line.startswith("metadata 'doratune': ")
    with pytest.raises(dt.AdapterError, match=r"adapter_model.safetensors cannot be used: metadata 'doratune': "):
        StoredAdapter(folder)


def test_files_that_cannot_be_read(folder):
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(dt.AdapterError, match="truncated"):
        inspect_adapter(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LOHA"}))
    with pytest.raises(dt.AdapterError, match="LOHA"):
        inspect_adapter(folder)


def test_a_file_without_layers(folder):
    save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    broken = inspect_adapter(folder).broken
    assert any("unknown key" in line for line in broken)
    assert any("holds no adapted layer" in line for line in broken)
