"""Files as LyCORIS writes them, and changed ones."""

from __future__ import annotations

import torch
from lycoris import create_lycoris
from safetensors.torch import load_file, save_file

CONV, QUERY = "lora_unet_mid_block_resnets_0_conv1", "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


@torch.no_grad()
def lycoris(model, file, **options):
    """A network of LyCORIS that has moved, its file, and the model's output with it."""
    options = {"linear_dim": 4, "linear_alpha": 2, "conv_dim": 3, "conv_alpha": 1.5, "dora_wd": True, **options}
    network = create_lycoris(model, 1.0, algo="lora", warn_on_unmatched=False, **options)
    network.apply_to()
    g = torch.Generator().manual_seed(1)
    for layer in network.loras:
        layer.lora_up.weight.copy_(0.1 * torch.randn(layer.lora_up.weight.shape, generator=g))
        if options["dora_wd"]:
            layer.dora_scale.mul_(1 + 0.2 * torch.randn(layer.dora_scale.shape, generator=g))
    save_file({key: tensor.contiguous() for key, tensor in network.state_dict().items()}, file)
    return network


def rewrite(file, change):
    """Replace, add or (None) remove tensors of a file."""
    save_file({key: t for key, t in {**load_file(file), **change}.items() if t is not None}, file)
    return file
