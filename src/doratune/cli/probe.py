"""A whole model's output on fixed random inputs, to compare what it does with and without a change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def random_inputs(model: Any) -> dict[str, Any]:
    """Random tokens or images of the model's own size; empty for models that take neither."""
    generator = torch.Generator().manual_seed(0)
    name, config = getattr(model, "main_input_name", None), model.config
    words, pixels = getattr(config, "vocab_size", None), getattr(config, "image_size", None)
    if name == "input_ids" and words:
        tokens = torch.randint(0, words, (2, 32), generator=generator).to(model.device)
        decoder = ["decoder_input_ids"] if getattr(config, "is_encoder_decoder", False) else []
        end = getattr(config, "eos_token_id", None)
        if decoder and isinstance(end, int):  # where such classifiers read the class: one in each text
            tokens[tokens == end] = 0 if end else 1
            tokens[:, -1] = end
        return dict.fromkeys([name, *decoder], tokens)
    if name == "pixel_values" and pixels:
        height, width = (pixels, pixels) if isinstance(pixels, int) else pixels
        images = torch.randn(2, config.num_channels, height, width, generator=generator)
        return {name: images.to(model.device, model.dtype)}
    return {}


def logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    """What the model makes of them, float32."""
    with torch.no_grad():
        found: Tensor = model(**inputs)[0].float()
    return found
