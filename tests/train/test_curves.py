import pytest

from doratune.train.curves import _smooth, draw_curves


def test_a_picture_is_drawn_of_runs_of_any_length(tmp_path):
    measured = {"step": 0, "eval_loss": 3.0, "eval_accuracy": 0.5}
    long = [{"step": s, "loss": 3 - s / 100} for s in range(50)] + [measured]
    draw_curves({"a": long, "b": [], "c": long[:1]}, tmp_path / "x.png", "title")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_too_short_for_a_training_loss_has_no_empty_picture_of_it(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path: drawn.append(figure))
    draw_curves({"a": [{"step": 0, "eval_loss": 3.0}, {"step": 4, "eval_loss": 2.0}]}, tmp_path / "x.png", "title")
    assert [axes.get_title() for axes in drawn[0].axes] == ["held-out loss"]


def test_the_running_mean_is_not_pulled_to_zero():
    assert _smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert _smooth([]) == []
