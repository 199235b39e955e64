import csv
import json
import re

import pytest

import doratune as dt
from doratune.study.page import Column, Heading, Page, Plot, Table, Text
from doratune.study.plots import Tip, as_svg, new_figure, ordered_colours, style, themed_svg, unordered_colours
from study.browser import browser, opened  # noqa: F401


def example():
    page = Page(
        "A title", "Found <this> & that.", [("base", "b/&")], [("a label", "1.0", "beside")], footer="made here"
    )
    for number in range(2):
        with style():
            figure, axes = new_figure()
            axes.scatter([1, 2, 3], [3, 1, 2], c=ordered_colours(3), gid="marks")
            axes.scatter([2], [2], marker="s", gid="one")
            axes.plot([1, 3], [1, 3])
            axes.set_title("A plot")
        tips = {"marks": [Tip(f"layer {i}\nvalue {i}", f"layer-{i}") for i in range(3)], "one": [Tip("alone")]}
        page.section(f"Plots {number}", "What they show.").add(Plot(f"plot-{number}", figure, "A caption.", tips))
    columns = [Column("name"), Column("value", ".2f", "what it is"), Column("count", ",d")]
    rows = [["b 10", 2.0, 1], ["b 9", -10.0, 30], ["<a>", float("nan"), None], ["c", 0.5, 4000]]
    table = Table("values", columns, rows, "Some values", searchable=True, groups=["layer-0", "layer-1", "", "layer-2"])
    page.section("Tables").add(Heading("Values"), table, Text("Left out", ["one: <why>", "two"]), Text("A last word."))
    return page


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The page on disk, to be looked at."""
    return example().write(tmp_path_factory.mktemp("page"), {})


def test_files_and_their_numbers(tmp_path):
    folder = tmp_path / "report"
    assert example().write(folder, {"r": [1.0, float("nan")], "t": (float("inf"), 2)}) == folder / "report.html"
    names = {path.name for path in folder.iterdir()}
    plots = {f"plot-{n}.{kind}" for n in range(2) for kind in ("png", "svg")}
    assert names == {"report.html", "numbers.json", "values.csv", *plots}
    assert json.loads((folder / "numbers.json").read_text()) == {"r": [1.0, None], "t": [None, 2]}
    with (folder / "values.csv").open() as file:
        assert list(csv.reader(file))[1:3] == [["b 10", "2", "1"], ["b 9", "-10", "30"]]
    first = (folder / "report.html").read_text()
    assert "Found &lt;this&gt; &amp; that." in first
    assert "http" not in first.replace("http://www.w3.org/", ""), "something is fetched"
    example().write(folder, {})  # replaces
    assert (folder / "report.html").read_text() == first, "the same content gives the same page"


def test_files_of_an_earlier_report_go_and_others_stay(tmp_path, monkeypatch):
    example().write(tmp_path, {})
    for name in ("mine.png", "plot-7.svg", "notes.csv"):
        (tmp_path / name).touch()
    smaller = example()
    del smaller.sections[1:]
    with monkeypatch.context() as patch:
        patch.setattr("doratune.files._publish", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(dt.AdapterError, match="cannot write the report"):
            smaller.write(tmp_path, {})
    assert (tmp_path / "plot-1.png").is_file(), "the earlier report is whole as long as there is no new one"
    smaller.write(tmp_path, {})
    expected = {"report.html", "numbers.json", "plot-0.png", "plot-0.svg", "mine.png", "plot-7.svg", "notes.csv"}
    assert {path.name for path in tmp_path.iterdir()} == expected


def test_a_folder_that_holds_something_else(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(dt.AdapterError, match="is not empty and holds no report"):
        example().write(tmp_path, {})
    with pytest.raises(dt.AdapterError, match="is a file"):
        example().write(tmp_path / "thesis.txt", {})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_tips_have_to_fit_their_marks():
    with style():
        figure, axes = new_figure()
        axes.scatter([1, 2], [1, 2], gid="marks")
    with pytest.raises(ValueError, match="zip"):
        themed_svg(as_svg(figure), "p", "a plot", {"marks": [Tip("only one")]}, {})


def test_what_is_written_in_a_figure_stays_as_it_is():
    ticks = [0.0, 0.005, 0.01, 0.0125, 1.2345]
    with style():
        figure, axes = new_figure()
        axes.scatter([0.1], [0.1])
        axes.set_xticks(ticks, [f"{tick:.4f}" for tick in ticks])
        axes.set_title("costs $\\x$ and $5")
    svg = themed_svg(as_svg(figure), "p", 'say "a"', {}, {})
    assert 'aria-label="say &quot;a&quot;"' in svg
    assert "costs $\\x$ and $5</text>" in svg
    for tick in ticks:
        assert f">{tick:.4f}</text>" in svg
    places = re.findall(r' x="([\d.]+)"', svg)
    assert places
    assert all(len(place.partition(".")[2]) <= 2 for place in places), "coordinates are short"


READ = "[...document.querySelectorAll('figure svg text')].map(e => e.getBoundingClientRect().height)"


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_in_a_browser(written, opened, width, theme):  # noqa: F811
    found = opened(written, width, theme)
    page = found.page
    for plot in page.locator("figure svg").all():
        box = plot.bounding_box()
        assert box["width"] > 250
        assert box["height"] > 150
        assert box["x"] + box["width"] <= width
    assert page.locator("figure svg").count() == 2
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    sizes = page.evaluate(READ)
    assert min(sizes) > 9, "text in plots is too small to read"
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    ink, paper = ("27", "253") if theme == "light" else ("230", "20")
    title = page.locator("figure svg text", has_text="A plot").first
    assert title.evaluate("e => getComputedStyle(e).fill").startswith(f"rgb({ink},")
    page.locator("#theme").click()
    assert not page.evaluate("getComputedStyle(document.body).backgroundColor").startswith(f"rgb({paper},")
    assert found.complaints == []
    assert len(found.requests) == 1, "the page asks for something else than itself"


def test_sorting_and_searching(written, opened):  # noqa: F811
    found = opened(written)
    assert found.column("values", 0) == ["b 10", "b 9", "<a>", "c"]
    found.sort("values", 1)
    assert found.column("values", 1) == ["2.00", "0.50", "−10.00", "–"]
    found.sort("values", 1)
    assert found.column("values", 1) == ["−10.00", "0.50", "2.00", "–"]
    found.sort("values", 2)
    assert found.column("values", 2) == ["4,000", "30", "1", "–"]
    found.sort("values", 0)
    assert found.column("values", 0) == ["<a>", "b 9", "b 10", "c"]
    heads = found.page.locator("th").evaluate_all("heads => heads.map(h => h.ariaSort)")
    assert heads == ["ascending", "none", "none"]
    found.page.locator("input[type=search]").fill("B 2.0")
    assert found.column("values", 0) == ["b 10"]
    assert found.complaints == []


def test_a_mark_tells_what_it_is_and_lights_its_group(written, opened):  # noqa: F811
    found = opened(written)
    marks = found.page.locator('[data-plot="plot-0"] [data-group="layer-1"]')
    marks.first.hover()
    tip = found.page.locator("#tip")
    assert tip.inner_text() == "layer 1\nvalue 1"
    assert found.page.locator(".lit").count() == 3, "in both plots and in the table"
    found.page.mouse.move(2, 2)
    assert tip.is_hidden()
    assert found.page.locator(".lit").count() == 0
    found.page.locator('[data-plot="plot-1"] [data-tip]:not([data-group])').hover()
    assert tip.inner_text() == "alone"
    assert found.complaints == []


@pytest.mark.parametrize("count", [1, 6, 7, 20])
def test_each_of_many_has_a_colour_of_its_own(count):
    assert len(set(unordered_colours(count))) == count


def test_of_more_than_there_are_colours_they_begin_again():
    assert len(unordered_colours(45)) == 45
