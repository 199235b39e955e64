"""``doratune estimate`` against what a step really allocates, on models that fit here; the table of docs/scaling.md.

python -m bench.estimate
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

import doratune as dt
from bench.peak import peak_bytes
from doratune.study.estimate import estimate

SMALL = LlamaConfig(
    vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8
)
CASES: dict[str, tuple[Any, int, bool]] = {
    "Llama, 8 layers of 512": (SMALL, 1024, False),
    "the same, checkpointing": (SMALL, 1024, True),
    "GPT-2 (124M)": (GPT2Config(attn_pdrop=0, embd_pdrop=0, resid_pdrop=0), 256, False),
    "Qwen2, 12 layers of 768": (
        Qwen2Config(
            vocab_size=32000,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=4,
        ),
        512,
        False,
    ),
}


def measured(config: Any, adapter: dt.AdapterConfig, tokens: int, checkpointing: bool) -> int:
    """Highest number of bytes allocated in a training step, weights and optimiser included."""
    torch.manual_seed(0)
    config.use_cache = False
    model = dt.attach(AutoModelForCausalLM.from_config(config), adapter).train()
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(dt.parameter_groups(model, lr=1e-4))
    ids = torch.randint(config.vocab_size, (1, tokens))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # the optimiser's state is there from now on
    gc.collect()
    there = {p.untyped_storage().data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
    state = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values())
    return sum(there.values()) + state + peak_bytes(step)


def main() -> None:
    """Print a Markdown table."""
    print("| model | tokens | measured MB | estimated MB | off by |\n|---|---|---|---|---|")
    adapter = dt.AdapterConfig(rank=16)
    for name, (config, tokens, again) in CASES.items():
        found = measured(config, adapter, tokens, again)
        guess = estimate(config, adapter, tokens=tokens, dtype=torch.float32, gradient_checkpointing=again).total
        print(f"| {name} | {tokens} | {found / 1e6:,.0f} | {guess / 1e6:,.0f} | {guess / found - 1:+.1%} |", flush=True)


if __name__ == "__main__":
    main()
