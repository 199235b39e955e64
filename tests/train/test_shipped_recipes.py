"""Shipped recipes: each is read, whole and without a word that means nothing."""

import json

import pytest

import doratune as dt
from doratune.cli import main
from doratune.train import TrainConfig, load_recipe
from doratune.train.recipe import find_recipe, shipped
from train import tiny


def config(name):
    return TrainConfig(**{"model": "m", "data": ("d",), **load_recipe(find_recipe(name))})


@pytest.mark.parametrize("name", shipped())
def test_every_recipe_is_valid(name):
    assert list(config(name).problems()) == []


def test_a_recipe_without_a_model_can_be_looked_at(capsys):
    assert main(["train", "--recipe", "quickstart", "--print-recipe"]) == 0
    assert 'model = ""' in capsys.readouterr().out


def test_a_recipe_without_data_takes_them_from_flags(tmp_path, capsys):
    more = ["--model", str(tmp_path), "--data", "tales.txt", "--eval-data", "more.txt", "--output", str(tmp_path / "x")]
    assert main(["train", "--recipe", "quickstart", *more, "--print-recipe"]) == 0
    printed = capsys.readouterr().out
    assert 'data = ["tales.txt"]' in printed
    assert main(["train", "--recipe", "quickstart", *more]) == 1
    assert "the folder has no config.json" in capsys.readouterr().err


def test_there_are_the_paper_s_settings():
    found = config("dora-llama-commonsense")
    adapter = found.adapter_config()
    assert adapter.alpha == 2 * adapter.rank == 64
    assert adapter.dropout == 0.05
    assert adapter.targets == ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    assert (found.batch_size * found.gradient_accumulation, found.epochs, found.warmup) == (16, 3, 100)
    assert (found.schedule, found.optimizer) == ("linear", "adamw")
    assert config("dora-llama-commonsense-half").adapter_config().rank == 16


def test_granularity_trains_magnitudes_everywhere_and_directions_on_q_k_v():
    from train.tiny import llama

    model = dt.attach(llama(), config("dora-llama-granularity").adapter_config())
    about = {layer.path.rpartition(".")[2]: (layer.rank, layer.magnitude > 0) for layer in dt.summary(model).layers}
    assert {name for name, (rank, _) in about.items() if rank} == {"q_proj", "k_proj", "v_proj"}
    assert len(about) == 7
    assert all(trained for _, trained in about.values())


@pytest.mark.parametrize("name", [name for name in shipped() if name.startswith("dora-llama")] + ["chat", "quickstart"])
def test_text_recipes_train(name, tmp_path):
    folder = tiny.save_chat_model(tmp_path / "model")
    asked, told = tiny.words(3), tiny.words(4)
    rows = {
        "chat": {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]},
        "quickstart": {"text": tiny.words(60)},
    }.get(name, {"instruction": asked, "input": "", "output": told, "answer": told})
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(rows) + "\n" for _ in range(40)), encoding="utf-8")
    own = ["--model", str(folder), "--data", str(data), "--output", str(tmp_path / "run"), "--workers", "0"]
    assert main(["train", "--recipe", name, *own, "--steps", "1", "--eval-fraction", "0.1", "--max-length", "100"]) == 0
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_an_unknown_name_lists_the_known_ones(capsys):
    assert main(["train", "--recipe", "dora-lama"]) == 1
    said = capsys.readouterr().err
    assert "recipe 'dora-lama' is no file, and no shipped recipe; shipped are chat, dora-llama-commonsense" in said


def test_a_shipped_recipe_out_of_reach_names_the_local_way(capsys, monkeypatch):
    import transformers

    refuse = classmethod(lambda *_, **__: (_ for _ in ()).throw(OSError("We couldn't connect")))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    assert main(["train", "--recipe", "dora-llama-commonsense"]) == 1
    said = capsys.readouterr().err
    assert "tokenizer yahma/llama-7b-hf could not be loaded: We couldn't connect" in said
    assert "without a network, name the folder of a downloaded model" in said
