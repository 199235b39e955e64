"""A language model of a few thousand weights, its tokenizer and a text: all made in memory, the same every time."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

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


def llama(seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=256,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def save_model(folder: Path) -> Path:
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def words(count: int, seed: int = 0) -> str:
    choose = random.Random(seed)
    return " ".join(choose.choice(["once", "upon", "a", "time", "king", "wolf", "forest"]) for _ in range(count))


def write_text(path: Path, count: int = 400) -> Path:
    path.write_text(words(count), encoding="utf-8")
    return path
