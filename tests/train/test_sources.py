import json
import os

import datasets
import pytest

import doratune as dt
from doratune.train import sources as module
from doratune.train.images import problem_of as image_problem_of


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def values(name, split="train"):
    return [dict(row.values) for row in module.read(name, split)]


ROWS = [{"a": "1", "b": "ü, ö"}, {"a": "2", "b": "two\nlines"}]


def test_every_format_gives_the_same_rows(tmp_path):
    made = datasets.Dataset.from_list(ROWS)
    made.to_parquet(tmp_path / "x.parquet")
    made.save_to_disk(tmp_path / "folder")
    names = [
        str(tmp_path / "x.parquet"),
        str(tmp_path / "folder"),
        write(tmp_path / "x.jsonl", "\n".join(map(json.dumps, ROWS)) + "\n\n"),
        write(tmp_path / "x.json", json.dumps(ROWS)),
        write(tmp_path / "wrapped.json", json.dumps({"version": 1, "data": ROWS})),
        write(tmp_path / "lines.json", "\n".join(map(json.dumps, ROWS))),
        write(tmp_path / "x.csv", '\ufeffa,b\r\n1,"ü, ö"\r\n2,"two\nlines"\r\n'),
        write(tmp_path / "x.tsv", 'a\tb\n1\tü, ö\n2\t"two\nlines"\n'),
    ]
    for name in names:
        assert values(name) == ROWS, name


def test_a_text_file_is_one_row(tmp_path):
    assert values(write(tmp_path / "x.txt", "\ufeffone\ntwo")) == [{"text": "one\ntwo"}]
    assert values(write(tmp_path / "noname", "one")) == [{"text": "one"}]


def test_rows_that_cannot_be_read_have_a_line_and_a_reason(tmp_path):
    name = write(tmp_path / "x.jsonl", b'{"a": 1}\nnonsense\n[1]\n\n"\xff"\n')
    found = [(row.where.rpartition(":")[2], row.problem) for row in module.read(name, "train")]
    assert [line for line, _ in found] == ["1", "2", "3", "5"]
    assert [problem and problem.split(":")[0] for _, problem in found] == [
        None,
        "is not JSON",
        "expected an object with columns, found list",
        "is not UTF-8 text (invalid start byte)",
    ]
    name = write(tmp_path / "x.csv", 'a,b\n1\n1,2,3\n\n1,"2\n2"\n"1\r\n"\n1,2\n')
    found = [(row.where.rpartition(":")[2], row.problem) for row in module.read(name, "train")]
    few, many = "has 1 fields, the header 2", "has 3 fields, the header 2"
    assert found == [("2", few), ("3", many), ("5", None), ("7", few), ("9", None)], "not a first line"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.json", "{", "is not JSON"),
        ("x.json", "3", "expected a list of objects, found int"),
        ("x.parquet", "nothing", "is not Parquet"),
        ("x.csv", b"a,b\n\xff,1\n", "is not UTF-8 text"),
        ("x.csv", b"a,b,a,,\n1,2,3,,\n", "several columns are called 'a'; rename them"),
        ("x.json", b"\xff\xfe", "is not UTF-8 text"),
        ("x.tsv", 'a\tb\n1\t2\n"one\t1\ntwo\t2\nthree" four\t3\n', r"x\.tsv:3 cannot be read: .* expected after"),
        ("x.csv", 'a,b\n1,2\n1,"two\n3,4\n', r"x\.csv:3 cannot be read: unexpected end of data"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, said):
    with pytest.raises(dt.AdapterError, match=said):
        values(write(tmp_path / name, content))


@pytest.mark.parametrize("problem_of", [module.problem_of, image_problem_of])
def test_a_pipe_is_not_called_empty(tmp_path, problem_of):
    os.mkfifo(tmp_path / "pipe")
    assert "is a pipe or a device: data are read twice" in problem_of(str(tmp_path / "pipe"))


def test_a_file_that_vanished(tmp_path):
    with pytest.raises(dt.AdapterError, match="cannot be read: No such file"):
        values(str(tmp_path / "x.jsonl"))


def test_class_numbers_become_names_and_images_stay_files(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    from train.tiny import images

    made = datasets.Dataset.from_dict({"image": list(images(2)[0]), "label": [1, 0]}, features=features)
    made.save_to_disk(tmp_path / "set")
    found = values(str(tmp_path / "set"))
    assert [row["label"] for row in found] == ["dog", "cat"]
    assert found[0]["image"]["bytes"].startswith(b"\x89PNG")


def test_what_is_a_hub_name(tmp_path):
    assert module.is_hub_name("owner/name")
    assert module.is_hub_name("imdb")
    for name in ("x.jsonl", "./x", "a/b/c", "/x/y", str(tmp_path), "x.npz"):
        assert not module.is_hub_name(name)


def test_a_hub_name_out_of_reach_names_the_local_way(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no route")))
    with pytest.raises(dt.AdapterError, match=r"data owner/name: .*no route.*name a downloaded file \(\.jsonl"):
        values("owner/name")


def test_a_broken_data_set_folder(tmp_path):
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(dt.AdapterError, match="cannot be read as a data set"):
        values(str(tmp_path))


def test_a_chat_alone_in_a_file_is_one_row(tmp_path):
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert values(write(tmp_path / "x.json", json.dumps(chat))) == [chat]
