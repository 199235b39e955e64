import json
import logging
import os
import shutil

import pytest
import torch

import doratune as dt
from doratune.checkpoint import adapter_tensors
from doratune.targets import adapted_layers
from doratune.train.checkpoints import (
    is_complete,
    last_checkpoint,
    mark_complete,
    remove_incomplete,
    restore_adapter,
    rotate,
)
from train.tiny import llama


def write(folder, step, complete=True, time=None):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "weights").write_bytes(b"12345")
    if complete:
        mark_complete(path)
        if time:
            os.utime(path / "complete.json", (time, time))
    return path


def test_the_last_complete_checkpoint_is_found_by_number(tmp_path, caplog):
    for step in (9, 10, 100):
        write(tmp_path, step, complete=step < 100)
    with caplog.at_level(logging.WARNING, "doratune"):
        assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert "checkpoint-100 has no completion marker" in caplog.text


def test_no_folder_and_no_complete_checkpoint_give_none(tmp_path):
    assert last_checkpoint(tmp_path / "absent") is None
    write(tmp_path, 1, complete=False)
    assert last_checkpoint(tmp_path) is None


@pytest.mark.parametrize("damage", ["truncate", "delete", "cut marker", "foreign marker"])
def test_damage_after_the_marker_is_seen(tmp_path, damage):
    path = write(tmp_path, 1)
    assert is_complete(path)
    if damage == "truncate":
        (path / "weights").write_bytes(b"123")
    elif damage == "delete":
        (path / "weights").unlink()
    elif damage == "cut marker":
        (path / "complete.json").write_text('{"files": {"wei')
    else:
        (path / "complete.json").write_text(json.dumps([1]))
    assert not is_complete(path)


def test_rotation_counts_complete_checkpoints_only(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step, time=1000 + step)
    write(tmp_path, 4, complete=False)
    rotate(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


def test_rotation_keeps_the_best_and_the_newest_by_time(tmp_path):
    # checkpoint-9 is left from an earlier run in the same folder.
    for step, time in ((9, 1000), (1, 1001), (2, 1002), (3, 1003)):
        write(tmp_path, step, time=time)
    rotate(tmp_path, keep=1, best=str(tmp_path / "checkpoint-1"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3"]


def test_what_was_cut_short_is_removed(tmp_path):
    write(tmp_path, 1), write(tmp_path, 2, complete=False)
    (tmp_path / "other").mkdir()
    assert remove_incomplete(tmp_path) == [tmp_path / "checkpoint-2"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "other"]


@pytest.mark.parametrize("keep", [None, 0])
def test_without_a_limit_nothing_is_deleted(tmp_path, keep):
    write(tmp_path, 1), write(tmp_path, 2)
    rotate(tmp_path, keep=keep)
    assert len(list(tmp_path.iterdir())) == 2


def moved(config, seed):
    model = dt.attach(llama(), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in dt.trainable_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.mark.parametrize(
    "config",
    [
        dt.AdapterConfig(rank=4),
        dt.AdapterConfig(rank=4, method="lora"),
        dt.AdapterConfig(rank=0),
        dt.AdapterConfig(rank=4, modules_to_save=["norm"], rank_pattern={"q_proj": 0, "v_proj": 2}),
    ],
    ids=["dora", "lora", "magnitude", "mixed"],
)
def test_restoring_is_exact_and_in_place(tmp_path, config):
    first, second = moved(config, 1), moved(config, 2)
    dt.save_adapter(first, tmp_path)
    parameters = dt.trainable_parameters(second)
    state = torch.get_rng_state()
    restore_adapter(second, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert dt.adapter_names(second) == ["default"]
    assert dt.active_adapter(second) == "default"
    for name, parameter in dt.trainable_parameters(second).items():
        assert parameter is parameters[name], "an optimiser would go on with another tensor"
        assert torch.equal(parameter, dt.trainable_parameters(first)[name]), name
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(first(ids).logits, second(ids).logits)


def test_zero_rows_come_back_exactly(tmp_path):
    first, second = llama(), llama()
    for model in (first, second):
        model.model.layers[0].mlp.up_proj.weight.data[3] = 0
        dt.attach(model, dt.AdapterConfig(rank=2))
    with torch.no_grad():
        for layer in adapted_layers(first).values():
            layer.lora_B["default"].normal_()
    dt.save_adapter(first, tmp_path)
    restore_adapter(second, tmp_path)
    one, other = adapter_tensors(first), adapter_tensors(second)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_an_adapter_of_another_rank_is_refused_and_nothing_changes(tmp_path):
    dt.save_adapter(moved(dt.AdapterConfig(rank=8), 1), tmp_path)
    model = moved(dt.AdapterConfig(rank=4), 2)
    before = {name: p.clone() for name, p in dt.trainable_parameters(model).items()}
    with pytest.raises(dt.AdapterError, match=r"adapter of another kind") as caught:
        restore_adapter(model, tmp_path)
    assert "(14 problems):" in str(caught.value)
    assert "and 4 more" in str(caught.value)
    assert before.keys() == dt.trainable_parameters(model).keys()
    assert all(torch.equal(p, before[n]) for n, p in dt.trainable_parameters(model).items())


def test_an_adapter_at_another_scale_is_refused(tmp_path):
    dt.save_adapter(moved(dt.AdapterConfig(rank=4, alpha=8), 1), tmp_path)
    with pytest.raises(dt.AdapterError, match=r"adapter has dora of rank 4, scaled by 4, the checkpoint .* by 2"):
        restore_adapter(moved(dt.AdapterConfig(rank=4, alpha=16), 2), tmp_path)


def test_a_broken_file_is_refused_and_the_model_unchanged(tmp_path):
    model = moved(dt.AdapterConfig(rank=4), 1)
    dt.save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(dt.AdapterError, match="truncated"):
        restore_adapter(model, tmp_path)
    assert dt.adapter_names(model) == ["default"]
    shutil.rmtree(tmp_path)
    with pytest.raises(dt.AdapterError, match="does not exist"):
        restore_adapter(model, tmp_path)


def test_restoring_needs_an_adapter(tmp_path):
    with pytest.raises(dt.AdapterError, match="no adapter is active"):
        restore_adapter(llama(), tmp_path)
