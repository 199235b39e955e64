import logging

import datasets
import pytest
import torch
import transformers
from torch import nn

import doratune as dt
from train.tiny import llama


@pytest.mark.parametrize("unused", [True, False])
def test_adapters_that_the_loss_does_not_reach_are_named_once(unused, tmp_path, caplog):
    from doratune.train import AdapterTrainer

    model = llama()
    if unused:
        model.pooler = nn.Linear(4, 4)  # as encoders have, and losses over single tokens do not use
    dt.attach(model, dt.AdapterConfig(rank=2))
    layers = len(dt.summary(model).layers)
    ids = torch.arange(32).view(4, 8).tolist()
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False
    )
    with caplog.at_level(logging.WARNING, "doratune"):
        AdapterTrainer(model, arguments, train_dataset=rows).train()
    found = [r.getMessage() for r in caplog.records if "got no gradient" in r.getMessage()]
    assert len(found) == unused
    assert all(f"1 of {layers} adapted layers got no gradient from the first batch: pooler." in m for m in found)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_model_without_an_adapter_is_told(frozen, tmp_path, caplog):
    from doratune.train import AdapterTrainer

    model = llama()
    model.lm_head.requires_grad_(not frozen)  # somebody chose what to train
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3]] * 2, "labels": [[1, 2, 3]] * 2})
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False
    )
    with caplog.at_level(logging.WARNING, "doratune"):
        AdapterTrainer(model, arguments, train_dataset=rows).train()
    assert ("the model has no adapter" in caplog.text) is not frozen
    caplog.clear()
    model.requires_grad_(True).register_parameter("positions", nn.Parameter(torch.zeros(16), requires_grad=False))
    trainer = AdapterTrainer(model, arguments, train_dataset=rows)
    with caplog.at_level(logging.WARNING, "doratune"):
        trainer.create_optimizer()  # of a model with a part that is never trained
    total = sum(p.numel() for p in model.parameters())
    assert f"the model has no adapter: {total - 16:,} of its {total:,} parameters are trained" in caplog.text
    options = {"magnitude_learning_rate": 1e-2, "lora_plus_ratio": 16}
    with pytest.raises(
        dt.AdapterError, match="magnitude_learning_rate, lora_plus_ratio: the model has no active adapter"
    ):
        AdapterTrainer(model, arguments, train_dataset=rows, **options).train()
