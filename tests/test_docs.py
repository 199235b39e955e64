"""docs/library.md: its code runs, and it names what there is, with signatures and defaults as they are."""

import dataclasses
import inspect
import pkgutil
import re
from pathlib import Path

import doratune as dt
import doratune.train
from train.tiny import save_model, write_text

PAGE = (Path(__file__).parents[1] / "docs" / "library.md").read_text(encoding="utf-8")
MODULES = {"dt.": dt, "dt.peft.": dt.peft, "dt.study.": dt.study, "": doratune.train}


def test_its_code_runs(tmp_path, monkeypatch, capsys):
    save_model(tmp_path / "model")
    write_text(tmp_path / "tales.txt")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE):
        exec(block, names)
    printed = capsys.readouterr().out
    for line in re.findall(r"^ *print\(.*\)  # (.*)$", PAGE, re.MULTILINE):
        if not line.startswith("what "):
            assert line in printed


def test_it_names_everything_public():
    for prefix, module in MODULES.items():
        for name in module.__all__:
            found = getattr(module, name)
            shown = f"{prefix}{name}"
            if not inspect.isclass(found):
                shown += signature(found)
            assert f"`{shown}" in PAGE


def test_what_it_names_by_its_whole_path_is_there():
    rows = re.findall(r"^\| `(doratune\.[\w.]+)(\(.*?\))` \|", PAGE, re.MULTILINE)
    assert len(rows) == 5
    for path, shown in rows:
        assert signature(pkgutil.resolve_name(path)) == shown


def signature(found):
    """As a reader wants it: without types."""
    whole = inspect.signature(found)
    bare = [p.replace(annotation=p.empty) for p in whole.parameters.values()]
    return str(whole.replace(parameters=bare, return_annotation=whole.empty)).replace("'", '"')


def test_it_lists_the_options_of_an_adapter_with_their_defaults():
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", PAGE.partition("## Options of an adapter")[2], re.MULTILINE))
    default = dt.AdapterConfig()
    assert rows == {
        field.name: repr(getattr(default, field.name)).replace("'", '"') for field in dataclasses.fields(default)
    }
