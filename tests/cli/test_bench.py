import io
import json

import pytest
from rich.console import Console

import doratune as dt
from doratune.cli import main
from doratune.cli.bench import _table
from doratune.study.race import Timing
from doratune.study.speed import Cost
from train.tiny import llama, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("bench") / "model")


def bench(*words):
    return main(["bench", *map(str, words)])


def test_a_table(model, capsys):
    assert bench(model, "--tokens", 16, "--rank", 2, "--seconds", 0.01) == 0
    printed = capsys.readouterr().out
    for part in ("1 x 16 tokens, rank 2, float32", "frozen", "lora", "dora", "x frozen", "saved MB", "decode ms"):
        assert part in printed
    assert "1.00 (1.00..1.00)" in printed


def test_no_number_is_cut_off():
    timing = Timing("given", milliseconds=12_345.67, ratio=7.86, low=0.23, high=2491.7, rounds=9)
    about = {"batch_size": 1, "tokens": 512, "rank": 16, "dtype": "bfloat16", "device": "cpu", "threads": 2}
    costs = [Cost(name, timing, 1_234_567_890, timing) for name in ("frozen", "given")]
    out = Console(width=80, file=io.StringIO())
    out.print(_table(costs, about))
    printed = out.file.getvalue()
    assert "…" not in printed
    assert printed.count("7.86 (0.23..2492)") == 4


def test_json_with_an_adapter(model, tmp_path, capsys):
    dt.save_adapter(dt.attach(llama(), dt.AdapterConfig(rank=4)), tmp_path / "a")
    options = ("--tokens", 16, "--batch-size", 2, "--seconds", 0.01, "--dropout", 0.1)
    assert bench(model, "--adapter", tmp_path / "a", *options, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [cost["name"] for cost in found["costs"]] == ["frozen", "lora", "dora", "given"]
    assert (found["rank"], found["tokens"], found["batch_size"], found["dropout"]) == (16, 16, 2, 0.1)
    assert found["costs"][0]["step"]["ratio"] == 1
    assert found["costs"][2]["saved"] > found["costs"][0]["saved"]


def test_problems_come_all_at_once(tmp_path, capsys):
    options = ("--tokens", 1, "--rank", 0, "--seconds", 0, "--dropout", 1, "--adapter", tmp_path / "x")
    assert bench(tmp_path, *options, "--batch-size", 0) == 1
    said = capsys.readouterr().err
    assert "(6 problems)" in said
    for name in ("tokens", "rank", "seconds", "dropout", "no such folder", "batch_size"):
        assert name in said


def test_other_mistakes(model, tmp_path, capsys):
    assert bench(tmp_path / "none") == 1
    assert "no such folder" in capsys.readouterr().err
    assert bench(model, "--tokens", 129) == 1
    assert "sequences of 128 at most" in capsys.readouterr().err
