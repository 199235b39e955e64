"""What a run found out: results.json, the final table, and the commands to go on with."""

from __future__ import annotations

import dataclasses
import json
import math
import resource
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from rich.table import Table

FILE = "results.json"


@dataclass(frozen=True)
class TrainResult:
    """Numbers of one run. Losses are nats per token on held-out text, sizes in parameters, memory in bytes."""

    method: str
    rank: int | None
    model: str
    adapter: str
    """Folder of the adapter, or of the whole model for full fine-tuning."""
    trained: int
    base: int
    direction: int
    magnitude: int
    steps: int
    seed: int
    loss_before: float
    loss_after: float
    blocks: int
    held_out_blocks: int
    block_tokens: int
    seconds: float
    """Time of the training loop in this process; a resumed run counts its own part only."""
    tokens_per_second: float
    peak_memory: int
    """Of this process: resident memory, or GPU memory where there is one."""
    device: str
    dtype: str
    prompt: str | None = None
    sample_before: str | None = None
    sample_after: str | None = None

    @property
    def perplexity_before(self) -> float:
        """exp of the held-out loss before training."""
        return math.exp(self.loss_before)

    @property
    def perplexity_after(self) -> float:
        """exp of the held-out loss after training."""
        return math.exp(self.loss_after)

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
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"
        (folder / FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> TrainResult:
        """Read ``results.json`` of a run's output folder."""
        return cls(**json.loads((folder / FILE).read_text(encoding="utf-8")))

    def table(self) -> Table:
        """The run in one table."""
        from rich.table import Table

        table = Table(title=f"{self.method}, {self.steps} steps on {self.device} in {self.dtype}", show_header=False)
        for name, value in self._rows():
            table.add_row(name, value)
        return table

    def _rows(self) -> list[tuple[str, str]]:
        rows = [("trained parameters", f"{self.trained:,} of {self.base:,} ({self.trained / self.base:.3%})")]
        if self.magnitude and self.direction:
            share = f"{self.extra_over_lora:.2%} of LoRA's, {self.extra_over_model:.4%} of the model's"
            rows.append(("of these magnitudes", f"{self.magnitude:,} ({share})"))
        return [
            *rows,
            ("text", f"{self.blocks} blocks of {self.block_tokens} tokens, {self.held_out_blocks} held out"),
            ("held-out loss", f"{self.loss_before:.4f} -> {self.loss_after:.4f}"),
            ("held-out perplexity", f"{self.perplexity_before:.2f} -> {self.perplexity_after:.2f}"),
            ("training time", f"{self.seconds:.1f} s, {self.tokens_per_second:,.0f} tokens/s"),
            ("peak memory", f"{self.peak_memory / 2**20:,.0f} MiB"),
        ]

    def next_steps(self) -> str:
        """Commands to go on with: merge, load in Python, load in PEFT."""
        if self.method == "full":
            return f'AutoModelForCausalLM.from_pretrained("{self.adapter}")'
        adapter, model, merged = (
            shlex.quote(str(path)) for path in (self.adapter, self.model, Path(self.adapter).parent / "merged")
        )
        return "\n".join(
            [
                "# look at it, merge it",
                f"doratune inspect {adapter} --base {model}",
                f"doratune merge {adapter} --base {model} --output {merged} --verify",
                "# load it in Python",
                f'model = AutoModelForCausalLM.from_pretrained("{self.model}")',
                f'doratune.load_adapter(model, "{self.adapter}")',
                "# load it in PEFT",
                f'model = PeftModel.from_pretrained(model, "{self.adapter}")',
            ]
        )


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
