import numpy as np
import pytest

import doratune as dt
from doratune.inference.inputs import Text, read_pictures, read_texts
from doratune.train import TrainConfig
from train.tiny import images, save_image_folder, save_rows


def config(*names, **options):
    return TrainConfig(model="", data=tuple(map(str, names)), **options)


def test_texts_from_lines_tables_and_their_columns(tmp_path):
    (tmp_path / "lines.txt").write_text("one\n\n two \n")
    (tmp_path / "table.csv").write_text("note,text,grade\nx,three,good\ny,four,\n")
    save_rows(tmp_path / "rows.jsonl", [{"review": "five", "label": 3}])
    names = [tmp_path / name for name in ("lines.txt", "table.csv", "rows.jsonl")]
    trained = {"text": "review", "label": "grade"}
    found = read_texts(config(*names), trained, print)
    assert found == [
        Text(f"{names[0]}:1", "one", None),
        Text(f"{names[0]}:3", " two ", None),
        Text(f"{names[1]}:2", "three", "good"),
        Text(f"{names[1]}:3", "four", None),
        Text(f"{names[2]}:1", "five", "3"),
    ]
    chosen = read_texts(config(names[1], text_column="note"), trained, print)
    assert [one.source for one in chosen] == ["x", "y"]


def test_only_ends_of_lines_end_a_text(tmp_path):
    """Texts hold other signs that Python's splitlines takes for one; an editor's numbers do not count those."""
    (tmp_path / "lines.txt").write_bytes("one\u2028one\x0cone\x1cone\x85one\r\n\r\ntwo\n".encode())
    name = tmp_path / "lines.txt"
    found = read_texts(config(name), {}, print)
    assert found == [Text(f"{name}:1", "one\u2028one\x0cone\x1cone\x85one", None), Text(f"{name}:3", "two", None)]


def test_a_first_row_without_a_column(tmp_path):
    """A text it needs to have; a label it need not."""
    rows = save_rows(tmp_path / "rows.jsonl", [{"note": "x"}, {"text": "a"}, {"text": "b", "label": "good"}])
    found = read_texts(config(rows, skip_bad=True), {}, print)
    assert [(one.source, one.label) for one in found] == [("a", None), ("b", "good")]
    file = sorted(save_image_folder(tmp_path / "photos", 2).rglob("*.png"))[0]
    table = save_rows(tmp_path / "t.jsonl", [{"image": str(file)}, {"image": str(file), "label": "red"}])
    assert [one.label for one in read_pictures(config(table), {}, print)] == [None, "red"]


def test_texts_that_cannot_be_used_are_listed_once(tmp_path):
    (tmp_path / "table.csv").write_text('text,label\nfine,a\n"",a\na,b,c\n')
    save_rows(tmp_path / "rows.jsonl", [{"text": "fine"}, {"other": 1}, {"text": 3}, {"text": ""}])
    save_rows(tmp_path / "strange.jsonl", [{"foo": 1}])
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    names = [tmp_path / n for n in ("table.csv", "rows.jsonl", "strange.jsonl", "empty.txt", "folder", "absent.csv")]
    with pytest.raises(dt.AdapterError) as caught:
        read_texts(config(*names), {}, print)
    said = str(caught.value)
    assert said.startswith("9 of 11 rows cannot be used; --skip-bad goes on without them:")
    for part in (
        "table.csv:3: text is empty",
        "table.csv:4: has 3 fields, the header 2",
        "rows.jsonl:2: has no column 'text'; it has other",
        "rows.jsonl:3: text: expected text, found 3",
        "rows.jsonl:4: text is empty",
        "strange.jsonl: no column looks like the text among foo",
        "empty.txt: is empty",
        "folder: is a folder",
        "absent.csv: no such file or folder",
    ):
        assert part in said
    notes = []
    found = read_texts(config(*names, skip_bad=True), {}, notes.append)
    assert [one.source for one in found] == ["fine", "fine"]
    assert notes[0].startswith("9 of 11 rows left out (--skip-bad)")


def test_what_is_no_label_counts_as_one_where_the_user_named_the_column_only(tmp_path):
    values = [0.73, "a", [1], float("nan"), None, 2.0]
    save_rows(tmp_path / "rows.jsonl", [{"text": "fine", "target": value} for value in values])
    photos = save_image_folder(tmp_path / "photos", 2)
    path = str(photos / "blue" / "0.png")
    save_rows(tmp_path / "table.jsonl", [{"file": path, "target": value} for value in values])
    for read, name in ((read_texts, "rows.jsonl"), (read_pictures, "table.jsonl")):
        file = tmp_path / name
        notes = []
        found = read(config(file), {}, notes.append)
        assert [one.label for one in found] == [None, "a", None, None, None, "2"]
        assert len(notes) == 1
        assert notes[0].startswith(f"{file}:1: label: expected a name or a whole number, found 0.73; such labels")
        with pytest.raises(
            dt.AdapterError, match=r"(?s)^3 of 6 rows cannot be used.*found 0\.73.*found \[1\].*found nan"
        ):
            read(config(file, label_column="target"), {}, print)


def test_a_column_that_is_asked_for_has_to_be_there(tmp_path):
    save_rows(tmp_path / "rows.jsonl", [{"text": "fine", "label": "a"}])
    with pytest.raises(dt.AdapterError, match="label_column 'grade' is not among the columns"):
        read_texts(config(tmp_path / "rows.jsonl", label_column="grade"), {}, print)


def test_images_from_everywhere(tmp_path):
    photos = save_image_folder(tmp_path / "photos", 4)
    pixels, classes = images(2)
    np.savez(tmp_path / "bare.npz", images=pixels)
    np.savez(tmp_path / "both.npz", x_train=pixels, y_train=classes)
    (tmp_path / "table.csv").write_text("file\nphotos/red/1.png\n")
    (photos / ".hidden").mkdir()
    (photos / ".hidden" / "x.png").touch()
    (photos / "notes.md").touch()
    names = [photos, photos / "blue", photos / "red" / "3.png", *(tmp_path / n for n in ("bare.npz", "both.npz"))]
    found = read_pictures(config(*names, tmp_path / "table.csv"), {}, print)
    labels = ["blue", "blue", "red", "red", None, None, None, None, None, "0", "1", None]
    assert [one.label for one in found] == labels
    assert all(one.open().size == (16, 16) for one in found)
    assert [one.where for one in found[7:9]] == [f"{tmp_path}/bare.npz images[{i}]" for i in range(2)]


def test_files_that_are_no_images_are_counted_by_kind(tmp_path):
    folder = save_image_folder(tmp_path / "photos", 2)
    (folder / ".hidden").write_text("")
    for name in ("a.HEIC", "red/b.heic", "red/notes"):
        (folder / name).write_text("")
    said = []
    assert len(read_pictures(config(folder), {}, said.append)) == 2
    (line,) = said
    assert line.startswith(
        f"{folder}: 3 files are passed over (2 .heic, 1 without suffix), such as {folder / 'a.HEIC'}"
    )
    assert "images end in .png, " in line


def test_images_that_cannot_be_used_are_listed_once(tmp_path):
    photos = save_image_folder(tmp_path / "photos", 4)
    (photos / "broken.png").write_text("no image")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 nothing")
    np.savez(tmp_path / "strange.npz", foo=np.zeros(3))
    (tmp_path / "table.csv").write_text("file\nphotos/absent.png\n")
    (tmp_path / "text.txt").write_text("no image")
    (tmp_path / "folder").mkdir()
    names = ("photos", "broken.npz", "strange.npz", "table.csv", "text.txt", "folder", "absent.png")
    with pytest.raises(dt.AdapterError) as caught:
        read_pictures(config(*(tmp_path / name for name in names)), {}, print)
    said = str(caught.value)
    assert said.startswith("7 of 11 rows cannot be used")
    for part in (
        "photos/broken.png: image cannot be read",
        "broken.npz: cannot be read as a NumPy archive",
        "strange.npz: has the arrays foo; expected x_test, test_images, images, x, X, x_train, train_images",
        "table.csv:2: no such image",
        "text.txt: is not an image (",
        "folder: holds no image (",
        "absent.png: no such file or folder",
    ):
        assert part in said
    found = read_pictures(config(*(tmp_path / name for name in names), skip_bad=True), {}, lambda _: None)
    assert len(found) == 4
