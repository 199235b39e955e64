"""What the layers of a diffusers UNet were called by the implementation that Stable Diffusion was published with.

kohya's sd-scripts trains SDXL under those names (``input_blocks.4.1.transformer_blocks.0.attn1.to_q``). There, the
parts of all blocks of one direction are counted through.
"""

from __future__ import annotations

import re
from collections.abc import Collection

OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
IN_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
IN_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def original_names(paths: Collection[str]) -> dict[str, str]:
    """The original name of each layer that has one, by its path in a diffusers UNet; empty for other models."""
    layers = len({path.split(".")[3] for path in paths if re.match(r"down_blocks\.0\.resnets\.\d+$", path)})
    if not layers:
        return {}
    found = {path: OUTSIDE[path] for path in paths if path in OUTSIDE}
    for path in paths:
        in_block, in_middle = IN_BLOCK.fullmatch(path), IN_MIDDLE.fullmatch(path)
        if in_middle:
            part, index, rest = in_middle.groups()
            found[path] = f"middle_block.{2 * int(index) + (part == 'attentions')}.{RESNET.get(rest, rest)}"
        elif in_block:
            direction, block, part, index, rest = in_block.groups()
            first = int(block) * (layers + 1)  # of a block; the first input block is conv_in
            if part == "downsamplers":
                found[path] = f"input_blocks.{first + layers + 1}.0.op"
            elif part == "upsamplers":
                attends = f"up_blocks.{block}.attentions" in paths
                found[path] = f"output_blocks.{first + layers}.{1 + attends}.{rest}"
            else:
                place = (
                    f"input_blocks.{first + 1 + int(index)}"
                    if direction == "down"
                    else f"output_blocks.{first + int(index)}"
                )
                found[path] = f"{place}.{int(part == 'attentions')}.{RESNET.get(rest, rest)}"
    return found
