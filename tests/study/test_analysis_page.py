import json

import pytest

from doratune.study.analysis import PAPER, Run, analyze
from doratune.study.analysis_page import page_of, sentence
from doratune.study.analysis_plots import correlations, shapes_of, shapes_told
from doratune.study.correlation import Correlation
from study.browser import browser, opened  # noqa: F401
from study.checkpoints_on_disk import LAYERS, base_weights, turned, write

STEPS = 4


@pytest.fixture(scope="module")
def analysis(tmp_path_factory):
    """Two runs: in one magnitude and direction go together, in the other against each other."""
    folder = tmp_path_factory.mktemp("runs")
    base = base_weights()
    write(folder / "base", {**base, "lm_head.weight": base_weights(seed=1)["model.layers.0.mlp.up_proj.weight"]})
    for sign in (1, -1):
        for step in range(1, STEPS + 1):
            after = {}
            for key, w in base.items():
                layer = int(key.split(".")[2])
                stretch = 0.01 * (layer + 1) if sign > 0 else 0.01 * (LAYERS - layer)
                after[key] = turned(w, 0.02 * (layer + 1) + 0.001 * step) * (1 + stretch)
            write(folder / f"run{sign:+d}" / f"checkpoint-{step}", after)
    return analyze(folder / "base", {"with <it>": folder / "run+1", "against": folder / "run-1"})


@pytest.fixture(scope="module")
def report(analysis, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    page_of(analysis, "doratune analyze base run").write(folder, analysis.as_json())
    return folder


def test_files_beside_the_page(report, analysis):
    names = {path.name for path in report.iterdir()}
    assert {"report.html", "numbers.json", "weights.csv", "correlations.csv", "correlations.png"} <= names
    assert {"scatter-0-0.svg", "scatter-1-1.png", "spectra-0.png", "depth-rank-1.svg"} <= names
    assert (report / "report.html").stat().st_size < 3e6
    numbers = json.loads((report / "numbers.json").read_text())
    run = numbers["runs"][0]
    assert len(run["points"]) == 2 * LAYERS * STEPS
    assert run["correlations"]["q_proj"]["value"] == analysis.runs[0].correlation("q_proj").value
    assert numbers["paper"] == PAPER
    rows = (report / "weights.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 2 * LAYERS


@pytest.mark.parametrize(("width", "theme"), [(1280, "light"), (390, "dark")])
def test_the_page_in_a_browser(report, opened, width, theme):  # noqa: F811
    found = opened(report / "report.html", width, theme)
    page = found.page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    plots = page.locator("figure svg")
    assert plots.count() == 1 + 2 * 2 + 2 * 3 + 2 * 3
    for box in (plot.bounding_box() for plot in plots.all()):
        assert box["height"] > 150
        assert 0 <= box["x"] < box["x"] + box["width"] <= width, "a part of the picture is out of sight"
    for name in ("scatter-0-0", "scatter-1-1"):
        assert page.locator(f'[data-plot="{name}"] [data-tip]').count() == LAYERS * STEPS
    assert len(set(found.column("correlations", 0))) == 2
    assert "with <it>: r = " in page.locator(".lead").inner_text()
    assert found.complaints == []
    assert len(found.requests) == 1


def test_weights_sort_and_marks_tell(report, opened):  # noqa: F811
    found = opened(report / "report.html")
    found.sort("weights", 5)
    values = [float(text.replace("−", "-")) for text in found.column("weights", 5)]
    assert values == sorted(values, reverse=True)
    assert "layers.5" in found.column("weights", 1)[0]
    found.page.locator('[data-table="weights"] input').fill("against q_proj")
    assert len(found.column("weights", 0)) == LAYERS
    mark = found.page.locator('[data-plot="scatter-0-0"] [data-tip]').last  # nothing lies on it
    mark.hover()
    told = found.page.locator("#tip").inner_text()
    for part in ("model.layers.", "step ", "ΔM", "ΔD", "% of the change is magnitude"):
        assert part in told
    assert found.complaints == []


def test_sentences_say_no_more_than_the_interval():
    run = type("Run", (), {"label": "x", "is_unchanged": False})
    told = {
        sentence(run, Correlation(value, low, high, 1.0, 0.0, 24, 6))
        for value, low, high in [(0.5, 0.2, 0.8), (-0.5, -0.8, -0.2), (0.1, -0.3, 0.5), (0.9, None, None), (None,) * 3]
    }
    assert told == {
        "x: r = +0.50 [+0.20, +0.80], weights that turn more change length more.",
        "x: r = −0.50 [−0.80, −0.20], weights that turn more change length less.",
        "x: r = +0.10 [−0.30, +0.50], the interval holds 0, so neither sign is shown.",
        "x: r = +0.90, too few layers for an interval.",
        "x: no correlation, as ΔM or ΔD is the same for all weights of a kind.",
    }
    few = Correlation(None, None, None, None, None, 2, 2)
    assert sentence(run, few) == sentence(run, None) == "x: no correlation, as there are too few weights that changed."


def test_a_page_of_a_single_checkpoint_that_changed_nothing(tmp_path):
    write(tmp_path / "base", base_weights())
    same = analyze(tmp_path / "base", {"same": tmp_path / "base"})
    page_of(same).write(tmp_path / "report", same.as_json())
    assert "same: nothing changed, " in (tmp_path / "report" / "report.html").read_text()


def test_a_change_of_0_is_told_where_the_axis_has_no_0(tmp_path):
    weights = base_weights()
    tuned = {key: turned(w, 0.1).float() for key, w in weights.items()}
    tuned["model.layers.2.mlp.up_proj.weight"] = -weights["model.layers.2.mlp.up_proj.weight"]
    found = analyze(write(tmp_path / "base", weights), {"x": write(tmp_path / "tuned", tuned)})
    page = page_of(found).write(tmp_path / "page", found.as_json())
    assert "<figcaption>Not drawn, as a logarithmic axis has no 0: 1 of the weights." in page.read_text("utf-8")


def test_shapes_of_few_and_of_many_layers():
    few = shapes_of([f"layers.{i}" for i in (10, 2, 9)])
    assert list(few) == ["layers.2", "layers.9", "layers.10"]
    assert len(set(few.values())) == 3
    many = shapes_of([f"layers.{i}" for i in range(30)])
    assert len(set(many.values())) == 12
    assert shapes_told(list(many)).startswith("● 0 to 2, ■ 3 to 4")


def test_ten_runs_have_ten_colours():
    one = Correlation(0.5, 0.2, 0.8, 1.0, 0.0, 24, 6)
    runs = [Run(f"run {i}", "dora", ["last"]) for i in range(10)]
    axes = correlations(runs, {run.label: {"q_proj": one} for run in runs}).figure.axes[0]
    handles, _ = axes.get_legend_handles_labels()
    assert len({handle.get_color() for handle in handles}) == 10
