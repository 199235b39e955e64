"""Peak memory of a process in training: one process against FSDP2 on two, a model of 290 million parameters.

The two share the batch of the one, as they do in training: a global batch of 2,048 tokens, and one of so few (128) that
activations hardly count.

python -m bench.fsdp_memory FOLDER
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ONE = [sys.executable, "-m", "doratune"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "doratune"]

MALLOC = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
"""glibc otherwise keeps what FSDP has freed: 2.6 times as much memory of its own."""


def save_model(folder: Path, layers: int, width: int) -> None:
    """Write a random Llama with a tokenizer of one token a byte."""
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={sign: i for i, sign in enumerate([*signs, "<end>"])}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="200MB")


def peak(folder: Path, model: str, name: str, launch: list[str], batch: int, length: int, *more: str) -> int:
    """Highest resident memory of the first process, in bytes; ``batch`` is that of a process."""
    data = ["--model", str(folder / model), "--data", str(folder / "text.txt"), "--output", str(folder / name)]
    options = ["--rank", "8", "--steps", "2", "--eval-fraction", "0.02"]
    options += ["--batch-size", str(batch), "--max-length", str(length)]
    subprocess.run([*launch, "train", *data, *options, *more], check=True, stdout=subprocess.DEVNULL, env=MALLOC)
    found: int = json.loads((folder / name / "results.json").read_text())["peak_memory"]
    return found


def main() -> None:
    """Print a Markdown table."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    (folder / "text.txt").write_text("once upon a time there was a wolf in the forest " * 400)
    for name, layers, width in (("large", 40, 768), ("small", 1, 64)):
        # In a process of its own: children inherit the highest level of memory.
        maker = get_context("spawn").Process(target=save_model, args=(folder / name, layers, width))
        maker.start()
        maker.join()
    libraries = peak(folder, "small", "nothing", ONE, 1, 64)
    print(f"libraries alone (a tiny model): {libraries / 1e6:,.0f} MB resident\n")
    print("| tokens of the global batch | one process, MB | each of two, FSDP2 | share | above the libraries |")
    print("|---|---|---|---|---|")
    for batch, length in ((2, 64), (16, 128)):
        one = peak(folder, "large", f"one-{batch}", ONE, batch, length)
        two = peak(folder, "large", f"two-{batch}", TWO, batch // 2, length, "--fsdp")
        shares = f"{two / one:.0%} | {(two - libraries) / (one - libraries):.0%}"
        print(f"| {batch * length:,} | {one / 1e6:,.0f} | {two / 1e6:,.0f} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
