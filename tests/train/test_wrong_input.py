"""What a new user gets wrong, on the command line: one clear message, exit code 1, no traceback, nothing written."""

import re

import numpy as np
import pytest

from doratune.cli import main
from train.tiny import reviews, save_chat_model, save_image_folder, save_model, save_rows, save_vision_model, words

PAIR = {"prompt": "ask", "completion": "tell"}
CHAT = {"messages": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "tell"}]}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "lm"), save_chat_model(folder / "chat"), save_vision_model(folder / "vit")
    (folder / "empty").mkdir()
    save_model(folder / "cut")
    (folder / "cut" / "model.safetensors").write_bytes(b"cut")
    return folder


def text(content):
    return raw("x.txt", content)


def rows(*values, name="x.jsonl"):
    return lambda folder: save_rows(folder / name, list(values))


def raw(name, content):
    def make(folder):
        (folder / name).write_bytes(content)
        return folder / name

    return make


def archive(**arrays):
    def make(folder):
        np.savez(folder / "x.npz", **arrays)
        return folder / "x.npz"

    return make


GOOD = text(words(60).encode())
CLASSIFY, IMAGES = ["--task", "text-classification"], ["--task", "image-classification"]
CASES = {
    "no such model": ("nowhere/at/all", GOOD, [], "no such folder"),
    "folder without a model": ("empty", GOOD, [], "has no config.json"),
    "model file cut short": ("cut", GOOD, [], "could not be loaded"),
    "no such file": ("lm", lambda _: "none.txt", [], "data none.txt: no such file"),
    "an empty name": ("lm", lambda _: "", [], "data: a name is empty"),
    "empty file": ("lm", text(b""), [], "is empty"),
    "white space": ("lm", text(b" \n\n"), [], "nothing but white space"),
    "not text": ("lm", text(b"\x89PNG\r\n\xff"), [], "is not UTF-8 text"),
    "too short": ("lm", text(b"short"), [], "the text is too short"),
    "folder": ("lm", lambda folder: folder, [], "is a folder, but not one of datasets' save_to_disk"),
    "not JSON": ("lm", raw("x.json", b"text"), [], "x.json is not JSON"),
    "broken JSON line": ("lm", raw("x.jsonl", b'{"text": "a"}\n{"text": \n'), [], "x.jsonl:2: is not JSON"),
    "unknown columns": ("lm", rows({"foo": 1, "bar": 2}), [], "no column looks like a text"),
    "column misspelt": ("lm", rows(PAIR), ["--text-column", "txt"], "text_column 'txt' is not among the columns"),
    "column missing in a row": ("lm", rows(PAIR, {"prompt": "x"}), [], "x.jsonl:2: has no column 'completion'"),
    "empty completion": ("lm", rows(PAIR, {**PAIR, "completion": " "}), [], "x.jsonl:2: completion is empty"),
    "wrong role": (
        "chat",
        rows(CHAT, {"messages": [{"role": "bot", "content": "x"}]}),
        [],
        "x.jsonl:2: message 1: role must be one of system",
    ),
    "no chat template": ("lm", rows(CHAT), [], "has no chat template"),
    "ragged CSV": ("lm", raw("x.csv", b"text,n\na,1\nb\n"), [], "x.csv:3: has 1 fields, the header 2"),
    "not Parquet": ("lm", raw("x.parquet", b"nothing"), [], "is not Parquet"),
    "one class": ("lm", rows({"text": "a", "label": "x"}), CLASSIFY, "at least two classes"),
    "no row of a table": (
        "lm",
        raw("x.csv", b"text,label\na\nb,c,d\n"),
        CLASSIFY,
        "x.csv:3: has 3 fields, the header 2",
    ),
    "a table without rows": ("lm", raw("x.csv", b"text,label\n"), CLASSIFY, "no row can be read: /"),
    "label missing": ("lm", rows(*reviews(2), {"review": "a", "label": ""}), CLASSIFY, "x.jsonl:3: label is empty"),
    "text to classify without columns": ("lm", GOOD, CLASSIFY, "has no columns for text and label"),
    "images for a language model": ("lm", lambda f: save_image_folder(f, 4), IMAGES, "a llama takes no images"),
    "folder without classes": ("vit", lambda folder: folder, IMAGES, "has no subfolders; expected one for each class"),
    "unknown arrays": ("vit", archive(foo=np.zeros(3)), IMAGES, "has the arrays foo; expected x_train"),
    "missing image": ("vit", rows({"image": "none.png", "label": "a"}), IMAGES, "x.jsonl:1: no such image"),
    "images smaller than a patch": (
        "vit",
        lambda folder: save_image_folder(folder, 4),
        [*IMAGES, "--image-size", "2"],
        "2 x 2 pixels do not fill a patch of the model",
    ),
    "text as images": ("vit", GOOD, IMAGES, "is not a folder, an .npz archive or a table"),
    "rank below 0": ("lm", GOOD, ["--rank", "-1"], "rank must be a whole number of at least 0"),
    "LoRA without rank": ("lm", GOOD, ["--method", "lora", "--rank", "0"], "method 'lora' has none"),
    "target misspelt": (
        "lm",
        GOOD,
        ["--targets", "q_projj"],
        "target 'q_projj' matches no module; did you mean q_proj",
    ),
    "nothing to resume": ("lm", GOOD, ["--resume"], "holds no checkpoint to resume from"),
    "no such recipe": ("lm", GOOD, ["--recipe", "doral"], "recipe 'doral' is no file, and no shipped recipe"),
    "streaming without an end": ("lm", GOOD, ["--streaming", "--epochs", "2"], "streaming needs steps"),
    "output that cannot be made": (
        "lm",
        GOOD,
        ["--output", "/dev/null/run"],
        "run: /dev/null is a file; name a folder",
    ),
    "output is a file": ("lm", GOOD, ["--output", __file__], "is a file; name a folder"),
    "held-out file missing": ("lm", GOOD, ["--eval-data", "none.txt"], "eval_data none.txt: no such file"),
    "blocks longer than the text": ("lm", GOOD, ["--max-length", "100000"], "the text is too short"),
    "blocks of one token": ("lm", GOOD, ["--max-length", "1"], "max_length is 1"),
    "reporter not installed": ("lm", GOOD, ["--report-to", "wandb"], "wandb is not installed"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_clear_message(models, tmp_path, capsys, name):
    model, make, flags, said = CASES[name]
    model = str(models / model) if "/" not in model else model
    (tmp_path / "data").mkdir()
    data = str(make(tmp_path / "data"))
    command = ["train", "--model", model, "--data", data, "--output", str(tmp_path / "run")]
    if "image-classification" not in flags:
        command += ["--max-length", "16"]
    if not {"--steps", "--streaming"} & set(flags):
        command += ["--steps", "1"]
    assert main([*command, *flags]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("error: ") == 1
    assert re.search(said, captured.err), captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert not (tmp_path / "run").exists()


def test_every_problem_of_options_and_files_is_in_one_message(tmp_path, capsys):
    flags = ["--rank", "-1", "--steps", "0", "--learning-rate", "-1", "--output", str(tmp_path)]
    (tmp_path / "x").touch()
    assert main(["train", "--model", "./nowhere", "--data", "a.txt", "b.csv", *flags]) == 1
    said = capsys.readouterr().err
    assert "(7 problems)" in said
    for part in ("./nowhere", "a.txt", "b.csv", "rank", "steps", "learning_rate", "is not empty"):
        assert part in said


def test_wrong_usage_is_exit_code_2(capsys):
    for flags in (["--steps", "many"], ["--method", "qlora"], ["--modell", "x"], []):
        with pytest.raises(SystemExit) as caught:
            main(["train", "--model", "m", *flags])
        assert caught.value.code == 2
    capsys.readouterr()
