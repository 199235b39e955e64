from types import SimpleNamespace

from bench.contestants import DORA, FROZEN, FULL, LORA
from bench.plots import lines
from matplotlib.figure import Figure


def test_title_and_legend_of_a_single_sweep_lie_inside_the_picture(tmp_path, monkeypatch):
    names = [FROZEN, LORA, DORA, "PEFT LoRA float32", "PEFT DoRA float32, accelerated", "LyCORIS DoRA", FULL]
    entries = [{"name": name, "timing": {"ratio": 1.0 + i}} for i, name in enumerate(names)]
    points = [{"shape": {"rank": rank, "tokens": 64}, "entries": entries} for rank in (4, 8)]
    record = SimpleNamespace(
        groups=lambda: {"rank": points},
        title="Forward and backward of one linear layer",
        machine={"cores": 2},
        settings={"dtype": "float32"},
        date="2026-11-26",
    )
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure) or save(figure, path))
    lines(record, tmp_path / "x.png")
    (figure,) = drawn
    for part in (figure.legends[0], figure._suptitle):
        extent = part.get_window_extent()
        assert figure.bbox.x0 <= extent.x0 < extent.x1 <= figure.bbox.x1
