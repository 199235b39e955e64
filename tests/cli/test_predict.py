import csv
import json
import os
import subprocess
import sys

import pytest

from doratune.cli import main
from inference.classifiers import train_on_images, train_on_texts
from train.tiny import save_encoder, save_image_folder, save_rows, save_vision_model


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    return folder, train_on_texts(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    return folder, train_on_images(folder)


def predict(*arguments):
    return main(["predict", *map(str, arguments)])


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def said_accuracy(result, count):
    return f"accuracy {result.accuracy_after:.2%} ({round(result.accuracy_after * count)} of {count})"


def test_texts_into_a_csv_file(texts, tmp_path, capsys):
    folder, result = texts
    out = tmp_path / "predictions.csv"
    assert predict(folder / "run" / "adapter", folder / "test.jsonl", "--output", out, "--batch-size", 3) == 0
    printed = capsys.readouterr().out
    assert f"20 predictions written to {out}" in printed
    assert said_accuracy(result, 20) in printed
    rows = rows_of(out)
    assert list(rows[0]) == ["source", "text", "label", "predicted", "probability", "p_bad", "p_good"]
    assert len(rows) == 20
    assert sum(row["label"] == row["predicted"] for row in rows) == round(result.accuracy_after * 20)
    for row in rows:
        assert float(row["p_bad"]) + float(row["p_good"]) == pytest.approx(1, abs=2e-6)
        assert row["probability"] == row[f"p_{row['predicted']}"]
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.csv"]


def test_the_base_is_loaded_as_in_training(tmp_path, capsys):
    train_on_texts(tmp_path, quantize="nf4")
    files = (tmp_path / "run" / "adapter", tmp_path / "test.jsonl", "--json")
    assert predict(*files) == 0
    printed = capsys.readouterr()
    assert "the base is loaded as in training: --quantize nf4 (--quantize none: in full precision)" in printed.err
    assert predict(*files, "--quantize", "nf4") == 0
    asked = capsys.readouterr()
    assert (asked.out, "loaded as" in asked.err) == (printed.out, False)
    assert predict(*files, "--quantize", "none") == 0
    assert capsys.readouterr().out != printed.out
    assert main(["merge", str(files[0]), "--output", str(tmp_path / "merged")]) == 0
    assert "trained with --quantize nf4; merged into the base in full precision" in capsys.readouterr().err
    assert predict(tmp_path / "merged", files[1], "--json") == 0
    assert "loaded as" not in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to_is_told_before_a_model_is_loaded(texts, tmp_path, capsys, monkeypatch):
    folder, _ = texts
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    monkeypatch.setattr("doratune.inference.predictor.Predictor.load", lambda *_: pytest.fail("a model was loaded"))
    assert predict(folder / "run" / "adapter", folder / "test.jsonl", "--output", tmp_path / "p.csv") == 1
    assert f"p.csv: {tmp_path} is not writable; name another folder" in capsys.readouterr().err


def test_images_without_labels_as_json(pictures, capsys):
    folder, _ = pictures
    image = folder / "photos" / "red" / "1.png"
    assert predict(folder / "run" / "adapter", image, "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["source"] == str(image)
    assert found["label"] is None
    assert list(found["probabilities"]) == ["blue", "red"]
    assert found["probabilities"][found["predicted"]] == found["probability"]


def test_json_keeps_the_accuracy_out_of_the_way(pictures, capsys):
    folder, result = pictures
    assert predict(folder / "run" / "adapter", folder / "test.npz", "--json") == 0
    printed = capsys.readouterr()
    assert len([json.loads(line) for line in printed.out.splitlines()]) == 12
    assert said_accuracy(result, 12) in printed.err


@pytest.mark.parametrize("kind", ["texts", "pictures"])
def test_a_merged_model_predicts_the_same(request, kind, tmp_path, capsys):
    folder, result = request.getfixturevalue(kind)
    data = folder / ("test.jsonl" if kind == "texts" else "test.npz")
    adapter, merged = folder / "run" / "adapter", tmp_path / "merged"
    assert main(["merge", str(adapter), "--output", str(merged), "--verify"]) == 0
    assert "logits differ by" in capsys.readouterr().out
    for name in ("doratune.json", *(["preprocessor_config.json"] if kind == "pictures" else [])):
        assert (merged / name).read_bytes() == (adapter / name).read_bytes()
    for source, name in ((adapter, "unmerged.csv"), (merged, "merged.csv")):
        assert predict(source, data, "--output", tmp_path / name) == 0
        assert said_accuracy(result, 20 if kind == "texts" else 12) in capsys.readouterr().out
    for one, other in zip(rows_of(tmp_path / "merged.csv"), rows_of(tmp_path / "unmerged.csv"), strict=True):
        assert one["predicted"] == other["predicted"]
        assert float(one["probability"]) == pytest.approx(float(other["probability"]), abs=1e-5)


def test_a_table_where_there_is_no_file_to_write(texts, tmp_path, capsys):
    folder, _ = texts
    rows = [{"review": f"[red]tale[/] :fire: {number}", "label": ("good", "odd")[number % 2]} for number in range(30)]
    file = save_rows(tmp_path / "rows.jsonl", [*rows, {"review": "x" * 100}])
    assert predict(folder / "run" / "adapter", file) == 0
    printed = capsys.readouterr()
    assert "[red]tale[/] :fire: 19" in printed.out
    assert "tale[/] :fire: 20" not in printed.out
    assert "and 11 more; --output FILE.csv writes all" in printed.out
    assert "of 15)" in printed.out
    assert "not counted: 15 with labels that the model does not have, such as odd (it has bad, good)" in printed.out
    assert "1 of 31 texts were cut to 24 tokens" in printed.err


def test_a_runs_length_may_be_more_than_the_model_takes(tmp_path, capsys):
    train_on_texts(tmp_path, max_length=100)
    file = save_rows(tmp_path / "rows.jsonl", [{"review": "x" * 80}, {"review": "short"}])
    assert predict(tmp_path / "run" / "adapter", file) == 0
    assert "1 of 2 texts were cut to 64 tokens" in capsys.readouterr().err


def test_the_hundredth_line_is_no_emoji(texts, tmp_path, capsys):
    rows = [{"review": "tale"}] * 99
    file = save_rows(tmp_path / "rows.jsonl", [*rows, {"review": ""}])
    assert predict(texts[0] / "run" / "adapter", file, "--skip-bad") == 0
    assert f"{file}:100: text is empty" in capsys.readouterr().err


def test_bad_files_are_an_error_or_counted(pictures, tmp_path, capsys):
    folder, _ = pictures
    (tmp_path / "broken.png").write_text("no image")
    out = tmp_path / "out.csv"
    given = (folder / "run" / "adapter", tmp_path / "broken.png", tmp_path / "absent.png", folder / "test.npz")
    assert predict(*given, "--output", out) == 1
    complaint = capsys.readouterr().err
    assert "2 of 14 rows cannot be used; --skip-bad goes on without them" in complaint
    assert "broken.png: image cannot be read" in complaint
    assert "absent.png: no such file or folder" in complaint
    assert not out.exists()
    assert predict(*given, "--output", out, "--skip-bad") == 0
    assert "2 of 14 rows left out" in capsys.readouterr().err
    assert len(rows_of(out)) == 12


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are UTF-8 elsewhere")
def test_a_files_name_that_is_no_utf_8_is_written_escaped(pictures, tmp_path, capsys):
    folder, _ = pictures
    image = next((folder / "photos").rglob("*.png"))
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(image.read_bytes())
    out = tmp_path / "out.csv"
    assert predict(folder / "run" / "adapter", tmp_path, "--output", out, "--json") == 0
    assert [row["source"] for row in rows_of(out)] == [f"{tmp_path}/caf\\udce9.png"]
    assert json.loads(capsys.readouterr().out)["source"] == f"{tmp_path}/caf\\udce9.png"


def test_nothing_is_left_of_a_failure(texts, tmp_path, monkeypatch, capsys):
    from doratune.inference.predictor import Predictor

    folder, _ = texts
    out = tmp_path / "out.csv"
    out.write_text("old")

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Predictor, "predict", fail)
    assert predict(folder / "run" / "adapter", folder / "test.jsonl", "--output", out) == 130
    assert out.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]


def test_what_is_no_file_is_not_replaced_by_one(texts, tmp_path, capsys):
    folder, _ = texts
    given = (folder / "run" / "adapter", folder / "test.jsonl", "--output")
    pipe, link, out = tmp_path / "pipe", tmp_path / "link.csv", tmp_path / "out.csv"
    os.mkfifo(pipe)
    assert predict(*given, pipe) == 1
    assert "pipe: expected a file, found a device or a pipe" in capsys.readouterr().err
    assert pipe.is_fifo()
    link.symlink_to(out)
    assert predict(*given, link) == 0
    assert link.is_symlink()
    assert len(rows_of(out)) == 20


def test_a_reader_that_has_seen_enough_is_no_failure_of_the_file(texts, tmp_path):
    folder, _ = texts
    words = ["predict", folder / "run" / "adapter", folder / "test.jsonl", "--json", "--output", tmp_path / "out.csv"]
    command = [sys.executable, "-m", "doratune", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        said = process.stderr.read().decode()
    assert process.returncode == 141, said
    assert "cannot write" not in said


@pytest.mark.parametrize(
    ("arguments", "complaints"),
    [
        ([], ["name at least one file"]),
        (
            ["TEST", "--batch-size", "0", "--output", "nowhere/out.csv"],
            ["2 problems", "batch_size", "a folder that exists"],
        ),
        (["TEST", "--output", "TEST"], ["is one of the files to classify"]),
        (["TEST", "--dtype", "float16"], ["float16 needs a GPU"]),
        (["TEST", "--base", "./nowhere"], ["nowhere: no such folder"]),
        (["absent.csv"], ["error: nothing to classify: absent.csv: no such file or folder\n"]),
        (["TEST", "--label-column", "grade"], ["label_column 'grade' is not among the columns"]),
        (["TEST", "--image-column", "photo"], ["adapter classifies texts; leave image_column out"]),
    ],
)
def test_what_cannot_work_is_one_message(texts, arguments, complaints, capsys):
    folder, _ = texts
    given = [str(folder / "test.jsonl") if word == "TEST" else word for word in arguments]
    assert predict(folder / "run" / "adapter", *given) == 1
    said = capsys.readouterr()
    assert said.out == ""
    for part in complaints:
        assert part in said.err


@pytest.mark.parametrize("make", [save_vision_model, save_encoder])
def test_a_model_without_a_head_is_no_classifier(make, tmp_path, capsys):
    make(tmp_path / "model")
    save_rows(tmp_path / "rows.jsonl", [{"text": "a"}])
    capsys.readouterr()
    files = save_image_folder(tmp_path / "photos", 2) if make is save_vision_model else tmp_path / "rows.jsonl"
    assert predict(tmp_path / "model", files) == 1
    assert "not a classifier" in capsys.readouterr().err


def test_generate_sends_classifiers_to_predict(texts, tmp_path, capsys):
    folder, _ = texts
    assert main(["generate", str(folder / "run" / "adapter"), "--prompt", "a"]) == 1
    assert "was trained for text-classification; use doratune predict" in capsys.readouterr().err
