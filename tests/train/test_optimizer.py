from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import TrainingArguments

import doratune as dt
from doratune.train import AdapterOptions, TrainConfig, train
from doratune.train.assemble import _checkpointing
from doratune.train.choices import Optimizer, Schedule
from doratune.train.optimizer import OPTIMIZERS, train_only, with_faster_b
from train.tiny import llama, save_model, write_text


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assets")
    return save_model(folder / "model"), write_text(folder / "text.txt")


def config(assets, output, **values):
    options = {"max_length": 16, "steps": 12, "batch_size": 2, "learning_rate": 2e-2, "log_every": 1}
    adapter = AdapterOptions(rank=4)
    return TrainConfig(str(assets[0]), (str(assets[1]),), output, adapter=adapter, **{**options, **values})


def test_every_name_is_known():
    assert set(OPTIMIZERS) == set(Optimizer.__args__)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", Optimizer.__args__)
def test_every_optimizer_learns(assets, tmp_path, name):
    rate = {"lion_8bit": 5e-3, "sgd": 1.0}.get(name, 2e-2)
    result = train(config(assets, tmp_path / "run", optimizer=name, learning_rate=rate), Console(quiet=True))
    assert result.loss_after < result.loss_before


@pytest.mark.parametrize("name", Schedule.__args__)
def test_every_schedule_warms_up(assets, tmp_path, name):
    from doratune.train.results import read_metrics

    train(config(assets, tmp_path / "run", schedule=name, warmup=4, steps=6), Console(quiet=True))
    rates = [r["learning_rate"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert rates[:5] == pytest.approx([0, 5e-3, 1e-2, 1.5e-2, 2e-2])


def test_b_can_be_faster():
    model = dt.attach(llama(), dt.AdapterConfig(rank=4))
    groups = dt.parameter_groups(model, lr=1.0, magnitude_lr=2.0, weight_decay=0.5)
    split = {group["name"]: group for group in with_faster_b(model, groups, 16.0)}
    assert {name: group["lr"] for name, group in split.items()} == {"weights": 1.0, "B": 16.0, "magnitudes": 2.0}
    assert split["B"]["weight_decay"] == 0.5
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(".lora_B." in names[id(p)] for p in split["B"]["params"])
    assert not any(".lora_B." in names[id(p)] for p in split["weights"]["params"])
    assert sum(len(g["params"]) for g in split.values()) == len(dt.trainable_parameters(model))
    assert with_faster_b(model, groups, 1.0) == groups


def test_lora_plus_reaches_the_optimizer(assets, tmp_path):
    slow = train(config(assets, tmp_path / "a", learning_rate=1e-3), Console(quiet=True))
    fast = train(config(assets, tmp_path / "b", learning_rate=1e-3, lora_plus_ratio=16), Console(quiet=True))
    assert fast.loss_after < slow.loss_after < slow.loss_before


def test_a_tied_head_is_trained_alone():
    model = llama()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.arange(6)[None]
    before = model(ids).logits
    train_only(model, ())
    assert torch.equal(model(ids).logits, before)
    assert list(dt.trainable_parameters(model)) == ["lm_head.weight"]
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_a_language_model_s_head_comes_back(assets, tmp_path):
    from doratune.train.models import load_model

    result = train(config(assets, tmp_path / "run", method="head"), Console(quiet=True))
    assert result.trained == 257 * 16
    loaded = load_model(result.adapter)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
    assert torch.equal(loaded.model.embed_tokens.weight, llama().model.embed_tokens.weight)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_learns(assets, tmp_path, kind):
    screen = Console(record=True, quiet=False, file=(tmp_path / "screen").open("w"), width=200)
    result = train(config(assets, tmp_path / "run", quantize=kind), screen)
    screen.file.close()
    assert result.loss_after < result.loss_before
    assert f"base weights in {kind} (bitsandbytes), adapter in float32" in (tmp_path / "screen").read_text()
    dt.load_adapter(llama(), tmp_path / "run" / "adapter")


def test_checkpointing_has_the_name_that_transformers_gives_it():
    """Before 5.23, which is what Python 3.10 has, it was called gradient checkpointing."""
    older = SimpleNamespace(gradient_checkpointing_enable=lambda: None)
    assert _checkpointing(older) == "gradient_checkpointing"
    assert _checkpointing(llama()) in TrainingArguments.__dataclass_fields__


def test_checkpointing_and_workers_change_nothing(assets, tmp_path):
    plain = train(config(assets, tmp_path / "a"), Console(quiet=True))
    other = train(config(assets, tmp_path / "b", gradient_checkpointing=True, workers=1), Console(quiet=True))
    assert other.loss_after == pytest.approx(plain.loss_after, abs=1e-5)
