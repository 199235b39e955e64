import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from doratune.train import callbacks
from doratune.train.callbacks import Progress, seen


def test_speed_leaves_out_the_time_that_held_out_data_took(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: clock[0])
    args = SimpleNamespace(
        train_batch_size=4, gradient_accumulation_steps=2, world_size=1, device=SimpleNamespace(type="cpu")
    )
    state = SimpleNamespace(global_step=10, max_steps=20, epoch=1.0)  # a resumed run
    screen = io.StringIO()
    bar = Progress(Console(file=screen, width=200), "images", 80, {"eval_loss": 2.0, "eval_accuracy": 0.25})
    bar.on_train_begin(args, state, None)
    clock[0], state.global_step, state.epoch = 5.0, 15, 1.5
    bar.on_log(args, state, None, {"loss": 1.5})
    told = "step 15/20  0:00:05 left  loss 1.500  held-out 2.000  accuracy 25.0%  8.0 images/s"
    assert told in screen.getvalue()
    clock[0] = 25.0
    bar.on_log(args, state, None, {"eval_loss": 1.0, "eval_runtime": 20.0})
    assert bar.speed(args, state) == pytest.approx(8.0)
    assert bar.held_out == ["held-out 1.000"]
    bar.on_train_end(args, state, None)


def test_a_narrow_terminal_shows_the_time_that_is_left(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: clock[0])
    args = SimpleNamespace(device=SimpleNamespace(type="cpu"))
    state = SimpleNamespace(global_step=0, max_steps=1200, num_input_tokens_seen=0)
    screen = io.StringIO()
    console = Console(file=screen, width=60, force_terminal=True, color_system=None)
    bar = Progress(console, "tokens", None, {"eval_loss": 2.0})
    bar.on_train_begin(args, state, None)
    clock[0], state.global_step, state.num_input_tokens_seen = 100.0, 600, 12_345_678
    bar.on_log(args, state, None, {"loss": 1.5})
    bar.on_step_end(args, state, None)
    bar.bar.refresh()
    bar.close()
    assert "step 600/1200  0:01:40 left  loss 1.500  held-out 2.000" in screen.getvalue()


@pytest.mark.parametrize(
    ("processes", "accumulation", "found"),
    # 36 texts: batches of 16, 16 and 4, in two epochs
    [(1, 1, [16, 32, 36, 52, 68, 72]), (1, 2, [32, 36, 68, 72]), (2, 1, [32, 36, 68, 72]), (2, 2, [36, 72])],
)
def test_no_text_is_counted_that_does_not_exist(processes, accumulation, found):
    args = SimpleNamespace(train_batch_size=16, gradient_accumulation_steps=accumulation, world_size=processes)
    in_epoch = {1: 3, 2: 2}[processes]
    ends = [min(step * accumulation, in_epoch) / in_epoch for step in range(1, len(found) // 2 + 1)]
    epochs = [0, *ends, *(1 + end for end in ends)]
    states = [SimpleNamespace(global_step=step, epoch=epoch) for step, epoch in enumerate(epochs)]
    assert [seen("texts", 36, args, state) for state in states] == [0, *found]
