"""Attaching, saving, loading and merging adapters."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

import doratune as dt
from bench.bases import OneLayer, linear_paths, llama
from bench.contestants import BUILDERS, DORA, LORA, Contestant, Setting, share
from bench.options import Benchmark, Report, Watch
from bench.peak import peak_bytes
from bench.results import Point
from bench.tasks import ModelTask
from bench.trial import Entry, moved_adapters, report
from doratune.study.race import Lane, race

NAMES = (LORA, DORA, "PEFT LoRA float32", "PEFT DoRA float32")
TOLERANCE = 6e-2
"""Merging rounds the new weights to 16 bits; a wrong file makes 0.3 and more."""


@dataclass
class Files(Benchmark):
    """Times of attaching, saving, loading and merging; memory of attaching to a large layer."""

    seconds: float = 15.0

    what: ClassVar[str] = "files"
    title: ClassVar[str] = "Attaching, saving, loading, merging"
    note: ClassVar[str] = (
        "Median milliseconds, contestants interleaved; files in the page cache. Outputs after loading and merging are "
        "compared with those before. Attaching to one large layer: most memory allocated on the way, the adapter "
        "included."
    )

    def points(self) -> list[Point]:
        model, width = ("tiny", 128) if self.quick else ("llama-6-layers", 8192)
        return [
            *(
                Point(f"{what}, {model}", {"model": model, "what": what})
                for what in ("attach", "save", "load", "merge")
            ),
            Point(f"attach to {width:,} x {width:,}", {"width": width, "what": "memory"}),
        ]

    def measure(self, point: Point, watch: Watch) -> Report:
        if point.shape["what"] == "memory":
            return self._attach_memory(point.shape["width"]), {}
        base, weights = llama(point.shape["model"], self.torch_dtype(), self.torch_device())
        with tempfile.TemporaryDirectory() as folder:
            work = _Work(base, Setting(linear_paths(base)), Path(folder))
            entries = {name: Entry(name, *work.verdict(name)) for name in NAMES}
            action = point.shape["what"]
            lanes = [Lane(name, *work.lane(name, action)) for name, entry in entries.items() if entry.status == "right"]
            for timing in race(lanes, lanes[0].name, **self.race_options(watch)) if lanes else []:
                entries[timing.name].measured = {"ms": timing.milliseconds}
        return report(entries.values()), {"weights": weights}

    def _attach_memory(self, width: int) -> list[dict[str, Any]]:
        base = OneLayer(width, width, self.torch_dtype(), self.torch_device())
        found = []
        for name in NAMES:
            BUILDERS[name](base, Setting(("proj",)))  # imports and compiles
            peak = peak_bytes(lambda name=name: BUILDERS[name](base, Setting(("proj",))), self.torch_device())
            found.append({"name": name, "status": "right", "measured": {"peak MB": peak / 1e6}})
        return found


class _Work:
    """Models and files that the operations start from."""

    def __init__(self, base: Any, setting: Setting, folder: Path) -> None:
        self.base, self.setting, self.folder = base, setting, folder
        self.values = moved_adapters(base, setting)
        self.task = ModelTask(base, 32)
        self.trained = {name: self._trained(name, share(base)) for name in NAMES}
        for name in NAMES:
            self._save(name)
        self.model: Any = None

    def _trained(self, name: str, base: Any) -> Contestant:
        contestant = BUILDERS[name](base, self.setting)
        contestant.take(self.values, 0)
        contestant.model.eval()
        return contestant

    def verdict(self, name: str) -> tuple[Any, str]:
        """Whether a loaded and a merged model compute what the model did that they come from."""
        expected = self._output(self.trained[name].model)
        found = {}
        for action in ("load", "merge"):
            run, before = self.lane(name, action)
            before(0)
            found[action] = float((self._output(run()) - expected).norm() / expected.norm())
        # NaN is not above the tolerance, but it is not within it either.
        wrong = [f"{action}: relative error {error:.1e}" for action, error in found.items() if not error <= TOLERANCE]
        return ("wrong", ", ".join(wrong)) if wrong else ("right", "")

    @torch.no_grad()
    def _output(self, model: Any) -> torch.Tensor:
        return self.task.output(model.eval()).float()

    def lane(self, name: str, action: str) -> tuple[Callable[[], Any], Callable[[int], Any]]:
        """What is timed, and what is prepared before."""

        def fresh(_: int) -> None:
            self.model = share(self.base)

        def adapted(_: int) -> None:
            # PEFT merges into the base's own tensors.
            self.model = self._trained(name, copy.deepcopy(self.base)).model

        ours = "doratune" in name
        actions: dict[str, tuple[Callable[[], Any], Callable[[int], Any]]] = {
            "attach": (lambda: BUILDERS[name](self.model, self.setting), fresh),
            "save": (lambda: self._save(name), lambda _: None),
            "load": (lambda: self._load(name), fresh),
            "merge": (lambda: dt.merge(self.model) if ours else self.model.merge_and_unload(), adapted),
        }
        return actions[action]

    def _save(self, name: str) -> None:
        model = self.trained[name].model
        if "doratune" in name:
            dt.save_adapter(model, self.folder / name)
        else:
            model.save_pretrained(self.folder / name)

    def _load(self, name: str) -> Any:
        if "doratune" in name:
            return dt.load_adapter(self.model, self.folder / name)
        from peft import PeftModel

        return PeftModel.from_pretrained(self.model, self.folder / name)
