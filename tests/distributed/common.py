"""What one process and two run alike."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from torch import nn

import doratune as dt
from doratune.train import AdapterOptions, TrainConfig
from doratune.train.assemble import make_model, make_trainer
from doratune.train.placement import quantization
from doratune.train.tasks import task_of
from train.tiny import llama

CONFIG = dt.AdapterConfig(rank=4)
STEPS = 20
STREAMED = 6
ACCUMULATED = {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}
"""Half as many sequences at a time, and forwards that are computed again."""
TOKENS = torch.randint(0, 256, (4 * STEPS, 16), generator=torch.Generator().manual_seed(3))
IDS = TOKENS[:4]


def load(folder: Path, spread: Any = None, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """The model of a folder, whole or in parts."""
    more |= {} if spread is None else {"distributed_config": spread}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **more)


def in_torchaos(kind: str) -> Any:
    """A model that torchao has quantised; its groups of 4 bits need wider layers than those of the tiny one."""
    from torchao.quantization import quantize_

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=257, **sizes))
    quantize_(model, quantization(kind, torch.float32).quant_type)
    return model


def save(folder: Path) -> Path:
    """Write a tiny model whose outputs differ enough to see mistakes."""
    model = llama(vocabulary=258)  # before 5.23 transformers splits a head into equal parts only
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    model.save_pretrained(folder)
    return folder


def attached(model: nn.Module, config: dt.AdapterConfig = CONFIG) -> Any:
    """With an adapter, the same everywhere."""
    transformers.set_seed(0)
    return dt.attach(model, config)


def trainer(model: nn.Module, folder: Path, batch_size: int, **options: Any) -> Any:
    """STEPS steps of four sequences in all."""
    from doratune.train import AdapterTrainer

    rows = [{"input_ids": row, "labels": row} for row in TOKENS.tolist()]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        learning_rate=1e-2,
        save_steps=STEPS // 2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
        seed=5,
        **options,
    )
    data = datasets.Dataset.from_list(rows)
    return AdapterTrainer(model, arguments, train_dataset=data, eval_dataset=data.select(range(4)))


def on_stream(folder: Path, name: str, batch_size: int) -> Any:
    """A Trainer on prompts of different lengths that are read while training, as ``doratune train`` makes it."""
    data, adapter = (str(folder / "rows.jsonl"),), AdapterOptions(rank=4)
    options = {"streaming": True, "steps": STREAMED, "save_every": None, "log_every": 1, "max_length": 64}
    config = TrainConfig(str(folder / "words"), data, folder / name, adapter=adapter, batch_size=batch_size, **options)
    config.output.mkdir(exist_ok=True)
    prepared = task_of(config.task).prepare(config, lambda _: None)
    return make_trainer(config, make_model(config, prepared, torch.float32)[0], prepared, torch.float32, False)


def read(run: Any) -> list[list[list[int]]]:
    """The rows of STREAMED batches without their padding."""
    batches = itertools.islice(run.get_train_dataloader(), STREAMED)
    return [
        [row[mask.bool()].tolist() for row, mask in zip(b["input_ids"], b["attention_mask"], strict=True)]
        for b in batches
    ]


def steps(model: nn.Module, count: int = STEPS) -> list[float]:
    """Losses of a loop of one's own: accelerate does not take tensor parallelism on a CPU."""
    optimizer = torch.optim.AdamW(dt.parameter_groups(model, lr=1e-2), foreach=False)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, STEPS)
    model.train()
    losses = []
    for batch in TOKENS.split(4)[:count]:
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(dt.trainable_parameters(model).values()), 1.0, foreach=False)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses
