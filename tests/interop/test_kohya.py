"""Files of kohya's sd-scripts and LyCORIS: read as LyCORIS wrote them, and read by LyCORIS as written here."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from lycoris import create_lycoris_from_weights
from safetensors.torch import load_file
from torch import nn

import doratune as dt
from doratune.targets import adapted_layers
from file_helpers import load_peft
from helpers import error
from interop.image_models import (
    DORA,
    LORA,
    MAGNITUDE,
    TEXT,
    adapted,
    image,
    second_text_encoder,
    text,
    text_encoder,
    unet,
)
from interop.kohya_files import CONV, QUERY, lycoris, rewrite


@torch.no_grad()
def read_by_lycoris(model, file):
    network, _ = create_lycoris_from_weights(1.0, str(file), model)
    network.apply_to()
    return network


# LyCORIS as the oracle


@pytest.mark.parametrize("dora", [True, False])
def test_a_file_of_lycoris_is_the_same_function(dora, tmp_path):
    theirs, ours = unet(), unet()
    network = lycoris(theirs, tmp_path / "theirs.safetensors", dora_wd=dora)
    dt.kohya.load_adapter(ours, tmp_path / "theirs.safetensors")
    assert len(adapted_layers(ours)) == len(network.loras) > 60
    assert error(image(theirs), image(unet())) > 0.05
    assert error(image(ours), image(theirs)) < 1e-5
    assert {layer.adapters["default"].rank for layer in adapted_layers(ours).values()} == {3, 4}
    assert not dt.trainable_parameters(ours)


@pytest.mark.parametrize("config", [DORA, LORA, MAGNITUDE], ids=["dora", "lora", "magnitude"])
def test_lycoris_reads_what_is_written_here(config, tmp_path):
    ours, theirs, again = adapted(unet(), config), unet(), unet()
    dt.kohya.save_adapter({"lycoris": ours}, tmp_path / "ours.safetensors")
    network = read_by_lycoris(theirs, tmp_path / "ours.safetensors")
    assert len(network.loras) == len(adapted_layers(ours))
    assert error(image(ours), image(unet())) > 1e-3
    assert error(image(theirs), image(ours)) < 1e-5
    dt.kohya.load_adapter(again, tmp_path / "ours.safetensors", trainable=True)
    assert torch.equal(image(again), image(ours))
    assert len(dt.trainable_parameters(again)) == len(adapted_layers(again)) * (2 if config is LORA else 3)


def test_grouped_convolutions_mean_the_same_there(tmp_path):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, padding=1), nn.Tanh(), nn.Conv2d(6, 2, 3, dilation=2))

    x = torch.randn(2, 4, 9, 9)
    theirs, ours = model(), model()
    lycoris(theirs, tmp_path / "a.safetensors")
    dt.kohya.load_adapter(ours, tmp_path / "a.safetensors")
    assert error(theirs(x), model()(x)) > 0.05
    assert error(ours(x), theirs(x)) < 1e-5


# Names


def test_several_models_share_a_file(tmp_path):
    parts = {"lora_unet": unet(), "lora_te1": text_encoder(), "lora_te2": second_text_encoder()}
    adapted(parts["lora_unet"])
    adapted(parts["lora_te1"], TEXT)
    adapted(parts["lora_te2"], TEXT)
    dt.kohya.save_adapter(parts, tmp_path / "a.safetensors")
    keys = {key.split(".")[0] for key in load_file(tmp_path / "a.safetensors")}
    assert {CONV, QUERY} <= keys
    for prefix in ("lora_te1", "lora_te2"):  # transformers 5 has dropped text_model in the first of them
        assert f"{prefix}_text_model_encoder_layers_1_self_attn_q_proj" in keys
    again = {"lora_unet": unet(), "lora_te1": text_encoder(), "lora_te2": second_text_encoder()}
    assert dt.kohya.load_adapter(again, tmp_path / "a.safetensors", "style") is again
    assert torch.equal(image(again["lora_unet"]), image(parts["lora_unet"]))
    for prefix in ("lora_te1", "lora_te2"):
        assert error(text(parts[prefix]), text(text_encoder(type(parts[prefix])))) > 1e-3
        assert torch.equal(text(again[prefix]), text(parts[prefix]))
        assert dt.active_adapter(again[prefix]) == "style"


def test_a_part_of_the_file_can_be_left_out(tmp_path):
    dt.kohya.save_adapter(
        {"lora_unet": adapted(unet()), "lora_te": adapted(text_encoder(), TEXT)}, tmp_path / "a.safetensors"
    )
    model = unet()
    with pytest.raises(dt.AdapterError, match="models has no 'lora_te'; add it with its model, or with None"):
        dt.kohya.load_adapter(model, tmp_path / "a.safetensors")
    dt.kohya.load_adapter({"lora_unet": model, "lora_te": None}, tmp_path / "a.safetensors")
    assert dt.active_adapter(model) == "default"


def test_ranks_and_alphas_survive_pefts_format(tmp_path):
    ours = adapted(unet())
    dt.kohya.save_adapter(ours, tmp_path / "a.safetensors")
    again = dt.kohya.load_adapter(unet(), tmp_path / "a.safetensors")
    dt.save_adapter(again, tmp_path / "peft")
    assert error(image(load_peft(unet(), tmp_path / "peft")), image(ours)) < 1e-5
    for path, layer in adapted_layers(ours).items():
        found, expected = adapted_layers(again)[path].adapters["default"], layer.adapters["default"]
        assert (found.rank, found.scale) == (expected.rank, pytest.approx(expected.scale))


def test_without_alpha_the_scale_is_one(tmp_path):
    ours = adapted(unet(), dt.AdapterConfig(rank=3, alpha=3, targets=["to_q"]))
    again = unet()
    dt.kohya.save_adapter(ours, tmp_path / "a.safetensors")
    rewrite(tmp_path / "a.safetensors", {key: None for key in load_file(tmp_path / "a.safetensors") if "alpha" in key})
    dt.kohya.load_adapter(again, tmp_path / "a.safetensors")
    assert torch.equal(image(again), image(ours))


def test_a_linear_layer_may_be_stored_as_a_pointwise_convolution_and_the_other_way_round(tmp_path):
    ours = adapted(unet())
    dt.kohya.save_adapter(ours, tmp_path / "a.safetensors")
    found = load_file(tmp_path / "a.safetensors")
    change = {}
    for key, tensor in found.items():
        if tensor.ndim == 2:
            change[key] = tensor[:, :, None, None]
        elif tensor.ndim == 4 and tensor.shape[2:].numel() == 1:
            change[key] = tensor[:, :, 0, 0]
    assert len(change) > 50
    again = dt.kohya.load_adapter(unet(), rewrite(tmp_path / "a.safetensors", change))
    assert torch.equal(image(again), image(ours))


def test_a_path_that_ends_like_another_is_not_that_one(tmp_path):
    def model():
        torch.manual_seed(0)
        return nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.ModuleDict({"a": nn.Linear(4, 4)})})

    for config in (
        dt.AdapterConfig(rank=1, alpha=1, targets=["a"], rank_pattern={"b.a": 2}, alpha_pattern={"b.a": 3}),
        dt.AdapterConfig(rank=1, targets="a"),
        dt.AdapterConfig(rank=1, alpha=1, targets=["a"], rank_pattern={"^a": 2}, alpha_pattern={"^a": 3}),
    ):
        ours = adapted(model(), config)
        dt.kohya.save_adapter(ours, tmp_path / "a.safetensors")
        again = adapted_layers(dt.kohya.load_adapter(model(), tmp_path / "a.safetensors"))
        expected = {path: layer.adapters["default"].rank for path, layer in adapted_layers(ours).items()}
        assert {path: layer.adapters["default"].rank for path, layer in again.items()} == expected


# The documentation


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = {
        "unet": unet(),
        "text_encoder": text_encoder(),
        "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False),
    }
    pipe = SimpleNamespace(**parts)
    dt.kohya.save_adapter({"lora_unet": adapted(unet()), "lora_te": adapted(text_encoder(), TEXT)}, "style.safetensors")
    page = (Path(__file__).parents[2] / "docs" / "files.md").read_text(encoding="utf-8")
    names = {"dt": dt, "torch": torch, "pipe": pipe, "batches": [(torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16))] * 2}
    for block in re.findall(
        r"^```python\n(.*?)^```", page.partition("## Image generation")[2], re.DOTALL | re.MULTILINE
    ):
        exec(block, names)
    pipe.unet.eval()
    again = {"file": unet(), "folder": unet()}
    dt.kohya.load_adapter(again["file"], "mine.safetensors")
    dt.diffusers.load_adapter({"unet": again["folder"]}, "mine")
    assert error(image(pipe.unet), image(unet())) > 1e-5
    assert torch.equal(image(again["file"]), image(pipe.unet))
    assert torch.equal(image(again["folder"]), image(pipe.unet))


# Training


def test_a_unet_trains_under_gradient_checkpointing_and_merges():
    model = unet()
    dt.attach(model, dt.AdapterConfig(rank=2, alpha=4, targets=["to_q", "to_k", "to_v", "to_out.0"]))
    model.train()
    model.enable_gradient_checkpointing()
    g = torch.Generator().manual_seed(0)
    noisy, noise, prompt = (torch.randn(s, generator=g) for s in ((2, 4, 8, 8), (2, 4, 8, 8), (2, 5, 16)))
    optimizer = torch.optim.AdamW(dt.parameter_groups(model, lr=0.05))
    losses = []
    for _ in range(8):
        loss = nn.functional.mse_loss(model(noisy, torch.tensor([7, 9]), prompt).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if len(losses) > 1:  # B starts at 0, and A without a gradient
            assert all(p.grad is not None and p.grad.any() for p in dt.trainable_parameters(model).values())
        optimizer.step()
    assert losses[-1] < 0.95 * losses[0]
    model.eval()
    unmerged = image(model)
    dt.merge(model, verify=True)
    assert error(image(model), unmerged) < 1e-5
