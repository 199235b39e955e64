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
ADAPTER = dt.AdapterConfig(rank=16)
BANDWIDTH, RATE = 3.35e12, 400e12
"""Bytes and operations a second of an H100: its memory's, and two fifths of its products' peak in bfloat16."""
BYTES = (2 + 2) * 2 + 3 * 2
"""Of each output in bfloat16: u read and y written, twice with checkpointing; backward dy and y read, du written."""
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
    """Print two Markdown tables."""
    columns = (
        "weights | gathered | adapters, their gradients and states | activations | total | received | of it DoRA's"
    )
    print(f"| model | devices | {columns} | DoRA's arithmetic |\n|---|---|---|---|---|---|---|---|---|---|")
    for name in SHAPES:
        for devices in DEVICES:
            e = estimate(config(name), ADAPTER, tokens=TOKENS, devices=devices, fsdp=True, gradient_checkpointing=True)
            sizes = (e.weights, e.gathered, e.adapters + e.gradients + e.optimizer, e.activations, e.total)
            told = " | ".join(f"{size / GIB:,.1f}" for size in sizes)
            moved = f"{e.communication / 1e9:,.1f} GB | {e.norm_communication / 1e6:,.1f} MB"
            print(f"| {name} | {devices:,} | {told} | {moved} | {e.dora_share:.2%} |", flush=True)
    print("\n| model | passes over outputs | take | products take | DoRA over LoRA | all-reduced norm |")
    print("|---|---|---|---|---|---|")
    for name, (hidden, _, layers, _) in SHAPES.items():
        e = estimate(config(name), ADAPTER, tokens=TOKENS, gradient_checkpointing=True)
        passes = TOKENS * e.magnitude_parameters * BYTES  # a magnitude for each output of a token
        seconds, products = passes / BANDWIDTH, e.operations / RATE
        norm = 4 * 2 * 2 * hidden * layers  # float32, of o and down, twice with checkpointing
        print(
            f"| {name} | {passes / 1e9:,.0f} GB | {seconds * 1e3:,.0f} ms | {products * 1e3:,.0f} ms | "
            f"+{e.dora_share + seconds / products:.1%} | {norm / 1e6:,.1f} MB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
