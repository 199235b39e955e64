"""Results of a run: results.json, the final table, and the commands to go on with."""

from __future__ import annotations

import dataclasses
import json
import math
import resource
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from doratune.files import write_whole
from doratune.train.models import LOADERS
from doratune.train.output import RESULTS

LARGEST_EXPONENT = 700.0
"""exp of more does not fit a float."""


@dataclass(frozen=True)
class TrainResult:
    """Numbers of one run. Losses are on held-out data in nats per token or example, memory is in bytes."""

    task: str
    method: str
    rank: int | None
    model: str
    adapter: str
    """Folder of the adapter, or of the whole model where the method trains that."""
    trained: int
    base: int
    direction: int
    magnitude: int
    steps: int
    seed: int
    loss_before: float
    loss_after: float
    example: str
    """What the data were cut into: blocks of tokens, examples, texts, images."""
    examples: int | None
    """To train on; None for a stream."""
    held_out_examples: int
    seconds: float
    """Of the training loop in this process, measurements included; a resumed run counts its own part only."""
    unit: str
    """What speed is counted in: tokens, texts or images."""
    speed: float
    """Units per second of training, without the time that held-out data took."""
    peak_memory: int
    """Of this process: resident memory, or GPU memory where there is one."""
    device: str
    dtype: str
    best_step: int | None = None
    """After which the loss was lowest, where that is what was kept; all that is measured after training is of it."""
    peft: bool = True
    """Whether PEFT reads the adapter; else it was written for doratune only."""
    loader: str | None = None
    """transformers' class that loads the base; None: the one for its task."""
    processes: int = 1
    """That trained together; memory is that of the first."""
    labels: tuple[str, ...] = ()
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    chat: bool = False
    """Whether it was trained on chats, in the model's chat template."""
    test_examples: int = 0
    """Measured once, after training; loss and accuracy are None if there are none."""
    test_loss: float | None = None
    test_accuracy: float | None = None
    prompt: str | None = None
    sample_before: str | None = None
    sample_after: str | None = None

    @property
    def perplexity_before(self) -> float:
        """exp of the held-out loss before training."""
        return perplexity(self.loss_before)

    @property
    def perplexity_after(self) -> float:
        """exp of the held-out loss after training."""
        return perplexity(self.loss_after)

    @property
    def extra_over_lora(self) -> float:
        """Magnitude parameters per LoRA parameter."""
        return self.magnitude / self.direction if self.direction else 0.0

    @property
    def extra_over_model(self) -> float:
        """Magnitude parameters per parameter of the base model."""
        return self.magnitude / self.base if self.base else 0.0

    def save(self, folder: Path) -> None:
        """Write ``results.json``."""
        write_whole(folder / RESULTS, json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: Path) -> TrainResult:
        """Read ``results.json`` of a run's output folder."""
        raw = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        return cls(**{**raw, "labels": tuple(raw["labels"])})

    def table(self) -> Table:
        """The run in one table."""
        title = f"{self.task} by {self.method}, {self.steps} steps on {self.device} in {self.dtype}"
        table = Table(title=title, show_header=False)
        for name, value in self.rows():
            table.add_row(name, value)
        return table

    def rows(self) -> list[tuple[str, str]]:
        """What was trained and what it reached, in words."""
        rows = [("trained parameters", f"{self.trained:,} of {self.base:,} ({self.trained / self.base:.3%})")]
        if self.magnitude and self.direction:
            share = f"{self.extra_over_lora:.2%} of LoRA's, {self.extra_over_model:.4%} of the model's"
            rows.append(("of these magnitudes", f"{self.magnitude:,} ({share})"))
        count = "a stream of" if self.examples is None else f"{self.examples:,}"
        rows.append(("data", f"{count} {self.example}, {self.held_out_examples:,} held out"))
        best = "" if self.best_step is None else f", kept from step {self.best_step}"
        rows.append(("held-out loss", f"{self.loss_before:.4f} -> {self.loss_after:.4f}{best}"))
        if self.accuracy_before is not None and self.accuracy_after is not None:
            rows.append(("held-out accuracy", f"{self.accuracy_before:.2%} -> {self.accuracy_after:.2%}"))
        else:
            rows.append(("held-out perplexity", f"{self.perplexity_before:.2f} -> {self.perplexity_after:.2f}"))
        if self.test_loss is not None:
            right = "" if self.test_accuracy is None else f", accuracy {self.test_accuracy:.2%}"
            rows.append(("test loss", f"{self.test_loss:.4f}{right} on {self.test_examples:,} {self.example}"))
        return [
            *rows,
            ("training time", f"{self.seconds:.1f} s, {self.speed:,.{0 if self.speed >= 100 else 1}f} {self.unit}/s"),
            ("peak memory", f"{self.peak_memory / 2**20:,.0f} MiB"),
        ]

    def command_to_use(self, folder: str) -> str:
        """The command that writes or classifies with what was trained, in a folder as a shell takes it."""
        if self.task == "text-generation":
            prompt = shlex.quote(self.prompt) if self.prompt else '"Once upon a time"'
            return f"doratune generate {folder} {'--chat' if self.chat else f'--prompt {prompt}'}"
        what = "images/" if self.task == "image-classification" else "texts.csv"
        return f"doratune predict {folder} {what} --output predictions.csv"

    def next_steps(self) -> str:
        """Commands to go on with: use it, measure it, look at it, merge it, load it in Python, load it in PEFT."""
        folder, model, merged = (
            shlex.quote(str(path)) for path in (self.adapter, self.model, Path(self.adapter).parent / "merged")
        )
        other = {"text-generation": "more.jsonl", "text-classification": "more.csv", "image-classification": "images/"}
        lines = ["# use it, measure it on other data", self.command_to_use(folder)]
        lines.append(f"doratune evaluate {folder} --data {other[self.task]}")
        loader = self.loader or LOADERS[self.task]
        imported, written = f"from transformers import {loader}", _in_python(self.adapter)
        if self.method in ("full", "head"):
            loading = [imported, f"model = {loader}.from_pretrained({written})"]
            return "\n".join([*lines, "# load it in Python", *loading])
        # A base may come with a head for other classes.
        size = f", num_labels={len(self.labels)}, ignore_mismatched_sizes=True" if self.labels else ""
        base = f"{loader}.from_pretrained({_in_python(self.model)}{size})"
        peft = [
            "# or in PEFT",
            "from peft import PeftModel",
            imported,
            f"model = PeftModel.from_pretrained({base}, {written})",
        ]
        return "\n".join(
            [
                *lines,
                "# look at it, merge it",
                f"doratune inspect {folder} --base {model}",
                f"doratune merge {folder} --base {model} --output {merged} --verify",
                "# load it in Python",
                "import doratune",
                imported,
                f"model = doratune.load_adapter({base}, {written})",
                *(peft if self.peft else ()),
            ]
        )


def _in_python(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def perplexity(loss: float) -> float:
    """exp of a loss in nats per token; infinite where that fits no float."""
    return math.inf if loss >= LARGEST_EXPONENT else math.exp(loss)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl; a last line that was cut short is left out."""
    records = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
    return records


def peak_memory(device: Any) -> int:
    """Most bytes that this process has used at a time: on its GPU, or resident in main memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
