"""Small checkpoints whose changes are known, as files."""

import json

import torch
from safetensors.torch import save_file

LAYERS, KINDS = 6, ("self_attn.q_proj", "mlp.up_proj")


def base_weights(rows=12, columns=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"model.layers.{layer}.{kind}.weight": torch.randn(rows, columns, generator=generator)
        for layer in range(LAYERS)
        for kind in KINDS
    }


def write(folder, weights, config=None, name="model.safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: w.contiguous() for key, w in weights.items()}, folder / name, metadata={"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_shards(folder, weights):
    """One file for each weight, and the index."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {key: f"model-{i:05d}-of-{len(weights):05d}.safetensors" for i, key in enumerate(weights)}
    for key, file in files.items():
        save_file({key: weights[key].contiguous()}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def turned(weight, angle):
    """Every row turned by an angle towards a direction at right angles to it, its length kept; float64."""
    w = weight.double()
    other = torch.randn(w.shape, generator=torch.Generator().manual_seed(1)).double()
    length = w.norm(dim=1, keepdim=True)
    other -= w * (other * w).sum(1, keepdim=True) / length**2
    other *= length / other.norm(dim=1, keepdim=True)
    angle = torch.as_tensor(angle, dtype=torch.float64)
    return w * angle.cos() + other * angle.sin()
