"""The documentation: code runs, links lead somewhere, and options, signatures and defaults are as they are."""

import dataclasses
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import doratune as dt
import doratune.train
from doratune.cli import main
from doratune.study.comparison.recipe import Grid, load
from doratune.train import Information
from train.tiny import llama, save_model, write_text

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("studies/**/*.md")]
PAGE = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
MODULES = {
    "dt.": dt,
    "dt.peft.": dt.peft,
    "dt.kohya.": dt.kohya,
    "dt.diffusers.": dt.diffusers,
    "dt.mlx.": dt.mlx,
    "dt.study.": dt.study,
    "": doratune.train,
}


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
    assert len(rows) == 6
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


def test_the_ten_lines_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {
        "model": llama(),
        "batches": [torch.arange(16)[None]] * 2,
        "loss_of": lambda model, batch: model(input_ids=batch, labels=batch).loss,
    }
    exec(blocks(ROOT / "README.md", "python")[0], names)
    assert type(names["model"].model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert (tmp_path / "my-adapter" / "adapter_config.json").is_file()


def test_the_recipe_of_a_comparison_is_read_and_its_defaults_are_told(tmp_path):
    page = ROOT / "docs" / "compare.md"
    (recipe,) = blocks(page, "toml")
    (tmp_path / "recipe.toml").write_text(recipe, encoding="utf-8")
    told, default = load(str(tmp_path / "recipe.toml")).grid, Grid()
    for name in ("methods", "sweep_seeds", "seeds", "confidence"):
        assert getattr(told, name) == getattr(default, name)
    (rates,) = re.findall(r"`learning_rates = \[(.*?)\]`", page.read_text(encoding="utf-8"))
    assert [float(rate) for rate in rates.split(", ")] == list(default.learning_rates)


def test_the_fields_of_doratune_json_are_told():
    part = (ROOT / "docs" / "train.md").read_text(encoding="utf-8").partition("### `doratune.json`")[2]
    told = re.findall(r"^\| `(\w+)` \|", part.partition("\n## ")[0], re.MULTILINE)
    assert told == [field.name for field in dataclasses.fields(Information)]


def test_flags_of_commands_are_there(capsys):
    known = {}
    for page in PAGES:
        text = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
        for command, rest in re.findall(r"doratune ([a-z]+)\b(.*)", text):
            if command not in known:
                with pytest.raises(SystemExit):
                    main([command, "--help"])
                known[command] = set(re.findall(r"--[a-z0-9-]+", capsys.readouterr().out))
            flags = set(re.findall(r"--[a-z0-9-]+", rest.partition("#")[0]))
            assert flags <= known[command], (page.name, command)
    used = {"train", "generate", "predict", "evaluate", "inspect", "analyze", "merge", "convert"}
    assert set(known) == used | {"compare", "estimate", "bench"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        if name.startswith("http"):
            continue
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def anchors(page):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
