"""Small random parts of image generators, and what they put out."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import doratune as dt
from helpers import move

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "conv_shortcut", "time_emb_proj"]
"""Linear layers, and convolutions with kernels of 3 and 1."""
DORA = dt.AdapterConfig(
    rank=4,
    alpha=6,
    targets=TARGETS,
    rank_pattern={"to_q": 3, "mid_block.resnets.0.conv1": 2},
    alpha_pattern={"conv1": 2.5, "to_q": 1},
)
LORA = dt.AdapterConfig(rank=3, alpha=2, method="lora", targets=["to_q", "conv1"], rank_stabilized=True)
MAGNITUDE = dt.AdapterConfig(rank=0, targets=["to_v", "conv_in"])
TEXT = dt.AdapterConfig(rank=2, alpha=3, targets=["q_proj", "fc1"])


def unet() -> nn.Module:
    """Stable Diffusion's, in the small."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()


def sdxl_unet() -> nn.Module:
    """SDXL's: three levels, linear projections, embeddings of text and size."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 1, 2],
        cross_attention_dim=16,
        attention_head_dim=[2, 2, 2],
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=16 + 6 * 4,
    ).eval()


def text_encoder(kind: type[nn.Module] = CLIPTextModel) -> nn.Module:
    """CLIP's; SDXL's second one is a ``CLIPTextModelWithProjection``."""
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=16,
        bos_token_id=0,
        eos_token_id=1,
    )
    return kind(config).eval()


def second_text_encoder() -> nn.Module:
    return text_encoder(CLIPTextModelWithProjection)


@torch.no_grad()
def image(model: nn.Module) -> Tensor:
    """A UNet's output for a fixed input."""
    g = torch.Generator().manual_seed(2)
    extra = {"text_embeds": torch.randn(2, 16, generator=g), "time_ids": torch.ones(2, 6)}
    noisy, text = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 5, 16, generator=g)
    return model(noisy, torch.tensor([7, 9]), text, added_cond_kwargs=extra).sample


@torch.no_grad()
def text(model: nn.Module) -> Tensor:
    """A text encoder's output for fixed tokens."""
    return model(torch.arange(2, 9)[None]).last_hidden_state


def adapted(model: nn.Module, config: dt.AdapterConfig = DORA) -> nn.Module:
    """The model with an adapter that has moved."""
    return move(dt.attach(model, config)).eval()
