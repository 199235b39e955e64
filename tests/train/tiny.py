"""Models of a few thousand weights, their tokenizer and data: all made in memory, the same every time."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch


def tokenizer() -> Any:
    """One token a byte, and a sign for the end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {sign: number for number, sign in enumerate([*alphabet, "<end>"])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<end>")


def sentencepiece_tokenizer() -> Any:
    """Spaces belong to the words behind them and vanish at the start of a text; a sign at either end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", "▁once", "▁upon", "▁a", "▁time", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    inner = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def llama(seed: int = 0, vocabulary: int = 257, layers: int = 2) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=256,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def save_model(folder: Path, layers: int = 2) -> Path:
    llama(layers=layers).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_model_with_other_ends(folder: Path) -> Path:
    """As Llama 3 and Qwen2.5 come: the config names several ends and no padding, the tokenizer pads with another."""
    model = llama()
    model.config.eos_token_id, model.config.pad_token_id = [255, 256], None
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def words(count: int, seed: int = 0) -> str:
    choose = random.Random(seed)
    return " ".join(choose.choice(["once", "upon", "a", "time", "king", "wolf", "forest"]) for _ in range(count))


def write_text(path: Path, count: int = 150) -> Path:
    path.write_text(words(count), encoding="utf-8")
    return path


CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def chat_tokenizer() -> Any:
    """The tokenizer with a chat template."""
    made = tokenizer()
    made.chat_template = CHAT_TEMPLATE
    return made


def save_chat_model(folder: Path) -> Path:
    llama().save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder


def save_encoder(folder: Path) -> Path:
    """A BERT without a head, whose files lack the pooler, too."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=257, max_position_embeddings=64, **sizes), add_pooling_layer=False)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def vision_model(kind: str) -> Any:
    """A ViT, DINOv2, BEiT, Swin or Swinv2 for images of 16 x 16 pixels, without a head."""
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes["initializer_range"] = 0.2  # or else so small a model hardly sees its input
    if kind in ("swin", "swinv2"):
        make, options = {
            "swin": (transformers.SwinModel, transformers.SwinConfig),
            "swinv2": (transformers.Swinv2Model, transformers.Swinv2Config),
        }[kind]
        return make(options(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4))
    if kind == "beit":
        config = transformers.BeitConfig(image_size=16, patch_size=4, intermediate_size=32, **sizes)
        return transformers.BeitModel(config)
    if kind == "dinov2":
        return transformers.Dinov2Model(transformers.Dinov2Config(image_size=16, patch_size=4, mlp_ratio=2, **sizes))
    config = transformers.ViTConfig(image_size=16, patch_size=4, intermediate_size=32, **sizes)
    return transformers.ViTModel(config, add_pooling_layer=False)


def save_vision_model(folder: Path, kind: str = "vit") -> Path:
    vision_model(kind).save_pretrained(folder)
    return folder


def images(count: int, seed: int = 0) -> tuple[Any, Any]:
    """Images of 16 x 16 pixels, blue (class 0) or red (class 1), and their classes."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    pixels = random.integers(0, 100, size=(count, 16, 16, 3)).astype(np.uint8)
    pixels[labels == 0, :, :, 2] += 150
    pixels[labels == 1, :, :, 0] += 150
    return pixels, labels


def save_image_folder(folder: Path, count: int = 24) -> Path:
    from PIL import Image

    for number, (pixels, label) in enumerate(zip(*images(count), strict=True)):
        path = folder / ("blue", "red")[label] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


def save_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def reviews(count: int) -> list[dict[str, Any]]:
    """Texts to classify."""
    good, bad = ("a good tale", "the king was happy"), ("a bad tale", "the wolf was angry")
    return [{"review": f"{(good, bad)[i % 2][i // 2 % 2]} {i}", "label": ("good", "bad")[i % 2]} for i in range(count)]
