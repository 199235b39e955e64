"""A pair of checkpoints in a 7B Llama's shape, 2 x 13 GB, written shard by shard, for `doratune analyze`.

python -m bench.large_pair FOLDER && doratune analyze FOLDER/base FOLDER/tuned
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

RANK = 8


@dataclass
class LargePair:
    """Write FOLDER/base and FOLDER/tuned, random bfloat16 weights that a random low-rank update tells apart."""

    folder: tyro.conf.Positional[Path]
    hidden: int = 4096
    intermediate: int = 11008
    layers: int = 32
    vocabulary: int = 32000

    def run(self) -> None:
        """One layer in memory at a time; embedding and output head are shards of their own."""
        config = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            vocab_size=self.vocabulary,
            num_attention_heads=self.hidden // min(self.hidden, 128),
            tie_word_embeddings=False,
        )
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(max(self.vocabulary, self.intermediate) * self.hidden, generator=generator) * 0.02
        files: dict[str, str] = {}
        for side in ("base", "tuned"):
            config.save_pretrained(self.folder / side)
        for number, shapes in enumerate(self._shards()):
            file = f"model-{number:05d}.safetensors"
            base = {name: _weight(noise, shape, generator) for name, shape in shapes.items()}
            save_file({name: W.bfloat16() for name, W in base.items()}, self.folder / "base" / file)
            tuned = {name: _moved(W, generator).bfloat16() for name, W in base.items()}
            save_file(tuned, self.folder / "tuned" / file)
            files |= dict.fromkeys(shapes, file)
        for side in ("base", "tuned"):
            index = self.folder / side / "model.safetensors.index.json"
            index.write_text(json.dumps({"metadata": {}, "weight_map": files}))

    def _shards(self) -> Iterator[dict[str, tuple[int, int]]]:
        yield {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for number in range(self.layers):
            path = f"model.layers.{number}"
            shapes = {f"{path}.self_attn.{part}_proj.weight": (self.hidden, self.hidden) for part in "qkvo"}
            shapes |= {f"{path}.mlp.{part}_proj.weight": (self.intermediate, self.hidden) for part in ("gate", "up")}
            yield {**shapes, f"{path}.mlp.down_proj.weight": (self.hidden, self.intermediate)}
        yield {"lm_head.weight": (self.vocabulary, self.hidden)}


def _weight(noise: Tensor, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Other numbers for each weight and cheap to make: the same noise, begun somewhere else."""
    begin = int(torch.randint(len(noise), (1,), generator=generator))
    return noise.roll(-begin)[: shape[0] * shape[1]].view(shape)


def _moved(W: Tensor, generator: torch.Generator) -> Tensor:
    B = torch.randn(W.shape[0], RANK, generator=generator)
    A = torch.randn(RANK, W.shape[1], generator=generator)
    return torch.addmm(W, B, A, alpha=3e-4)


if __name__ == "__main__":
    tyro.cli(LargePair).run()
