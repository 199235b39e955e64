"""From options and data to a model with what is to be trained, and the Trainer that trains it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from doratune.extras import require
from doratune.model import attach
from doratune.summary import Summary, summary
from doratune.train.config import TrainConfig
from doratune.train.device import to_device
from doratune.train.models import align_padding, load_classifier, load_model, multiplies_bfloat16
from doratune.train.noted import Noted, information
from doratune.train.optimizer import OPTIMIZERS, SCHEDULES, keep_float32, train_only
from doratune.train.output import CHECKPOINTS, TENSORBOARD
from doratune.train.packing import refuse_leaks
from doratune.train.placement import loading_options, take_own_gpu
from doratune.train.processes import processes_asked
from doratune.train.start import attach_start
from doratune.train.tasks.batches import Packed, Padded
from doratune.train.tasks.prepared import Prepared
from doratune.train.token_mean import TokenMean


def make_model(config: TrainConfig, prepared: Prepared, dtype: torch.dtype) -> tuple[Any, Summary]:
    """The model with what is to be trained, and what that is.

    Raises:
        AdapterError: if it cannot be loaded or adapted, does not fit its device, or mixes packed examples.
    """
    head: list[str] = []
    take_own_gpu()
    options = loading_options(config, dtype)
    if prepared.labels:
        model, head = load_classifier(config.model, dtype, config.task, prepared.labels, options)
        if config.task == "text-classification":
            align_padding(model, prepared.processor)  # Trainer would, but after the measurement before training
        if config.method != "full":
            keep_float32(model, head)
    else:
        model = load_model(config.model, dtype, config.task, options=options)
    if not config.fsdp:
        model = to_device(model)  # norms of large weights are found there in no time
    require("transformers").set_seed(config.seed)
    adapter = config.adapter_config(head)
    if config.start_from is not None:
        attach_start(model, config, head)
    elif adapter is not None:
        attach(model, adapter)
    elif config.method == "head":
        train_only(model, head)
    else:
        model.requires_grad_(True)
    if isinstance(prepared.collate, Packed):
        refuse_leaks(model, config.model)
    if config.compile:
        model.compile()
    return model, summary(model)


def autocast(config: TrainConfig, dtype: torch.dtype) -> bool:
    """Whether float32 weights that are trained themselves compute in bfloat16."""
    able = torch.cuda.is_available() and multiplies_bfloat16()
    return config.dtype == "auto" and not config.is_adapter and able and dtype == torch.float32


def precision(config: TrainConfig, dtype: torch.dtype, mixed: bool) -> str:
    """Device and dtypes in words."""
    device = "GPU" if torch.cuda.is_available() else "MPS" if torch.backends.mps.is_available() else "CPU"
    base = config.quantize or str(dtype).removeprefix("torch.")
    if config.quantize in ("nf4", "int8"):  # torchao's kinds say whose they are
        base += " (bitsandbytes)"
    trained = "adapter in float32" if config.is_adapter else "all that is trained in the same"
    arithmetic = ", arithmetic in bfloat16 (autocast)" if mixed else ""
    processes = processes_asked()
    way = "parts of the model" if config.fsdp else "a copy of the model"
    spread = f"; {processes} processes, each with {way}" if processes > 1 else ""
    gpus = torch.cuda.device_count() if processes == 1 else 1
    if gpus > 1:
        spread = f"; one of {gpus} GPUs (all of them: torchrun --nproc-per-node {gpus} -m doratune train ...)"
    return f"{device}: base weights in {base}, {trained}{arithmetic}{spread}"


def make_trainer(
    config: TrainConfig,
    model: Any,
    prepared: Prepared,
    dtype: torch.dtype,
    mixed: bool,
    callbacks: Sequence[Any] = (),
) -> Any:
    """transformers' Trainer, to train and measure or, where nothing is prepared to train on, to measure only."""
    from transformers import PrinterCallback
    from transformers.integrations import TensorBoardCallback

    from doratune.train import labels
    from doratune.train.trainer import AdapterTrainer

    class ClassTrainer(Noted, AdapterTrainer):
        """For classifiers."""

    class TokenTrainer(Noted, TokenMean, AdapterTrainer):
        """For language models."""

    trainer = (ClassTrainer if prepared.labels else TokenTrainer)(
        model,
        _arguments(config, model, prepared, dtype, mixed),
        data_collator=prepared.collate,
        train_dataset=prepared.train,
        eval_dataset=prepared.held_out,
        processing_class=prepared.processor,
        compute_metrics=labels.accuracy if prepared.labels else None,
        preprocess_logits_for_metrics=labels.most_likely if prepared.labels else None,
        magnitude_learning_rate=config.magnitude_learning_rate,
        magnitude_weight_decay=config.magnitude_weight_decay,
        lora_plus_ratio=config.lora_plus_ratio,
        callbacks=list(callbacks),
    )
    trainer.information = information(config, prepared)
    if prepared.labels:
        # Classifiers take any argument and pass over the number of examples to divide by: Trainer has to divide.
        trainer.model_accepts_loss_kwargs = False
    trainer.remove_callback(PrinterCallback)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):  # the measurement before training would go to another folder
            callback.logging_dir = str(config.output / TENSORBOARD)
    return trainer


def _arguments(config: TrainConfig, model: Any, prepared: Prepared, dtype: torch.dtype, mixed: bool) -> Any:
    """The options of a run as transformers has them."""
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(config.output / CHECKPOINTS),
        max_steps=config.steps or -1,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        optim=OPTIMIZERS[config.optimizer],
        learning_rate=config.learning_rate,
        lr_scheduler_type=SCHEDULES.get(config.schedule, config.schedule),
        warmup_steps=_warmup(config, prepared),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        data_seed=config.seed,
        **{_checkpointing(model): config.gradient_checkpointing},
        bf16=mixed,
        fp16=dtype == torch.float16,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if config.eval_every else "no",
        eval_steps=config.eval_every,
        save_strategy="steps" if config.save_every or config.keep_best else "no",
        save_steps=(config.eval_every if config.keep_best else config.save_every) or 500,
        load_best_model_at_end=config.keep_best,
        metric_for_best_model="eval_loss" if config.keep_best else None,
        greater_is_better=False,
        save_total_limit=config.keep,
        prediction_loss_only=not prepared.labels,
        include_num_input_tokens_seen=_counted(prepared),
        dataloader_num_workers=min(config.workers, 1) if config.streaming else config.workers,  # one stream, one reader
        # Of a stream each process reads all and takes its own rows; accelerate would have the first read for all, and
        # fail to join batches that are padded to different lengths.
        accelerator_config={"dispatch_batches": False},
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()),  # or processes do not meet
        report_to=list(config.report_to) or "none",
        run_name=config.output.name,
    )
    # Trainer would run the model on all GPUs in threads (nn.DataParallel), with a batch each; processes are the way.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _warmup(config: TrainConfig, prepared: Prepared) -> float:
    """As asked, but a share of so few steps that transformers would round it up to all of them is rounded down.

    The first step of a warm-up has a learning rate of 0: a run of one step would learn nothing.
    """
    if not 0 < config.warmup < 1:
        return config.warmup
    steps = config.steps
    if steps is None:
        batches = math.ceil(math.ceil((prepared.examples or 0) / config.batch_size) / processes_asked())
        steps = math.ceil(config.epochs * math.ceil(batches / config.gradient_accumulation))
    return int(steps * config.warmup) if math.ceil(steps * config.warmup) >= steps else config.warmup


def _checkpointing(model: Any) -> str:
    """What transformers calls it: before 5.23 by its old name, of which later ones warn."""
    return "activation_checkpointing" if hasattr(model, "activation_checkpointing_enable") else "gradient_checkpointing"


def _counted(prepared: Prepared) -> str:
    """Which tokens the Trainer counts."""
    if prepared.unit != "tokens":
        return "no"
    return "non_padding" if isinstance(prepared.collate, Padded) else "all"
