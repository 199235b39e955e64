"""The race of the program against the bare Trainer runs with a tiny model, and says what it found."""

import re

import pytest
from bench.program import Program


@pytest.mark.filterwarnings("ignore")  # libraries about themselves, before they are quiet
def test_a_tiny_race(capsys):
    Program(pairs=2, steps=2, long=6, hidden=16).run()
    *pairs, ratio, memory = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in pairs] == ["pair 1", "pair 2"]
    assert float(re.search(r"takes (\S+) \(\S+ to \S+\) of the bare", ratio)[1]) > 0
    assert re.search(r"checkpoint 1: \S+ MiB, at checkpoint 6: ", memory)
