"""Adapters written and read here: the same parameters, the same options, clean keys whatever wraps the model."""

from __future__ import annotations

import copy
import json
import os
import pathlib

import peft
import pytest
import torch
from torch import nn

import doratune as dt
from doratune.checkpoint import adapter_tensors
from doratune.targets import adapted_layers, saved_modules
from file_helpers import (
    assert_unchanged,
    build,
    load_peft,
    metadata,
    move,
    options,
    output,
    state,
    tensors,
)

CONFIG = dt.AdapterConfig(rank=2, alpha=3, targets=["body", "lin", "embed"], modules_to_save=["head"])


@pytest.fixture
def base():
    return build("mlp")


@pytest.fixture
def model(base):
    return move(dt.attach(copy.deepcopy(base), CONFIG))


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "lora"},
        {"rank_stabilized": True, "norm_gradient": "exact", "init": "gaussian", "dropout": 0.25},
        {"bias": "lora_only", "rank_pattern": {"body": 3, "embed": 0}, "alpha_pattern": {"lin": 1.5}},
        {"bias": "all", "modules_to_save": []},
        {"rank": 0},
    ],
    ids=str,
)
def test_parameters_and_options_come_back(fields, base, tmp_path):
    config = dt.AdapterConfig(**{"rank": 2, "targets": ["body", "lin", "embed"], "modules_to_save": ["head"], **fields})
    model = move(dt.attach(copy.deepcopy(base), config))
    dt.save_adapter(model, tmp_path)
    again = dt.load_adapter(copy.deepcopy(base), tmp_path, trainable=True)
    before, after = dt.trainable_parameters(model), dt.trainable_parameters(again)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(output(again), output(model))
    for path, layer in adapted_layers(again).items():
        found, expected = layer.adapters["default"], adapted_layers(model)[path].adapters["default"]
        assert (found.rank, found.scale, found.trainable) == (expected.rank, expected.scale, True)
        for option in ("method", "dropout", "init", "norm_gradient", "bias", "rank_stabilized", "modules_to_save"):
            assert getattr(found.config, option) == getattr(expected.config, option), option
    dt.save_adapter(again, tmp_path / "again")
    assert tensors(tmp_path / "again").keys() == tensors(tmp_path).keys()
    assert metadata(tmp_path / "again") == metadata(tmp_path)


def test_a_frozen_adapter_is_frozen_and_a_trainable_one_trains(base, model, tmp_path):
    dt.save_adapter(model, tmp_path)
    frozen = dt.load_adapter(copy.deepcopy(base), tmp_path)
    assert not dt.trainable_parameters(frozen)
    dt.load_adapter(frozen, tmp_path, "second", trainable=True)
    assert all(".second" in name for name in dt.trainable_parameters(frozen))
    dt.set_adapter(frozen, "default")
    assert not dt.trainable_parameters(frozen)


def test_a_loaded_adapter_gives_the_base_back(base, model, tmp_path):
    dt.save_adapter(model, tmp_path)
    loaded = dt.load_adapter(copy.deepcopy(base), tmp_path)
    with dt.disabled(loaded):
        assert torch.equal(output(loaded), output(base))
    dt.detach(loaded)
    assert torch.equal(output(loaded), output(base))
    assert all(p.requires_grad for p in loaded.parameters())


def test_the_folder_may_be_a_string_and_a_path_like(base, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dt.save_adapter(model, "here/adapter")
    dt.load_adapter(base, os.fspath(pathlib.Path("here") / "adapter"))
    assert torch.equal(output(base), output(model))


def test_buffers_of_saved_modules_come_back(base, tmp_path):
    model = dt.attach(copy.deepcopy(base), CONFIG)
    model.train()
    for _ in range(3):
        output(model)
    model.eval()
    dt.save_adapter(model, tmp_path)
    again = dt.load_adapter(copy.deepcopy(base), tmp_path)
    assert tensors(tmp_path)["base_model.model.head.1.num_batches_tracked"] == 3
    assert torch.equal(output(again), output(model))
    assert base.head[1].num_batches_tracked == 0


def test_training_goes_on_where_it_was_left(base, tmp_path):
    def train(model, steps):
        optimizer = torch.optim.SGD(dt.trainable_parameters(model).values(), lr=0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            output(model).square().mean().backward()
            optimizer.step()
        return model

    model = train(dt.attach(copy.deepcopy(base), CONFIG), 2)
    dt.save_adapter(model, tmp_path)
    train(model, 2)
    again = train(dt.load_adapter(copy.deepcopy(base), tmp_path, trainable=True), 2)
    assert all(torch.equal(p, dt.trainable_parameters(model)[n]) for n, p in dt.trainable_parameters(again).items())


# Models in wrappers


class Parallel(nn.parallel.DistributedDataParallel):
    """DistributedDataParallel without processes."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module

    def forward(self, *args):
        return self.module(*args)


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_inside(model):
    model.body = torch.compile(model.body, backend="eager")
    model.layers[1]["lin"] = torch.compile(model.layers[1]["lin"], backend="eager")
    return model


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


WRAPPERS = {
    "compiled": compiled,
    "compiled in place": compiled_in_place,
    "parallel": Parallel,
    "both": lambda model: Parallel(compiled(model)),
    "both, the other way": lambda model: compiled(Parallel(model)),
    "compiled inside": compiled_inside,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models_save_and_load_with_clean_keys(wrapper, base, model, tmp_path):
    dt.save_adapter(model, tmp_path / "plain")
    wrapped = WRAPPERS[wrapper](model)
    dt.save_adapter(wrapped, tmp_path / "wrapped")
    plain, found = tensors(tmp_path / "plain"), tensors(tmp_path / "wrapped")
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[key], plain[key]) for key in plain)
    assert options(tmp_path / "wrapped") == options(tmp_path / "plain")

    again = WRAPPERS[wrapper](copy.deepcopy(base))
    assert dt.load_adapter(again, tmp_path / "wrapped") is again
    dt.save_adapter(again, tmp_path / "again")
    assert tensors(tmp_path / "again").keys() == plain.keys()
    with torch.compiler.set_stance("force_eager"):
        for other in (again, load_peft(base, tmp_path / "again")):
            torch.testing.assert_close(output(other), output(wrapped), rtol=1e-5, atol=1e-5)


def test_a_failure_leaves_a_wrapped_model_as_it_was(base, model, tmp_path):
    dt.save_adapter(model, tmp_path)
    other = compiled(build("llama"))
    before = state(other)
    with pytest.raises(dt.AdapterError):
        dt.load_adapter(other, tmp_path)
    assert_unchanged(other, before)


# Keys and values


def test_the_tensors_are_copies(model):
    found = adapter_tensors(model)
    before = {key: tensor.clone() for key, tensor in found.items()}
    move(model, seed=9)
    assert all(torch.equal(found[key], before[key]) for key in found)
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in found.values())


def test_shapes_and_keys_are_those_of_the_format(model):
    shapes = {key.removeprefix("base_model.model."): tuple(t.shape) for key, t in adapter_tensors(model).items()}
    assert shapes["body.lora_A.weight"] == (2, 8)
    assert shapes["body.lora_B.weight"] == (6, 2)
    assert shapes["body.lora_magnitude_vector"] == (6,)
    assert shapes["embed.lora_embedding_A"] == (2, 61)
    assert shapes["embed.lora_embedding_B"] == (8, 2)
    assert shapes["embed.lora_magnitude_vector"] == (8,)
    assert shapes["head.0.weight"] == (5, 6)
    assert len(shapes) == 3 * 5 + 7


def test_a_model_moved_to_bf16_saves_its_float32_masters(base, tmp_path):
    model = move(dt.attach(copy.deepcopy(base), dt.AdapterConfig(rank=2, targets=["body"])))
    before = adapter_tensors(model)
    found = adapter_tensors(model.to(torch.bfloat16))
    assert all(torch.equal(found[key], before[key]) and found[key].dtype == torch.float32 for key in before)


def test_shared_weights_and_shared_modules_are_written_once(tmp_path):
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first
            self.third = nn.Linear(4, 4)
            self.third.weight = self.first.weight

        def forward(self, x):
            return self.third(self.second(self.first(x)))

    base = Shared()
    model = move(dt.attach(copy.deepcopy(base), dt.AdapterConfig(rank=2)))
    dt.save_adapter(model, tmp_path)
    assert {key.split(".")[2] for key in tensors(tmp_path)} == {"first", "third"}
    x = torch.randn(3, 4)
    assert torch.equal(dt.load_adapter(copy.deepcopy(base), tmp_path)(x), model(x))


def test_tied_parameters_inside_a_saved_module(tmp_path):
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    base = nn.ModuleDict({"q": nn.Linear(4, 4), "head": Head()})
    model = move(dt.attach(copy.deepcopy(base), dt.AdapterConfig(rank=2, targets=["q"], modules_to_save=["head"])))
    dt.save_adapter(model, tmp_path)
    again = dt.load_adapter(copy.deepcopy(base), tmp_path, trainable=True)
    x = torch.randn(3, 4)
    assert torch.equal(again["head"](x), model["head"](x))
    copies = again["head"].copies["default"]
    assert copies.a.weight is copies.b.weight


def test_a_layer_near_cancellation_is_reported(base, tmp_path, caplog):
    model = dt.attach(copy.deepcopy(base), dt.AdapterConfig(rank=8, alpha=8, targets=["body"]))
    layer = adapted_layers(model)["body"]
    with torch.no_grad():
        layer.lora_A["default"].copy_(torch.eye(8))
        layer.lora_B["default"].copy_(-0.99 * layer.base_layer.weight)
    with caplog.at_level("WARNING", "doratune"):
        dt.save_adapter(model, tmp_path)
        dt.load_adapter(base, tmp_path)
    assert [record.message.split(":")[0] for record in caplog.records] == ["body", "body"]
    torch.testing.assert_close(output(base), output(model), rtol=1e-5, atol=1e-5)


class OnlyOurs(torch.nn.Module):
    """Layers whose adapters PEFT cannot express."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv1d(4, 8, 3, groups=2)
        self.attn = torch.nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.conv(x).transpose(1, 2)
        return self.attn(x, x, x)[0]


def test_what_peft_cannot_express_is_written_for_doratune_only(tmp_path, caplog):
    torch.manual_seed(0)
    model = OnlyOurs()
    base = copy.deepcopy(model)
    dt.attach(model, dt.AdapterConfig(rank=2, targets=["conv", "q_proj", "out_proj"], norm_gradient="exact"))
    move(model)
    x = torch.randn(2, 4, 6)
    dt.save_adapter(model, tmp_path)
    assert "conv: PEFT's A for a grouped convolution" in caplog.text
    assert "PEFT does not adapt single projections" in caplog.text
    with pytest.raises(KeyError, match="DORATUNE"):
        peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    again = dt.load_adapter(base, tmp_path)
    assert (again(x) - model(x)).abs().max() < 1e-6  # frozen or trained, torch multiplies in another order


@pytest.mark.parametrize("first", ["body", "b.*y"])
def test_patterns_keep_their_order(first, base, tmp_path):
    """Of those that fit a layer the first counts, here and in PEFT."""
    patterns = {first: 64, "b.*y" if first == "body" else "body": 4}
    model = dt.attach(copy.deepcopy(base), dt.AdapterConfig(rank=2, targets=["body"], alpha_pattern=patterns))
    dt.save_adapter(model, tmp_path)
    again = dt.load_adapter(copy.deepcopy(base), tmp_path)
    scales = [[layer.adapters["default"].scale for layer in adapted_layers(m).values()] for m in (model, again)]
    assert scales[0] == scales[1] == [32.0]
    by_peft = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    assert [m.scaling["default"] for m in by_peft.modules() if hasattr(m, "scaling")] == [32.0]


def test_a_module_inside_one_that_is_saved_whole_is_saved_once(tmp_path):
    """Both had a copy, and the inner one, which never runs, took the other's place in the file."""
    base = build("mlp")
    config = dt.AdapterConfig(rank=2, targets=["body"], modules_to_save=["head.0", "head"])
    model = move(dt.attach(copy.deepcopy(base), config))
    assert set(saved_modules(model)) == {"head"}
    with torch.no_grad():
        for p in dt.trainable_parameters(model).values():
            p.add_(0.1)
    dt.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["head"]
    for names in (["head"], ["head.0", "head"]):  # an older file names both
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": names}))
        loaded = dt.load_adapter(copy.deepcopy(base), tmp_path)
        assert torch.equal(output(loaded), output(model))


def test_an_adapter_of_a_whole_and_one_of_its_part_say_so(base, tmp_path):
    config = dt.AdapterConfig(rank=2, targets=["body", "lin"])
    whole = dt.attach(nn.ModuleDict({"net": copy.deepcopy(base)}), config)  # as a LightningModule holds its model
    dt.save_adapter(whole, tmp_path / "whole")
    dt.save_adapter(whole["net"], tmp_path / "part")
    with pytest.raises(dt.AdapterError, match="its layers lie under 'net', where its model held this one"):
        dt.load_adapter(base, tmp_path / "whole")
    with pytest.raises(dt.AdapterError, match="its layers are those of 'net' of the model"):
        dt.load_adapter(nn.ModuleDict({"net": copy.deepcopy(base)}), tmp_path / "part")
    dt.load_adapter(base, tmp_path / "part")
    with pytest.raises(dt.AdapterError, match="no such module") as caught:
        dt.load_adapter(nn.ModuleDict({"net": nn.Linear(2, 2)}), tmp_path / "whole")
    assert "its layers" not in str(caught.value)
