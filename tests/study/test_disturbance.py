"""What the kernel says about waiting for a processor."""

import pytest

from doratune.study import disturbance
from doratune.study.disturbance import seconds_kept_waiting


def thread(folder, name, text):
    (folder / name).mkdir()
    (folder / name / "schedstat").write_text(text)


def test_all_threads_count(monkeypatch, tmp_path):
    monkeypatch.setattr(disturbance, "THREADS", tmp_path)
    thread(tmp_path, "1", "900 2000000000 7\n")
    thread(tmp_path, "2", "100 500000000 3\n")
    assert seconds_kept_waiting() == 2.5


@pytest.mark.parametrize("text", ["", "nothing to be told"])
def test_where_nothing_is_told_it_is_0(text, monkeypatch, tmp_path):
    monkeypatch.setattr(disturbance, "THREADS", tmp_path)
    thread(tmp_path, "1", text)
    assert seconds_kept_waiting() == 0
    monkeypatch.setattr(disturbance, "THREADS", tmp_path / "not there")
    assert seconds_kept_waiting() == 0
