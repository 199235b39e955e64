"""Original names of a UNet's layers: diffusers' own renaming of LoRA files is the oracle."""

from __future__ import annotations

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

import doratune as dt
from doratune.interop.unet_names import original_names
from doratune.targets import adapted_layers, plain_modules
from helpers import error
from interop.image_models import TARGETS, adapted, image, sdxl_unet, text_encoder, unet

ALL = [*TARGETS, "to_out.0", "proj_out", "conv2", "net.0.proj", "net.2", "conv", "conv_in", "conv_out", "linear_1"]


def test_diffusers_finds_the_same_layers_under_them(tmp_path):
    """All kinds of layers, every block, a value of its own for each."""
    model = adapted(sdxl_unet(), dt.AdapterConfig(rank=2, alpha=3, method="lora", targets=ALL))
    dt.kohya.save_adapter(model, tmp_path / "a.safetensors")
    former = {path.replace(".", "_"): n.replace(".", "_") for path, n in original_names(plain_modules(model)).items()}
    tensors = {}
    for key, tensor in load_file(tmp_path / "a.safetensors").items():
        layer, _, part = key.removeprefix("lora_unet_").partition(".")
        tensors[f"lora_unet_{former[layer]}.{part}"] = tensor
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.alpha" in tensors
    save_file(tensors, tmp_path / "a.safetensors")

    ours = dt.kohya.load_adapter(sdxl_unet(), tmp_path / "a.safetensors")
    assert torch.equal(image(ours), image(model))

    theirs = sdxl_unet()
    found, alphas, _ = StableDiffusionXLPipeline.lora_state_dict(
        tensors, unet_config=theirs.config, return_lora_metadata=True
    )
    theirs.load_lora_adapter(found, prefix="unet", network_alphas=alphas)
    assert len(found) == 2 * len(adapted_layers(model)) > 500
    assert error(image(model), image(sdxl_unet())) > 0.05
    assert error(image(theirs), image(model)) < 1e-5


def test_an_upsampler_without_attention_before_it_comes_one_place_earlier():
    names = original_names(plain_modules(unet()))
    assert names["up_blocks.0.upsamplers.0.conv"] == "output_blocks.1.2.conv"
    # Stable Diffusion 1's first upward block has no attention: output_blocks.2.1.conv there.
    plain = {"down_blocks.0.resnets.0", "down_blocks.0.resnets.1", "up_blocks.0.upsamplers.0.conv"}
    assert original_names(plain) == {"up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv"}


def test_other_models_have_none():
    assert original_names(plain_modules(text_encoder())) == {}
