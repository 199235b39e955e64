"""Folders are written whole or not at all, whatever happens, and never read as pickle."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import pickle
import resource
import signal
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from doratune import AdapterError
from doratune.files import (
    CONFIG,
    PICKLED,
    WEIGHTS,
    output_problem,
    read_config,
    read_weights,
    write_adapter,
    write_weights,
    writing,
)

OLD = ({"a": torch.ones(3)}, {"r": 1}, {"k": "old"})
NEW = ({"a": torch.zeros(3)}, {"r": 2}, {"k": "new"})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_what_is_written_is_read(tmp_path):
    folder = tmp_path / "new" / "folder"
    write_adapter(folder, *OLD)
    assert read_config(folder) == {"r": 1}
    tensors, metadata = read_weights(folder)
    assert torch.equal(tensors["a"], torch.ones(3))
    assert metadata == {"format": "pt", "k": "old"}
    assert listing(folder) == [CONFIG, WEIGHTS]


def test_writing_again_replaces_both_files_and_no_other(tmp_path):
    write_adapter(tmp_path, *OLD)
    (tmp_path / "README.md").write_text("mine")
    write_adapter(tmp_path, *NEW)
    assert read_config(tmp_path) == {"r": 2}
    assert not read_weights(tmp_path)[0]["a"].any()
    assert listing(tmp_path) == ["README.md", CONFIG, WEIGHTS]


def test_weights_read_before_survive_writing_again(tmp_path):
    write_adapter(tmp_path, *OLD)
    tensors, _ = read_weights(tmp_path)
    write_adapter(tmp_path, *NEW)
    assert torch.equal(tensors["a"], torch.ones(3))


def fail_at(monkeypatch, module, name, number, error):
    """Let the number-th call of a function raise."""
    calls = []
    original = getattr(module, name)

    def wrapper(*args, **kwargs):
        calls.append(args)
        if len(calls) == number:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, wrapper)


FULL = OSError(28, "No space left on device")
DENIED = PermissionError(13, "Permission denied")
FAILURES = {
    "full, syncing": (os, "fsync", 1, FULL),
    "full, syncing the second file": (os, "fsync", 2, FULL),
    "moving the first old file": (os, "replace", 1, DENIED),
    "moving the second old file": (os, "replace", 2, DENIED),
    "moving the first new file": (os, "replace", 3, DENIED),
    "moving the second new file": (os, "replace", 4, DENIED),
    "writing the options": (Path, "write_text", 1, FULL),
    "read-only folder": (Path, "mkdir", 2, OSError(30, "Read-only file system")),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("crash", [False, True])
def test_a_failure_leaves_the_older_adapter_whole_and_nothing_else(failure, crash, tmp_path, monkeypatch):
    write_adapter(tmp_path, *OLD)
    before = contents(tmp_path)
    module, name, number, error = FAILURES[failure]
    with monkeypatch.context() as patch:
        fail_at(patch, module, name, number, KeyboardInterrupt() if crash else error)
        with pytest.raises(KeyboardInterrupt if crash else AdapterError) as raised:
            write_adapter(tmp_path, *NEW)
    if not crash:
        assert str(raised.value) == f"cannot write the adapter to {tmp_path}: {error.strerror}"
    assert contents(tmp_path) == before
    assert listing(tmp_path) == [CONFIG, WEIGHTS]
    write_adapter(tmp_path, *NEW)
    assert read_config(tmp_path) == {"r": 2}


@pytest.mark.parametrize("failure", ["full, syncing", "writing the options"])
def test_a_failure_in_a_new_folder_leaves_no_folder(failure, tmp_path, monkeypatch):
    fail_at(monkeypatch, *FAILURES[failure])
    with pytest.raises(AdapterError):
        write_adapter(tmp_path / "new", *NEW)
    assert listing(tmp_path) == []


def test_equal_options_are_not_touched_so_that_one_step_replaces_the_weights(tmp_path, monkeypatch):
    write_adapter(tmp_path, *OLD)
    moves = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moves.append(Path(b).name), replace(a, b))[1])
    write_adapter(tmp_path, NEW[0], OLD[1], NEW[2])
    assert moves == [WEIGHTS]


def test_options_and_weights_are_never_of_two_adapters(tmp_path, monkeypatch):
    write_adapter(tmp_path, *OLD)
    seen = []
    replace = os.replace

    def look(a, b):
        replace(a, b)
        try:
            seen.append((read_config(tmp_path)["r"], float(read_weights(tmp_path)[0]["a"][0])))
        except AdapterError:
            seen.append("incomplete")

    monkeypatch.setattr(os, "replace", look)
    write_adapter(tmp_path, *NEW)
    assert seen == ["incomplete"] * 3 + [(2, 0.0)]


def write_apart(prepare: Callable[[], None], folder: Path) -> None:
    """Write an adapter in a process of its own, which begins with ``prepare()``."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork"), initializer=prepare) as pool:
        pool.submit(write_large, folder).result()


def write_large(folder: Path) -> None:
    write_adapter(folder, {"a": torch.zeros(40_000)}, {"r": 2, "x": "y" * 1000}, {})


def fill_the_disk() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def die_syncing() -> None:
    os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)


def test_a_disk_that_fills_up_while_the_weights_are_written(tmp_path):
    write_adapter(tmp_path, *OLD)
    before = contents(tmp_path)
    with pytest.raises(AdapterError, match="cannot write"):
        write_apart(fill_the_disk, tmp_path)
    assert contents(tmp_path) == before
    assert listing(tmp_path) == [CONFIG, WEIGHTS]


def test_a_process_killed_while_writing_leaves_the_older_adapter_whole(tmp_path):
    write_adapter(tmp_path, *OLD)
    with pytest.raises(BrokenProcessPool, match="terminated abruptly"):
        write_apart(die_syncing, tmp_path)
    assert read_config(tmp_path) == {"r": 1}
    assert torch.equal(read_weights(tmp_path)[0]["a"], torch.ones(3))
    # Nobody could tidy up; what is left is hidden and is never read.
    assert all(name in (CONFIG, WEIGHTS) or ".partial" in name for name in listing(tmp_path))
    write_adapter(tmp_path, *NEW)
    assert read_config(tmp_path) == {"r": 2}


def test_a_folder_that_is_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    for folder in (path, path / "below"):
        with pytest.raises(AdapterError, match=r"cannot write the adapter to .*file"):
            write_adapter(folder, *NEW)
    assert path.read_text() == "mine"
    with pytest.raises(AdapterError, match=f"is a file; name the folder with {CONFIG} and {WEIGHTS}$"):
        read_config(path)
    with pytest.raises(AdapterError, match=r"image generators are read by dt\.kohya\.load_adapter"):
        read_config(path.rename(tmp_path / "style.safetensors"))


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_file_that_is_a_folder(name, tmp_path):
    (tmp_path / name / "mine").mkdir(parents=True)
    with pytest.raises(AdapterError, match=f"{name} is a folder"):
        write_adapter(tmp_path, *NEW)
    assert listing(tmp_path) == [name, f"{name}/mine"]
    with pytest.raises(AdapterError, match=f"has no {name}"):
        read_config(tmp_path) if name == CONFIG else read_weights(tmp_path)


@contextlib.contextmanager
def bound_by_permissions():
    """Root is not; for a while it is somebody else."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_read_only_folder(tmp_path):
    write_adapter(tmp_path, *NEW)  # everything is imported while it can be read
    with tempfile.TemporaryDirectory() as name:  # where others may look
        folder = Path(name)
        folder.chmod(0o555)
        with bound_by_permissions(), pytest.raises(AdapterError, match="Permission denied"):
            write_adapter(folder, *NEW)
        folder.chmod(0o700)
        assert listing(folder) == []


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="no file system here that nobody can write to")
def test_a_folder_that_nobody_can_write_to():
    with pytest.raises(AdapterError, match="cannot write the adapter to"):
        write_adapter(Path("/proc/doratune"), *NEW)
    with pytest.raises(AdapterError, match="cannot write the adapter to"):
        write_adapter(Path("/proc"), *NEW)


def test_writing_serves_other_files_too(tmp_path):
    with writing(tmp_path / "out", "the report") as staging:
        (staging / "a.txt").write_text("a")
        assert [path for path in listing(tmp_path / "out") if ".partial" not in path] == []
    assert listing(tmp_path / "out") == ["a.txt"]

    def fail():
        with writing(tmp_path / "out", "the report") as staging:
            (staging / "a.txt").write_text("b")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (tmp_path / "out" / "a.txt").read_text() == "a"
    assert listing(tmp_path / "out") == ["a.txt"]


# Reading


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(AdapterError, match="does not exist; name a folder with"):
        read_config(tmp_path / "none")
    with pytest.raises(AdapterError, match=f"has no {CONFIG}; it is not an adapter's folder"):
        read_config(tmp_path)
    with pytest.raises(AdapterError, match=f"has no {WEIGHTS}"):
        read_weights(tmp_path)


def test_a_whole_model_is_told_from_an_adapter(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AdapterError, match=f"has no {CONFIG}; it is not an adapter's folder, but a whole model's$"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a":' * 100_000, "is not JSON"),
        (b'{"r": ' + b"9" * 10_000 + b"}", "is not JSON"),
        (b"[]", "expected a JSON object, found list"),
        (b'"text"', "expected a JSON object, found str"),
        (b"null", "expected a JSON object, found NoneType"),
    ],
    ids=range(9),
)
def test_options_that_are_no_json_object(text, message, tmp_path):
    (tmp_path / CONFIG).write_bytes(text)
    with pytest.raises(AdapterError, match=message):
        read_config(tmp_path)


class Boom:
    def __reduce__(self):
        return (os.mkdir, ("boom",))


def test_pickle_is_refused_and_never_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / PICKLED).write_bytes(pickle.dumps(Boom()))
    with pytest.raises(AdapterError, match="never read"):
        read_weights(tmp_path)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / PICKLED).read_bytes())  # under the other name
    with pytest.raises(AdapterError, match="cannot be read"):
        read_weights(tmp_path)
    assert not (tmp_path / "boom").exists()


def safetensors(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def entry(dtype: str = "F32", shape: object = (1,), offsets: object = (0, 4)) -> bytes:
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


HOSTILE = {
    "empty": b"",
    "short": b"\1\2",
    "header of 2^63 bytes": safetensors(entry(), bytes(4), 2**63),
    "header beyond the file": safetensors(entry(), bytes(4), 10**6),
    "header of 200 MB": safetensors(b"", b"", 200 * 2**20),
    "header not JSON": safetensors(b"not JSON", bytes(4)),
    "header a list": safetensors(b"[]"),
    "header not UTF-8": safetensors(b"\xff\xfe\xfd"),
    "header deeply nested": safetensors(b'{"a":' * 20_000),
    "offsets beyond the file": safetensors(entry(offsets=(0, 400), shape=(100,)), bytes(4)),
    "offsets backwards": safetensors(entry(offsets=(4, 0)), bytes(4)),
    "offsets negative": safetensors(entry(offsets=(-4, 0)), bytes(4)),
    "shape against offsets": safetensors(entry(shape=(2,)), bytes(4)),
    "shape overflows": safetensors(entry(shape=(2**62, 2**62)), bytes(4)),
    "shape negative": safetensors(entry(shape=(-1,)), bytes(4)),
    "dtype unknown": safetensors(entry("F99"), bytes(4)),
    "dtype torch lacks": safetensors(entry("F6_E2M3", (4,), (0, 3)), bytes(3)),
    "data left over": safetensors(entry(), bytes(400)),
    "metadata not strings": safetensors(b'{"__metadata__":{"a":1}}'),
    "pickle": pickle.dumps({"a": 1}),
    "zip": b"PK\3\4" + bytes(100),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_files_that_are_no_safetensors_files(name, tmp_path):
    (tmp_path / WEIGHTS).write_bytes(HOSTILE[name])
    with pytest.raises(AdapterError, match=f"{WEIGHTS} cannot be read: .*; it may be truncated"):
        read_weights(tmp_path)


def test_a_file_that_may_not_be_read_is_not_said_to_be_gone(tmp_path, monkeypatch):
    write_adapter(tmp_path, *OLD)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(AdapterError, match=f"{WEIGHTS} cannot be read: Permission denied$"):
        read_weights(tmp_path)


def test_every_truncation_is_noticed(tmp_path):
    write_adapter(tmp_path, *OLD)
    whole = (tmp_path / WEIGHTS).read_bytes()
    for length in range(len(whole)):
        (tmp_path / WEIGHTS).write_bytes(whole[:length])
        with pytest.raises(AdapterError, match="cannot be read"):
            read_weights(tmp_path)


def test_whoever_may_read_the_options_may_read_the_weights(tmp_path):
    write_adapter(tmp_path, *NEW)
    write_weights(tmp_path / "style.safetensors", NEW[0], {})
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
    assert modes[WEIGHTS] == modes["style.safetensors"] == modes[CONFIG]


def test_the_file_is_plain_safetensors(tmp_path):
    write_adapter(tmp_path, *OLD)
    assert torch.equal(load_file(tmp_path / WEIGHTS)["a"], torch.ones(3))


def test_an_output_is_judged_before_it_is_made(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    for good in ("new", "new/inner", ".", str(tmp_path)):
        assert output_problem(Path(good)) is None
    assert output_problem(Path("file")) == "output file is a file; name a folder"
    assert output_problem(Path("file/inner")) == f"output file/inner: {tmp_path / 'file'} is a file; name a folder"
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    assert output_problem(Path("new")) == f"output new: {tmp_path} is not writable; name another folder"
