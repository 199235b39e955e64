"""`python -m bench.program`: what `doratune train` costs beside a bare Trainer, and whether it grows.

Both train the same adapted Llama on the same blocks, in turn; the ratio of their times is taken pair by pair. The
process's memory is read at the first and at the last checkpoint of one longer run.
"""

from __future__ import annotations

import io
import random
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
import tyro
from rich.console import Console

import doratune as dt
from doratune.study.race import median_interval
from doratune.train import AdapterOptions, TrainConfig, train
from doratune.train.models import load_model
from doratune.train.quiet import quiet_libraries
from doratune.train.tasks.text import prepare


@dataclass
class Program:
    """Race `doratune train` against a bare Trainer, and watch its memory."""

    pairs: int = 20
    """Runs of each, in turn; fewer than six give no interval of 95 %."""
    steps: int = 60
    """Of each run in the race."""
    long: int = 300
    """Steps of the run whose memory is watched; it writes six checkpoints and measures three times."""
    hidden: int = 256
    """Width of the model."""

    def run(self) -> None:
        """Print both."""
        quiet_libraries()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self._save_assets(folder)
            config = TrainConfig(
                model=str(folder / "model"),
                data=(str(folder / "text.txt"),),
                max_length=128,
                batch_size=4,
                steps=self.steps,
                save_every=None,
                adapter=AdapterOptions(rank=16, alpha=32),
            )
            ratios = []
            for pair in range(self.pairs):
                turns = [self._program, self._bare]
                found = {
                    turn: turn(replace(config, output=folder / f"run-{pair}")) for turn in turns[:: 1 - pair % 2 * 2]
                }
                ratios.append(found[self._program] / found[self._bare])
                print(f"pair {pair + 1}: {found[self._program]:.1f} s, bare {found[self._bare]:.1f} s", flush=True)
            low, high = median_interval(ratios)
            print(f"doratune train takes {median(ratios):.3f} ({low:.3f} to {high:.3f}) of the bare Trainer's time")
            self._watch(replace(config, output=folder / "long", steps=self.long))

    def _save_assets(self, folder: Path) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        words = [f"w{number}" for number in range(2000)]
        inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate([*words, "<end>"])}, "<end>"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>").save_pretrained(folder / "model")
        torch.manual_seed(0)
        shape: dict[str, Any] = {
            "hidden_size": self.hidden,
            "intermediate_size": 4 * self.hidden,
            "num_hidden_layers": 4,
        }
        LlamaForCausalLM(LlamaConfig(vocab_size=2001, num_attention_heads=4, **shape)).save_pretrained(folder / "model")
        text = " ".join(random.Random(0).choices(words, k=max(self.steps, self.long) * 4 * 128 // 4))
        (folder / "text.txt").write_text(text)

    @staticmethod
    def _program(config: TrainConfig) -> float:
        return train(config, Console(file=io.StringIO(), force_terminal=True)).seconds

    @staticmethod
    def _bare(config: TrainConfig) -> float:
        from transformers import PrinterCallback, Trainer, TrainingArguments

        blocks = prepare(config, lambda _: None)
        model = dt.attach(load_model(config.model, torch.float32), config.adapter_config())
        arguments = TrainingArguments(
            output_dir=str(config.output),
            max_steps=config.steps or -1,
            per_device_train_batch_size=config.batch_size,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
        trainer = Trainer(model, arguments, data_collator=blocks.collate, train_dataset=blocks.train)
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        return time.perf_counter() - start

    def _watch(self, config: TrainConfig) -> None:
        from doratune.train import trainer

        sizes: list[int] = []
        original = trainer.mark_complete

        def noting(folder: Path) -> None:
            original(folder)
            sizes.append(psutil.Process().memory_info().rss)

        trainer.mark_complete = noting
        train(replace(config, save_every=self.long // 6, eval_every=self.long // 3), Console(quiet=True))
        first, last = sizes[0] / 2**20, sizes[-1] / 2**20
        print(f"memory at checkpoint 1: {first:.1f} MiB, at checkpoint {len(sizes)}: {last:.1f} ({last - first:+.1f})")


if __name__ == "__main__":
    tyro.cli(Program).run()
