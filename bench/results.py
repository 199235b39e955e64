"""What is written: JSON with everything, Markdown tables, a picture; after each point, so that nothing is lost."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from bench.contestants import FROZEN
from bench.plots import short

PACKAGES = ("torch", "peft", "lycoris-lora", "transformers", "bitsandbytes", "triton")
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Point:
    """One setting that is measured."""

    title: str
    shape: dict[str, Any]
    groups: tuple[str, ...] = ("",)
    """Tables and panels that show it."""


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    about: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
    }
    if device.type == "cuda":
        about["gpu"] = torch.cuda.get_device_name(device)
        about["gpu_memory_gb"] = round(torch.cuda.get_device_properties(device).total_memory / 1e9)
    return about


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of Python, of the libraries that are there, and of doratune's source."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["doratune"] = _commit()
    return found


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


@dataclass
class Record:
    """One benchmark's results; a later run adds its points to an earlier one's."""

    what: str
    title: str
    note: str
    device: torch.device
    folder: Path
    settings: dict[str, Any]
    draw: Callable[[Record, Path], None]
    points: list[dict[str, Any]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.machine, self.versions = machine(self.device), versions()
        self.date = datetime.date.today().isoformat()
        hardware = self.machine.get("gpu") or f"{self.machine['cpu']} {self.machine['cores']} cores"
        plain = re.sub(r"\((r|tm)\)|processor|nvidia", "", hardware.lower())
        slug = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
        self.name = f"{self.date}-{slug}-{self.settings['dtype']}-{self.what}"
        self.points = self._points_so_far()

    def _points_so_far(self) -> list[dict[str, Any]]:
        """Those of an earlier run of the same day on the same machine with the same source, if there was one."""
        if not self.path("json").is_file():
            return []
        earlier = json.loads(self.path("json").read_text())
        same = all(earlier.get(key) == getattr(self, key) for key in ("machine", "versions", "settings"))
        return earlier["points"] if same else []

    def add(self, point: Point, entries: list[dict[str, Any]], about: dict[str, Any] | None = None) -> None:
        """Note one point, and write everything so far."""
        new = {**asdict(point), **(about or {}), "command": command(), "entries": entries}
        new["groups"] = list(point.groups)
        self.points = [old for old in self.points if old["title"] != point.title] + [new]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path("json").write_text(json.dumps(self.as_dict(), indent=1) + "\n")
        self.path("md").write_text(self.markdown())
        self.draw(self, self.path("png"))

    def path(self, extension: str) -> Path:
        return self.folder / f"{self.name}.{extension}"

    def as_dict(self) -> dict[str, Any]:
        keys = ("what", "title", "note", "date", "machine", "versions", "settings", "points")
        return {key: getattr(self, key) for key in keys}

    def groups(self) -> dict[str, list[dict[str, Any]]]:
        """Points by the table that shows them."""
        found: dict[str, list[dict[str, Any]]] = {}
        for point in self.points:
            for group in point["groups"]:
                found.setdefault(group, []).append(point)
        return found

    def markdown(self) -> str:
        """Title, how it was measured, a table for each group, and what went wrong."""
        about = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in self.machine.items())
        libraries = ", ".join(f"{key} {value}" for key, value in self.versions.items())
        commands = [f"- `{line}`" for line in dict.fromkeys(point["command"] for point in self.points)]
        lines = [f"# {self.title}", "", self.note, "", f"- {self.date}: {about}", f"- {libraries}", *commands]
        for group, points in self.groups().items():
            lines += ["", *([f"## {group}", ""] if group else []), *(_sweep(group, points) or _table(points))]
        problems = [
            f"- {entry['name']} ({point['title']}): {entry['status']}, {_why(entry)}"
            for point in self.points
            for entry in point["entries"]
            if entry["status"] in ("wrong", "failed")
        ]
        problems += [f"- {point['title']}: failed, {point['failed']}" for point in self.points if "failed" in point]
        lines += _disturbed(self.points)
        return "\n".join([*lines, *(["", "Without a number:", "", *problems] if problems else []), ""])


def reason(error: Exception) -> str:
    """An exception in one line."""
    said = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {said}"[:200]


def command() -> str:
    """The command line, as it can be typed again."""
    return shlex.join(["python", "-m", "bench", *sys.argv[1:]])


def cells(entry: dict[str, Any]) -> dict[str, str]:
    """What a table says about one contestant at one point, by column."""
    if entry["status"] in ("wrong", "failed"):
        return {}
    found = {}
    if "timing" in entry:
        t = entry["timing"]
        found["x frozen"] = f"{t['ratio']:.2f} ({t['low']:.2f} to {t['high']:.2f})"
        if "dora_over" in t:
            found["DoRA over it"] = "{:.2f} ({:.2f} to {:.2f})".format(*t["dora_over"])
        found["ms"] = f"{t['milliseconds']:.{0 if t['milliseconds'] >= 100 else 2}f}"
    for key, value in entry.get("measured", {}).items():
        found[key] = short(value)
    return found


def _disturbed(points: list[dict[str, Any]]) -> list[str]:
    """How many rounds did not count, where there were any."""
    found = [(p["title"], t["left_out"], t["rounds"]) for p in points for t in [_floor(p)] if t.get("left_out")]
    lines = [f"- {title}: {left_out} left out, {rounds} counted" for title, left_out, rounds in found]
    return ["", "Rounds in which other processes had the processors:", "", *lines] if lines else []


def _floor(point: dict[str, Any]) -> dict[str, Any]:
    return next((e["timing"] for e in point["entries"] if e["name"] == FROZEN and "timing" in e), {})


def _sweep(key: str, points: list[dict[str, Any]]) -> list[str]:
    """Ratios by one number that the points differ in; empty if the group is no such thing."""
    if len(points) < 2 or any(key not in point["shape"] for point in points):
        return []
    points = sorted(points, key=lambda point: point["shape"][key])
    rows = []
    for column in ("x frozen", "DoRA over it"):
        rows += ["", f"| {column} | " + " | ".join(f"{key} {p['shape'][key]:,}" for p in points) + " |"]
        rows.append("|---|" + "---:|" * len(points))
        by_point = [{entry["name"]: entry for entry in point["entries"]} for point in points]
        for name in dict.fromkeys(name for entries in by_point for name in entries):
            found = [entries.get(name, {"status": ""}) for entries in by_point]  # a point that failed has none
            row = [cells(entry).get(column, entry["status"]) for entry in found]
            rows.append(f"| {name} | " + " | ".join(row) + " |")
    floors = [next((cells(e)["ms"] for e in p["entries"] if e["name"] == FROZEN and "timing" in e), "") for p in points]
    return [*rows[1:], f"| {FROZEN}, ms | " + " | ".join(floors) + " |"]


def _table(points: list[dict[str, Any]]) -> list[str]:
    """One row a contestant, one column for each point and number."""
    columns: list[tuple[str, str]] = []
    names: list[str] = []
    content: dict[tuple[str, str, str], str] = {}
    for point in points:
        for entry in point["entries"]:
            if entry["name"] not in names:
                names.append(entry["name"])
            for key, text in cells(entry).items():
                content[entry["name"], point["title"], key] = text
                if (point["title"], key) not in columns:
                    columns.append((point["title"], key))
            if entry["status"] in ("wrong", "failed"):
                content[entry["name"], point["title"], ""] = entry["status"]
    rows = [
        "| | " + " | ".join(f"{title}: {key}" if title else key for title, key in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for name in names:
        row = [content.get((name, title, key)) or content.get((name, title, ""), "") for title, key in columns]
        rows.append(f"| {name} | " + " | ".join(row) + " |")
    return rows


def _why(entry: dict[str, Any]) -> str:
    if entry["status"] == "failed":
        return entry["note"]
    return "relative errors " + ", ".join(f"{part} {error:.1e}" for part, error in entry["error"].items())
