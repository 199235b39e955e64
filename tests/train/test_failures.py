"""What ends a run before its time: each with its cause, what to change, and the last good checkpoint."""

import errno
import io
import os
import resource
import shlex
import signal
import traceback
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import doratune as dt
from doratune.train import AdapterOptions, TrainConfig, last_checkpoint, train
from doratune.train.failures import explained, resume_command
from doratune.train.interruption import Interruption
from train.tiny import save_image_folder, save_model, save_vision_model, write_text


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assets")
    return save_model(folder / "model", layers=1), write_text(folder / "text.txt")


def config(assets, output, **values):
    options = {"max_length": 16, "steps": 6, "batch_size": 2, "learning_rate": 1e-2, "log_every": 1, "save_every": 2}
    adapter = AdapterOptions(rank=4)
    return TrainConfig(str(assets[0]), (str(assets[1]),), output, adapter=adapter, **{**options, **values})


def fails_with(error, tmp_path, **values):
    with pytest.raises(dt.AdapterError) as caught, explained(config(("m", "d"), tmp_path, **values), tmp_path):
        raise error
    return str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed: file write failed"),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["full", "quota", "torch", "safetensors"],
)
def test_a_full_disk(tmp_path, error):
    said = fails_with(error, tmp_path)
    assert f"writing to {tmp_path} failed" in said
    assert "MB are free). Make room, or name an output on another disk" in said
    assert "No checkpoint had been written yet" in said


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")])
def test_out_of_memory(tmp_path, error):
    said = fails_with(error, tmp_path)
    assert "out of memory" in said
    for advice in ("smaller batch_size (now 2)", "max_length (now 16)", "--gradient-checkpointing", "--quantize nf4"):
        assert advice in said
    said = fails_with(RuntimeError("DefaultCPUAllocator: can't allocate memory"), tmp_path, task="image-classification")
    assert "a smaller image_size" in said


def test_the_command_to_go_on_with_is_one_for_a_shell(tmp_path):
    found = shlex.split(resume_command(config(("m", "d"), tmp_path / "my run's")))
    assert found == ["doratune", "train", "--recipe", str(tmp_path / "my run's" / "recipe.toml"), "--resume"]


def test_workers_that_inherit_ctrl_c_say_nothing_about_it():
    screen = io.StringIO()
    interruption = Interruption(Console(file=screen))
    interruption.on_train_begin(SimpleNamespace(world_size=1), None, None)
    try:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(3 if screen.getvalue() else 0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        os.kill(os.getpid(), signal.SIGINT)
        assert "Stopping after this step" in screen.getvalue()
    finally:
        interruption.close()


def test_what_is_not_understood_passes(tmp_path):
    with pytest.raises(ZeroDivisionError), explained(config(("m", "d"), tmp_path), tmp_path):
        raise ZeroDivisionError
    assert "Are data and output still there?" in fails_with(FileNotFoundError(2, "gone"), tmp_path)


def run_on_a_disk_that_fills_up(options):
    """In a process of its own; 0 if the error was as it should be."""
    from doratune.train import trainer

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    mark_complete = trainer.mark_complete

    def then_full(folder):
        mark_complete(folder)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))

    trainer.mark_complete = then_full
    try:
        train(options, Console(quiet=True))
    except dt.AdapterError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(error)
        return 0 if "checkpoint-2 is the last good checkpoint; to go on from it" in str(error) else 3
    except BaseException:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        traceback.print_exc()
        return 4
    return 5


def test_a_disk_that_fills_up_while_a_checkpoint_is_written(assets, tmp_path):
    """The operating system refuses to write files beyond a size: checkpoint-4 cannot be written whole."""
    child = os.fork()
    if child == 0:
        os._exit(run_on_a_disk_that_fills_up(config(assets, tmp_path / "run")))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert last_checkpoint(tmp_path / "run" / "checkpoints").name == "checkpoint-2"
    assert train(config(assets, tmp_path / "run", resume=True), Console(quiet=True)).steps == 6


def test_a_loss_that_explodes_stops_the_run_and_keeps_the_last_checkpoint(assets, tmp_path, monkeypatch):
    from doratune.train.trainer import AdapterTrainer

    original = AdapterTrainer.compute_loss

    def explode(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        return loss * (1e3 if self.state.global_step >= 4 and self.model.training else 1)

    monkeypatch.setattr(AdapterTrainer, "compute_loss", explode)
    with pytest.raises(dt.AdapterError) as caught:
        train(config(assets, tmp_path / "run"), Console(quiet=True))
    for part in ("the loss has risen from 5.", "at step 5", "lower learning_rate", "checkpoint-4 is the last good"):
        assert part in str(caught.value)


def test_no_checkpoint_takes_weights_that_are_broken(assets, tmp_path, monkeypatch):
    """With one line of metrics at the end, the weights are NaN long before the loss is looked at."""
    from doratune.train.trainer import AdapterTrainer

    original = AdapterTrainer.training_step

    def poison(self, model, *args, **kwargs):
        if self.state.global_step == 3:
            with torch.no_grad():
                next(iter(dt.trainable_parameters(model).values())).fill_(float("nan"))
        return original(self, model, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "training_step", poison)
    with pytest.raises(
        dt.AdapterError, match=r"weights are NaN or infinite at step 4(.|\n)*checkpoint-2 is the last good"
    ):
        train(config(assets, tmp_path / "run", log_every=100), Console(quiet=True))


def test_data_that_vanish(tmp_path):
    import shutil

    save_vision_model(tmp_path / "vit")
    folder = save_image_folder(tmp_path / "images")
    options = config((tmp_path / "vit", folder), tmp_path / "run", task="image-classification", steps=40)

    class Vanish(Console):
        def print(self, *args, **kwargs):
            if "step 5/" in str(args):
                shutil.rmtree(folder)

    with pytest.raises(dt.AdapterError, match=r"it was there when the run began\n.*checkpoint-\d+ is the last good"):
        train(options, Vanish(quiet=True))


def interrupted(assets, output, number, monkeypatch, **values):
    from transformers import TrainerCallback

    import doratune.train.callbacks as module

    class Signal(module.MetricsFile, TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(module, "MetricsFile", Signal)
    screen = Console(file=io.StringIO(), width=300)
    with pytest.raises(KeyboardInterrupt) as caught:
        train(config(assets, output, **values), screen)
    assert caught.value.code == 128 + number
    monkeypatch.undo()
    return screen.file.getvalue()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(assets, tmp_path, number, monkeypatch):
    output = tmp_path / "run:100:"  # for rich an emoji
    before = signal.getsignal(signal.SIGINT)
    printed = interrupted(assets, output, number, monkeypatch, save_every=None)
    assert "Stopping after this step, with a checkpoint" in printed
    assert f"doratune train --recipe {output / 'recipe.toml'} --resume" in printed
    assert last_checkpoint(output / "checkpoints").name == "checkpoint-3"
    assert signal.getsignal(signal.SIGINT) is before
    resumed = train(config(assets, output, save_every=None, resume=True), Console(quiet=True))
    whole = train(config(assets, tmp_path / "whole", save_every=None), Console(quiet=True))
    assert resumed.loss_after == whole.loss_after


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("measurement", ["first", "last"])
def test_a_measurement_that_is_interrupted_says_how_to_go_on(assets, tmp_path, number, code, measurement, monkeypatch):
    from doratune.train.trainer import AdapterTrainer

    original = AdapterTrainer.evaluate

    def interrupt(self, *args, **kwargs):
        if (self.state.global_step == 0) == (measurement == "first"):
            os.kill(os.getpid(), number)
        return original(self, *args, **kwargs)

    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have it ignored in the background
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # not the default, which would end the tests
    monkeypatch.setattr(AdapterTrainer, "evaluate", interrupt)
    screen = Console(file=io.StringIO(), width=300)
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            train(config(assets, tmp_path / "run", save_every=200), screen)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    assert caught.value.code == code
    printed = screen.file.getvalue()
    if measurement == "first":
        assert "Interrupted. No checkpoint had been written yet." in printed
        return
    assert "checkpoint-6 is the last good checkpoint; to go on from it: doratune train --recipe" in printed
    assert not (tmp_path / "run" / "results.json").exists()
    monkeypatch.undo()
    assert train(config(assets, tmp_path / "run", save_every=200, resume=True), Console(quiet=True)).steps == 6


def test_the_command_that_is_named_goes_on(assets, tmp_path, monkeypatch, capsys):
    import shlex

    from doratune.cli import main

    printed = interrupted(assets, tmp_path / "run", signal.SIGINT, monkeypatch)
    command = shlex.split(printed[printed.index("doratune train") :].splitlines()[0])
    assert main([*command[1:], "--log-every", "2"]) == 0
    captured = capsys.readouterr()
    assert "other than when the run began: log_every was 1, is 2" in captured.err
    assert "6 steps" in captured.out
