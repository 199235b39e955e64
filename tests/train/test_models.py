import re
import sys

import pytest
import torch

import doratune as dt
from doratune.extras import require
from doratune.train import TrainConfig
from doratune.train.assemble import autocast
from doratune.train.models import (
    align_padding,
    choose_dtype,
    give_padding,
    load_classifier,
    load_config,
    load_model,
    load_tokenizer,
)
from train.tiny import llama, save_model, save_vision_model, tokenizer


def test_a_model_of_another_kind_is_not_called_incomplete(tmp_path):
    with pytest.raises(dt.AdapterError, match=r"ViTConfig.*\(a model of another kind than is needed here\)"):
        load_model(str(save_vision_model(tmp_path)))


def test_what_is_looked_for_on_the_hub_is_no_folder_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "transformers.AutoConfig.from_pretrained", lambda *_, **__: (_ for _ in ()).throw(OSError("no"))
    )
    with pytest.raises(dt.AdapterError, match=re.escape(f"there is no folder {tmp_path / 'model'}, so it was looked")):
        load_config("model")


def test_a_folder_is_loaded_in_the_dtype_asked_for(tmp_path):
    save_model(tmp_path)
    assert load_model(str(tmp_path), torch.bfloat16).dtype == torch.bfloat16
    assert load_model(str(tmp_path), task=None).dtype == torch.float32
    assert load_tokenizer(str(tmp_path)).eos_token == "<end>"


def test_a_broken_folder_is_named(tmp_path):
    save_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(dt.AdapterError, match="could not be loaded"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(dt.AdapterError, match="could not be loaded"):
        load_model(str(tmp_path))
    with pytest.raises(dt.AdapterError, match="no such folder"):
        load_tokenizer(str(tmp_path / "absent"))
    (tmp_path / "tokenizer.json").unlink(), (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(dt.AdapterError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(("before", "labels"), [("regression", 1), ("multi_label_classification", 3)])
def test_a_base_for_another_kind_of_loss_learns_classes(tmp_path, before, labels):
    model = llama()
    model.config.num_labels, model.config.problem_type = labels, before
    model.save_pretrained(tmp_path / "text")
    loaded, _ = load_classifier(str(tmp_path / "text"), torch.float32, "text-classification", ["a", "b", "c"])
    ids, labels = torch.tensor([[1, 2], [3, 4]]), torch.tensor([0, 2])
    found = loaded(input_ids=ids, labels=labels)
    assert torch.allclose(found.loss, torch.nn.functional.cross_entropy(found.logits, labels))


@pytest.mark.parametrize("unknown", ["<unk>", None])
def test_a_tokenizer_without_signs_for_padding_and_end_pads(unknown):
    from transformers import DataCollatorWithPadding, LlamaForSequenceClassification

    made = tokenizer()
    made.pad_token, made.eos_token = None, None
    if unknown:
        made.unk_token = "<end>"
    model = LlamaForSequenceClassification(llama().config)
    align_padding(model, made)
    assert model.config.pad_token_id == made.pad_token_id == (256 if unknown else 0)
    rows = [{"input_ids": [1, 2, 3], "labels": 0}, {"input_ids": [4], "labels": 1}]
    other = tokenizer()
    other.pad_token, other.eos_token = None, None
    give_padding(other)
    batch = DataCollatorWithPadding(other)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_dtypes():
    assert choose_dtype("bfloat16") == torch.bfloat16
    with pytest.raises(dt.AdapterError, match="dtype must be one of auto, float32, bfloat16, float16; found 'fp16'"):
        choose_dtype("fp16")
    if not torch.cuda.is_available():
        assert choose_dtype("auto") == torch.float32
        with pytest.raises(dt.AdapterError, match="needs a GPU"):
            choose_dtype("float16")


@pytest.mark.parametrize("multiplies", [True, False])
def test_a_gpu_that_only_emulates_bfloat16_computes_in_float32(monkeypatch, multiplies):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or multiplies
    )
    assert choose_dtype("auto") == (torch.bfloat16 if multiplies else torch.float32)
    assert choose_dtype("auto", full=True) == torch.float32
    assert autocast(TrainConfig("model", ("data",), method="full"), torch.float32) == multiplies


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(dt.AdapterError, match=r"needs transformers.*pip install 'doratune\[train\]'"):
        require("transformers")
    with pytest.raises(dt.AdapterError, match=r"doratune\[study\]"):
        require("no_such_library.inside", "study")
