import json

import pytest

from doratune.cli import main
from study.checkpoints_on_disk import LAYERS, base_weights, turned, write


@pytest.fixture
def folder(tmp_path):
    base = base_weights()
    write(tmp_path / "base", {**base, "norm.weight": base[next(iter(base))][0].clone()})
    for step in (1, 2, 3):
        turn = {key: turned(w, 0.05 * step + 0.01 * int(key.split(".")[2])) for key, w in base.items()}
        write(tmp_path / "run" / f"checkpoint-{step}", turn)
    return tmp_path


def test_a_report_and_what_is_printed(folder, capsys):
    arguments = ["analyze", str(folder / "base"), str(folder / "run"), "--output", str(folder / "report")]
    assert main([*arguments, "--labels", "mine"]) == 0
    printed = capsys.readouterr().out
    for part in ("mine", "q_proj", "all kinds", "mine: not compared, a vector", "norm.weight", "report.html"):
        assert part in printed
    assert (folder / "report" / "report.html").is_file()
    assert main(arguments) == 0, "an earlier report is replaced"


def test_equal_models_are_called_equal(folder, capsys):
    base = str(folder / "base")
    assert main(["analyze", base, base, "--output", str(folder / "report")]) == 0
    printed = capsys.readouterr().out
    assert f"base: nothing changed, {2 * LAYERS} weights are as in the base." in printed
    assert "correlation" not in printed
    assert "nothing changed" in (folder / "report" / "report.html").read_text()


def test_json_writes_nothing(folder, capsys):
    before = sorted(folder.iterdir())
    assert main(["analyze", str(folder / "base"), str(folder / "run"), "--spectra", "none", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"][0]["label"] == "run"
    assert len(found["runs"][0]["points"]) == 2 * LAYERS * 3
    assert found["runs"][0]["points"][0]["change"]["spectrum"] is None
    assert sorted(folder.iterdir()) == before


def test_everything_that_is_wrong_is_said_at_once(folder, capsys):
    (folder / "taken").mkdir()
    (folder / "taken" / "thesis.txt").touch()
    arguments = ["analyze", str(folder / "base"), str(folder / "absent"), "--output", str(folder / "taken")]
    assert main([*arguments, "--labels", "a", "a"]) == 1
    error = capsys.readouterr().err
    for part in ("4 problems", "absent does not exist", "expected 1", "must differ", "holds no report"):
        assert part in error
    assert main(["analyze", str(folder / "base"), str(folder / "taken")]) == 1
    assert "neither weights" in capsys.readouterr().err
