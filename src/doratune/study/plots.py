"""How plots look, and how one figure becomes a PNG, an SVG and a part of a page that is light or dark."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree

from doratune.extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, FAINT, GROUND = "#1b1f27", "#5d6573", "#d5d9e0", "#fdfdfc"
"""Text and axes, what stands back, grid lines, and the ground; in a page they follow its theme."""
_THEMED = {INK: "var(--ink)", MUTED: "var(--muted)", FAINT: "var(--faint)", GROUND: "var(--paper)"}
COLOURS = ("#3a7fc8", "#d9772b", "#2d9c78", "#9a68cc", "#cf4d63", "#82868f")
"""Of things that have no order: told apart by most eyes, on white and on black."""
_ORDERED = ("#4a79d6", "#8b65cb", "#cf5699", "#e4704d", "#dfa030")
MARKERS = {
    "o": "●",
    "s": "■",
    "^": "▲",
    "D": "◆",
    "v": "▼",
    "P": "✚",
    "X": "✖",
    "<": "◀",
    ">": "▶",
    "p": "⬟",
    "h": "⬢",
    "*": "★",
}
"""matplotlib's shapes, as text has them."""

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


class Tip(NamedTuple):
    """What is shown when the mouse rests on a mark."""

    text: str
    group: str = ""
    """Marks of one group, in all plots of a page, light up together."""


Tips = Mapping[str, Sequence[Tip]]
"""By an artist's gid: one for each of its marks, in their order."""

_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-3, 4),
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.facecolor": GROUND,
    "svg.fonttype": "none",
    "svg.hashsalt": "doratune",
    "svg.id": None,
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Figures made inside look like the project's.

    Raises:
        AdapterError: if matplotlib is not installed.
    """
    with require("matplotlib", "study").rc_context(_STYLE):
        yield


def new_figure(width: float = 4.0, height: float = 3.1) -> tuple[Figure, Any]:
    """A figure of so many inches and its axes; without pyplot, so nothing has to be closed."""
    figure = require("matplotlib.figure", "study").Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def unordered_colours(count: int) -> list[str]:
    """Colours of so many things that have no order; of more than the project has, tab20's, the strong ones first."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    found = require("matplotlib", "study").colormaps["tab20"].colors
    to_hex = require("matplotlib.colors", "study").to_hex
    every = [to_hex(colour) for colour in (*found[::2], *found[1::2])]  # each strong one is followed by its light one
    return [every[index % len(every)] for index in range(count)]


def ordered_colours(count: int) -> list[str]:
    """Colours for steps of time: blue, purple, red, amber, equally readable on white and black."""
    colours = require("matplotlib.colors", "study")
    ramp = colours.LinearSegmentedColormap.from_list("steps", _ORDERED)
    return [colours.to_hex(ramp(i / max(1, count - 1))) for i in range(count)]


def log_scale(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers at 1, 2 and 5: also where it spans less than a decade."""
    ticker = require("matplotlib.ticker", "study")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))  # mathematics takes long to set
    axes.yaxis.set_minor_locator(ticker.NullLocator())


def legend_outside(figure: Figure, axes: Axes, columns: int = 5) -> None:
    """Put the legend below the axes, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=min(columns, len(handles)),
            handlelength=1,
            handletextpad=0.4,
            columnspacing=1.0,
        )


def as_svg(figure: Figure) -> str:
    """The figure as an SVG file; it is laid out here, and not again when it is drawn once more."""
    buffer = io.StringIO()
    with style():
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    figure.set_layout_engine("none")
    return buffer.getvalue()


def save_png(figure: Figure, path: Path) -> None:
    """Draw the figure at 200 dots an inch."""
    with style():
        figure.savefig(path, dpi=200)


def themed_svg(svg: str, name: str, label: str, tips: Tips, texts: dict[str, int]) -> str:
    """The figure as an ``<svg>`` for a page: its theme's colours, as wide as there is room, tips on its marks.

    Args:
        svg: of a figure made inside ``style()``.
        name: what its ids begin with.
        label: what it shows, for those who do not see it.
        tips: on its marks.
        texts: numbers of all tips' texts, to which new ones are added; marks refer to them.
    """
    root = ElementTree.fromstring(svg)
    for key in ("width", "height"):
        root.attrib.pop(key, None)
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    root.set("role", "img")
    root.set("aria-label", label)
    by_id = {element.get("id"): element for element in root.iter()}
    for gid, marks in tips.items():
        for element, tip in zip(_marks(by_id[gid]), marks, strict=True):
            element.set("data-tip", str(texts.setdefault(tip.text, len(texts))))
            if tip.group:
                element.set("data-group", tip.group)
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    text = ElementTree.tostring(root, encoding="unicode")
    for colour, variable in _THEMED.items():
        text = text.replace(colour, variable)
    # Of coordinates hundredths of a point are enough, and half the size; what is written stays as it is.
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\g<1>", tag[0]), text)
    # Several figures share a page: what one refers to by id has to be its own.
    return re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", text)


def _marks(element: ElementTree.Element) -> list[ElementTree.Element]:
    """What is drawn of an artist, without the shapes that are only defined."""
    found = []
    for child in element:
        if child.tag == f"{{{_SVG}}}defs":
            continue
        if child.tag in (f"{{{_SVG}}}use", f"{{{_SVG}}}path"):
            found.append(child)
        found.extend(_marks(child))
    return found
