"""The pair for `doratune analyze` is one that it can read whole."""

import json

from bench.large_pair import LargePair

from doratune.cli import main


def test_analyze_reads_every_weight_of_the_pair(tmp_path, capsys):
    LargePair(tmp_path, hidden=16, intermediate=24, layers=2, vocabulary=32).run()
    assert len(list((tmp_path / "base").glob("*.safetensors"))) == 4
    assert main(["analyze", str(tmp_path / "base"), str(tmp_path / "tuned"), "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert len(run["points"]) == 2 + 2 * 7
    assert all(point["change"]["spectrum"] for point in run["points"])
