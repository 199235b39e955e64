"""Every benchmark runs with tiny shapes, and writes what it found."""

import json
import subprocess
import sys

import pytest
import torch
from bench.__main__ import main
from bench.contestants import DORA, FROZEN
from bench.layer import Layer
from bench.profile import PARTS
from bench.results import Point, Record

pytestmark = pytest.mark.filterwarnings("ignore")  # peers about themselves


def run(folder, *words):
    main([*words, "--quick", "--seconds", "0.01", "--device", "cpu", "--output", str(folder)])
    (found,) = folder.glob("*.json")
    return json.loads(found.read_text()), found.with_suffix(".md").read_text(), found.with_suffix(".png")


def test_what_is_not_installed_is_one_message():
    absent = "import sys, runpy; sys.modules['peft'] = None; runpy.run_module('bench', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", absent], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: the benchmarks need peft, which pip install '.[dev]' brings\n"


@pytest.mark.parametrize("what", ["layer", "step", "decode", "eval"])
def test_races(what, tmp_path):
    found, text, picture = run(tmp_path, what, "--only", "doratune", "LyCORIS")
    assert found["what"] == what
    assert found["machine"]["threads"] >= 1
    assert {"torch", "peft", "transformers", "doratune"} <= found["versions"].keys()
    for point in found["points"]:
        entries = {entry["name"]: entry for entry in point["entries"]}
        assert entries[DORA]["status"] == "right"
        assert entries[DORA]["timing"]["low"] <= entries[DORA]["timing"]["ratio"] <= entries[DORA]["timing"]["high"]
        assert entries[FROZEN]["timing"]["ratio"] == 1
        assert not any(name.startswith("PEFT") for name in entries)
    assert f"| {DORA} | " in text
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_memory(tmp_path):
    found, text, picture = run(tmp_path, "memory", "--only", "doratune")
    saved = {e["name"]: e["measured"]["saved MB"] for e in found["points"][0]["entries"] if "measured" in e}
    assert saved[FROZEN] < saved["doratune LoRA"] < saved[DORA]
    assert "saved MB" in text
    assert picture.exists()


def test_experts(tmp_path):
    found, text, picture = run(tmp_path, "experts")
    entries = {entry["name"]: entry for entry in found["points"][0]["entries"]}
    assert {entry["status"] for name, entry in entries.items() if name != FROZEN} == {"right"}
    saved = {name: entry["measured"]["saved MB"] for name, entry in entries.items()}
    assert saved[FROZEN] < saved["doratune LoRA"] < saved[DORA] < saved["PEFT LoRA float32"]
    assert "| PEFT LoRA float32 | " in text
    assert picture.exists()


def test_profile(tmp_path):
    found, text, picture = run(tmp_path, "profile")
    measured = {e["name"]: e["measured"] for e in found["points"][0]["entries"]}
    assert measured.keys() == {FROZEN, "doratune LoRA", DORA}
    parts = measured[DORA]
    assert parts.keys() == {"step", *PARTS, "operations"}
    assert sum(parts[part] for part in PARTS) < parts["step"]
    assert measured["doratune LoRA"].keys() == {"step", "A and B, backward", "operations"}
    assert measured[FROZEN]["operations"] < measured["doratune LoRA"]["operations"] < parts["operations"]
    assert "norm" in text
    assert picture.exists()


def test_memory_without_a_backward_pass(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.memory.multiplies", lambda *_: False)
    found, _, _ = run(tmp_path, "memory", "--only", "doratune DoRA", "--without", "dropout", "8-bit")
    entries = {e["name"]: e["measured"] for e in found["points"][0]["entries"]}
    assert entries[DORA].keys() == {"saved MB"}
    assert entries[FROZEN]["saved MB"] < entries[DORA]["saved MB"]


def test_losses(tmp_path):
    found, _, _ = run(tmp_path, "losses", "--steps", "4", "--dtype", "float32")
    entries = found["points"][0]["entries"]
    assert {entry["name"] for entry in entries} == {
        "PEFT DoRA float32, accelerated",
        "PEFT DoRA float32, dropout, accelerated",
    }
    for entry in entries:
        assert entry["status"] == "right"
        measured = entry["measured"]
        assert measured["last loss"] < measured["first loss"]
        assert measured["largest difference"] < 1e-4
        assert measured["ended apart"] < 0.05 * measured["parameters moved"]


def test_points_are_chosen_and_join_those_of_an_earlier_run(tmp_path):
    found, text, _ = run(tmp_path, "layer", "--only", "doratune DoRA", "--select", "r 8,")
    assert [point["shape"]["rank"] for point in found["points"]] == [8]
    found, _, _ = run(tmp_path, "layer", "--only", "doratune DoRA", "--select", "r 4,")
    assert [point["shape"]["rank"] for point in found["points"]] == [8, 4]
    found, text, _ = run(tmp_path, "layer", "--only", "doratune DoRA", "--select", "r 8,")
    assert [point["shape"]["rank"] for point in found["points"]] == [4, 8]
    assert "rank 4" in text
    # Other sources, other numbers.
    (path,) = tmp_path.glob("*.json")
    path.write_text(json.dumps({**found, "versions": {"doratune": "older"}}))
    found, text, _ = run(tmp_path, "layer", "--only", "doratune DoRA", "--select", "r 8,")
    assert [point["shape"]["rank"] for point in found["points"]] == [8]


@pytest.mark.parametrize("which", [0, 1])
def test_a_point_that_fails_is_named_and_the_others_are_measured(which, tmp_path, monkeypatch, capsys):
    measure = Layer.measure

    def failing(self, point, watch):
        if point.shape["rank"] == (4, 8)[which]:
            raise torch.OutOfMemoryError("CUDA out of memory. [It] does not fit\nand more")
        return measure(self, point, watch)

    monkeypatch.setattr(Layer, "measure", failing)
    drawn = []
    monkeypatch.setattr("bench.plots.look", lambda name: drawn.append(name) or {"color": "k"})
    found, text, picture = run(tmp_path, "layer", "--only", "doratune DoRA", "--without", "dropout")
    failed, right = sorted(found["points"], key=lambda point: "failed" not in point)
    assert failed["failed"] == "OutOfMemoryError: CUDA out of memory. [It] does not fit"
    assert failed["entries"] == []
    assert {entry["status"] for entry in right["entries"]} == {"right", "reference"}
    assert f"- {failed['title']}: failed, {failed['failed']}" in text
    row = next(line for line in text.splitlines() if line.startswith(f"| {DORA} |")).split("|")[2:4]
    assert [bool(cell.strip()) for cell in row] == [which == 1, which == 0]
    assert picture.exists()
    assert DORA in drawn
    assert "[It] does not fit" in " ".join(capsys.readouterr().err.split())


def test_no_point_is_chosen(tmp_path, capsys):
    main(["layer", "--quick", "--select", "r 5,", "--output", str(tmp_path)])
    assert not list(tmp_path.iterdir())
    assert "no point to --select among r 4, 64 tokens" in " ".join(capsys.readouterr().err.split())


def test_losses_that_differ_are_wrong(tmp_path, monkeypatch):
    from bench.losses import Losses

    train = Losses._train
    monkeypatch.setattr(
        Losses,
        "_train",
        lambda self, contestant, task: (
            train(self, contestant, task)
            if "accelerated" in contestant.name
            else ([1.0] * self.steps, *train(self, contestant, task)[1:])
        ),
    )
    found, text, _ = run(tmp_path, "losses", "--steps", "2", "--dtype", "float32", "--without", "dropout")
    assert [entry["status"] for entry in found["points"][0]["entries"]] == ["wrong"]
    assert "PEFT DoRA float32, accelerated (tiny, 2 steps): wrong" in text


def test_files(tmp_path):
    found, text, _ = run(tmp_path, "files")
    for point in found["points"]:
        assert all(entry["status"] == "right" and entry["measured"] for entry in point["entries"]), point
    assert "attach, tiny: ms" in text


def test_wrong_and_failed_contestants_are_named_without_a_number(tmp_path):
    record = Record("x", "Title", "Note.", torch.device("cpu"), tmp_path, {"dtype": "bfloat16"}, lambda *_: None)
    timing = {"ratio": 1.0, "low": 1.0, "high": 1.0, "milliseconds": 5.0, "rounds": 6}
    entries = [
        {"name": FROZEN, "status": "reference", "timing": timing},
        {"name": DORA, "status": "wrong", "error": {"output": 0.5}},
        {"name": "PEFT", "status": "failed", "note": "MemoryError: too large"},
    ]
    record.add(Point("one", {"rank": 4}), entries)
    text = record.path("md").read_text()
    assert "| doratune DoRA | wrong | wrong |" in text
    assert "doratune DoRA (one): wrong, relative errors output 5.0e-01" in text
    assert "PEFT (one): failed, MemoryError: too large" in text
