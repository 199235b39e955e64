"""One command for each study."""

import runpy
from pathlib import Path

import pytest

import assets

PROGRAM = Path(__file__).parents[2] / "studies" / "run.py"


def test_what_cannot_be_fetched_is_one_message(tmp_path, monkeypatch, capsys):
    def fail():
        raise assets.AssetError("vit-small needs transformers and onnx to be unpacked: pip install transformers onnx")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(assets, "vit_small", fail)
    monkeypatch.setattr("sys.argv", [str(PROGRAM), "images-few"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(PROGRAM), run_name="__main__")
    said = capsys.readouterr()
    assert (end.value.code, said.out) == (1, "")
    assert said.err == "error: vit-small needs transformers and onnx to be unpacked: pip install transformers onnx\n"
