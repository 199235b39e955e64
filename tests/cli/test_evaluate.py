import io
import json

import pytest
import torch
from rich.console import Console

from doratune.cli import main
from doratune.inference.evaluation import evaluate
from doratune.inference.measuring import Measuring
from inference.classifiers import train_on_images
from inference.small import save_moved, save_writer
from train.tiny import write_text


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moved")
    base = save_writer(folder / "model")
    return base, save_moved(folder / "one", base), str(write_text(folder / "text.txt", 60))


def run(*arguments):
    return main(["evaluate", *map(str, arguments)])


def test_a_table_and_the_same_as_json(moved, capsys):
    base, adapter, data = moved
    assert run(adapter, "--data", data, "--max-length", 32) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{data}: 9 blocks of 32 tokens; loss in nats per token\n")
    assert "tokens at the end fill no block" in printed.err
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.out.splitlines() if "│" in line]
    assert run(adapter, "--data", data, "--max-length", 32, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {**found, "measured": len(found["measured"])} == {
        "task": "text-generation",
        "data": [data],
        "example": "blocks of 32 tokens",
        "unit": "nats per token",
        "measured": 2,
    }
    assert [one["folder"] for one in found["measured"]] == [None, str(adapter)]
    assert {key for one in found["measured"] for key in one} == {
        *("name", "folder", "base", "loss", "perplexity", "tokens", "examples")
    }
    assert rows == [
        [one["name"], f"{one['loss']:.4f}", f"{one['perplexity']:.2f}", f"{one['tokens']:,}"]
        for one in found["measured"]
    ]
    assert run("--base", base, "--data", data, "--max-length", 32, "--json") == 0
    assert json.loads(capsys.readouterr().out)["measured"] == found["measured"][:1]


def test_of_several_processes_the_first_prints(moved, capsys, monkeypatch):
    _, adapter, data = moved
    monkeypatch.setattr("doratune.cli.evaluate.is_first_asked", lambda: False)
    assert run(adapter, "--data", data, "--max-length", 32) == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_a_classifier(tmp_path, capsys):
    result = train_on_images(tmp_path)
    capsys.readouterr()
    assert run(result.adapter, "--data", tmp_path / "test.npz") == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{tmp_path / 'test.npz'}: 12 images; loss in nats per image\n")
    for part in ("accuracy", f"{result.accuracy_after:.2%}", f"{result.loss_after:.4f}"):
        assert part in printed
    assert "perplexity" not in printed
    assert run(result.adapter, "--data", tmp_path / "test.npz", "--json") == 0
    (one,) = json.loads(capsys.readouterr().out)["measured"]
    assert one["accuracy"] == result.accuracy_after
    assert not {"perplexity", "tokens"} & one.keys()


def test_a_loss_that_is_no_number_is_null_in_json(moved, monkeypatch, capsys):
    _, adapter, data = moved
    nan = torch.tensor(float("nan"))
    monkeypatch.setattr("transformers.Trainer.compute_loss", lambda *_: nan)
    assert run(adapter, "--data", data, "--max-length", 32, "--json") == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert [(one["loss"], one["perplexity"]) for one in found["measured"]] == [(None, None)] * 2


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["ONE", "--data", "absent.txt"], "error: cannot be measured: data absent.txt: no such file\n"),
        (["ONE", "--data", "DATA", "--dtype", "float16"], "float16 needs a GPU"),
        (["ONE", "--data", "DATA", "--label-column", "x"], "label_column is without effect on text-generation"),
        (["--data", "DATA"], "name an adapter's folder, or a model with --base"),
        (["ONE", "--data", "DATA", "--max-length", "4096"], "it fills no block of 4096 tokens"),
    ],
)
def test_what_cannot_work_is_one_message(moved, arguments, complaint, capsys):
    _, adapter, data = moved
    assert run(*({"ONE": adapter, "DATA": data}.get(word, word) for word in arguments)) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert complaint in said.err


def test_progress_is_shown_on_a_terminal(moved):
    _, adapter, data = moved
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    evaluate([str(adapter)], [data], measuring=Measuring(max_length=32), console=terminal)
    assert "Measuring one" in terminal.file.getvalue()
