import dataclasses

import pytest
from huggingface_hub import ModelCard

from doratune.train import AdapterOptions, TrainConfig, TrainResult
from doratune.train.card import write_card

RESULT = TrainResult(
    task="text-generation",
    method="dora",
    rank=8,
    model="org/model",
    adapter="run/adapter",
    trained=100,
    base=10_000,
    direction=90,
    magnitude=10,
    steps=24,
    seed=3,
    loss_before=3.0,
    loss_after=2.0,
    example="blocks of 64 tokens",
    examples=100,
    held_out_examples=10,
    seconds=12.0,
    unit="tokens",
    speed=1000.0,
    peak_memory=2**30,
    device="cpu",
    dtype="float32",
)


def card(folder, result=RESULT, **values):
    config = TrainConfig(**{"model": "org/model", "data": ("org/data",), "adapter": AdapterOptions(rank=8), **values})
    write_card(folder, config, result)
    return ModelCard.load(folder / "README.md")


def test_of_an_adapter_on_a_model_of_the_hub(tmp_path):
    found = card(tmp_path)
    about = found.data.to_dict()
    assert about["base_model"] == "org/model"
    assert about["library_name"] == "peft"
    assert about["pipeline_tag"] == "text-generation"
    assert about["datasets"] == ["org/data"]
    assert about["tags"] == ["doratune", "dora"]
    assert found.text.lstrip().startswith("# DoRA adapter of model\n")
    assert "Rank 8, alpha 32. Targets: all-linear." in found.text
    assert "| held-out loss | 3.0000 -> 2.0000 |" in found.text
    assert 'doratune generate FOLDER --prompt "Once upon a time"\n' in found.text
    assert 'AutoModelForCausalLM.from_pretrained("org/model")' in found.text


def test_names_no_folder_of_this_machine(tmp_path):
    (tmp_path / "secret").mkdir()
    data = tmp_path / "secret" / "people.jsonl"
    data.write_text("{}")
    found = card(tmp_path, model=str(tmp_path / "secret"), data=(str(data),))
    assert "base_model" not in found.data.to_dict()
    assert "datasets" not in found.data.to_dict()
    assert str(tmp_path) not in found.content
    assert "people" not in found.content
    assert 'from_pretrained("path/to/secret")' in found.text


@pytest.mark.parametrize(
    ("method", "title", "library"),
    [
        ("magnitude", "# Magnitudes of model", "peft"),
        ("full", "# Fine-tuned model of model", "transformers"),
        ("head", "# Fine-tuned head of model", "transformers"),
    ],
)
def test_of_other_methods(tmp_path, method, title, library):
    classes = {"task": "image-classification", "labels": ("cat", "dog"), "method": method, "unit": "images"}
    found = card(tmp_path, dataclasses.replace(RESULT, **classes), task="image-classification", method=method)
    assert found.data.library_name == library
    assert title in found.text
    assert "doratune predict FOLDER images/ --output predictions.csv" in found.text
    assert "nats per example" in found.text
    assert ("PeftModel" in found.text) == (library == "peft")
    assert ("num_labels=2" in found.text) == (library == "peft")


def test_of_a_quantised_base(tmp_path):
    assert "24 steps, float32, base quantised (nf4), seed 3." in card(tmp_path, quantize="nf4").text
    assert "24 steps, float32, seed 3." in card(tmp_path).text


def test_of_an_adapter_that_began_from_another(tmp_path):
    assert "Targets: all-linear. Begun from user/adapter. Trained" in card(tmp_path, start_from="user/adapter").text
    found = card(tmp_path, start_from=str(tmp_path))
    assert "Begun from another adapter. Trained" in found.text
    assert str(tmp_path) not in found.content


def test_of_an_adapter_that_peft_cannot_read(tmp_path):
    found = card(tmp_path, dataclasses.replace(RESULT, peft=False))
    assert found.data.library_name == "doratune"
    assert "PeftModel" not in found.text
    assert 'model = doratune.load_adapter(base, "FOLDER")' in found.text
