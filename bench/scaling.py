"""The tables of docs/scaling.md: what a step of 8B, 70B and 405B models needs on 8 to 1,024 devices.

python -m bench.scaling
"""

from __future__ import annotations

from transformers import LlamaConfig

import doratune as dt
from doratune.study.estimate import estimate

SHAPES = {  # hidden, intermediate, layers, heads
    "8B": (4096, 14336, 32, 32),
    "70B": (8192, 28672, 80, 64),
    "405B": (16384, 53248, 126, 128),
}
DEVICES = (8, 64, 256, 1024)
TOKENS = 4096
GIB = 2**30


def config(name: str) -> LlamaConfig:
    """A model of Llama 3.1's shape."""
    hidden, intermediate, layers, heads = SHAPES[name]
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )


def main() -> None:
    """Print a Markdown table."""
    columns = (
        "weights | gathered | adapters, their gradients and states | activations | total | received | of it DoRA's"
    )
    print(f"| model | devices | {columns} | DoRA's arithmetic |\n|---|---|---|---|---|---|---|---|---|---|")
    for name in SHAPES:
        for devices in DEVICES:
            e = estimate(config(name), dt.AdapterConfig(rank=16), tokens=TOKENS, devices=devices, checkpointing=True)
            sizes = (e.weights, e.gathered, e.adapters + e.gradients + e.optimizer, e.activations, e.total)
            told = " | ".join(f"{size / GIB:,.1f}" for size in sizes)
            moved = f"{e.communication / 1e9:,.1f} GB | {e.norm_communication / 1e6:,.1f} MB"
            print(f"| {name} | {devices:,} | {told} | {moved} | {e.dora_share:.2%} |", flush=True)


if __name__ == "__main__":
    main()
