"""One training run, from options to results: check, load, measure, train, measure, write."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from doratune.checkpoint import save_adapter
from doratune.errors import AdapterError
from doratune.model import attach
from doratune.summary import Summary, summary
from doratune.train import text
from doratune.train.checkpoints import checkpoints
from doratune.train.config import TrainConfig
from doratune.train.extras import require
from doratune.train.models import choose_dtype, load_model, load_tokenizer, model_problem
from doratune.train.results import TrainResult, peak_memory, read_metrics

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger("doratune")

METRICS, CURVES, CHECKPOINTS = "metrics.jsonl", "curves.png", "checkpoints"


def train(config: TrainConfig, console: Console | None = None) -> TrainResult:
    """Fine-tune a model as the options say, and write everything to the output folder.

    Args:
        config: the options.
        console: where progress is shown; None: nothing is shown.

    Raises:
        AdapterError: listing every problem with options, files and folders before a model is loaded; later, if the
            model cannot be loaded or adapted, or the loss is not finite.
    """
    check(config)
    transformers = require("transformers")
    from rich.console import Console

    console = console or Console(quiet=True)
    dtype = choose_dtype(config.dtype, config.method == "full")
    tokenizer = load_tokenizer(config.model)
    blocks = text.load_blocks(config, tokenizer)
    console.print(
        f"{len(blocks.train)} blocks of {blocks.max_length} tokens to train on, {len(blocks.held_out)} held out; "
        f"{blocks.unused} tokens at the end fill no block"
    )
    model = load_model(config.model, dtype)
    transformers.set_seed(config.seed)
    adapter = config.adapter_config()
    if adapter is not None:
        attach(model, adapter)
    about = summary(model)
    config.output.mkdir(parents=True, exist_ok=True)
    trainer = _trainer(config, model, tokenizer, blocks, dtype)
    sample = config.prompt is not None
    before = trainer.evaluate()["eval_loss"]
    sample_before = text.continuation(model, tokenizer, config.prompt or "", config.sample_tokens) if sample else None
    seconds, steps = _fit(config, trainer, console, before)
    after = _last_measured(trainer)
    sample_after = text.continuation(model, tokenizer, config.prompt or "", config.sample_tokens) if sample else None
    folder = _save(config, model, tokenizer)
    _draw(config)
    result = TrainResult(
        method=config.method,
        rank=adapter.rank if adapter else None,
        model=config.model,
        adapter=str(folder),
        **_sizes(about),
        steps=trainer.state.global_step,
        seed=config.seed,
        loss_before=before,
        loss_after=after,
        blocks=len(blocks.train),
        held_out_blocks=len(blocks.held_out),
        block_tokens=blocks.max_length,
        seconds=seconds,
        tokens_per_second=steps * trainer.get_total_train_batch_size(trainer.args) * blocks.max_length / seconds,
        peak_memory=peak_memory(model.device),
        device=str(model.device),
        dtype=str(dtype).removeprefix("torch."),
        prompt=config.prompt,
        sample_before=sample_before,
        sample_after=sample_after,
    )
    result.save(config.output)
    return result


def check(config: TrainConfig) -> None:
    """Find what can be found before anything large is loaded.

    Raises:
        AdapterError: listing every problem.
    """
    found = [*config.problems(), *text.problems(config)]
    problem = model_problem(config.model) if config.model else None
    if problem:
        found.append(problem)
    output = config.output
    if output.exists() and not output.is_dir():
        found.append(f"output {output} is a file; name a folder")
    elif config.resume and not checkpoints(output / CHECKPOINTS):
        found.append(f"output {output} holds no checkpoint to resume from")
    elif not config.resume and output.is_dir() and any(output.iterdir()):
        found.append(f"output {output} is not empty; name another folder, or go on with what is there: --resume")
    if found:
        raise AdapterError.of("these options cannot work", found)


def _trainer(config: TrainConfig, model: Any, tokenizer: Any, blocks: text.Blocks, dtype: torch.dtype) -> Any:
    from transformers import PrinterCallback, TrainingArguments

    from doratune.train.callbacks import MetricsFile
    from doratune.train.trainer import AdapterTrainer

    arguments = TrainingArguments(
        output_dir=str(config.output / CHECKPOINTS),
        max_steps=config.steps or -1,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        data_seed=config.seed,
        activation_checkpointing=config.gradient_checkpointing,
        fp16=dtype == torch.float16,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if config.eval_every else "no",
        eval_steps=config.eval_every,
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or 500,
        save_total_limit=config.keep,
        prediction_loss_only=True,
        include_num_input_tokens_seen="all",
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )
    trainer = AdapterTrainer(
        model,
        arguments,
        data_collator=text.collate,
        train_dataset=blocks.train,
        eval_dataset=blocks.held_out,
        processing_class=tokenizer,
        magnitude_learning_rate=config.magnitude_learning_rate,
        magnitude_weight_decay=config.magnitude_weight_decay,
        callbacks=[MetricsFile(config.output / METRICS)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _fit(config: TrainConfig, trainer: Any, console: Console, before: float) -> tuple[float, int]:
    """Run the loop; seconds and steps of this process."""
    from doratune.train.callbacks import Progress

    progress = Progress(console, before)
    trainer.add_callback(progress)
    start = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=config.resume)
    except KeyboardInterrupt:
        if any(checkpoints(config.output / CHECKPOINTS)):
            console.print(f"Interrupted. To go on: the same command with --resume (output {config.output}).")
        raise
    finally:
        progress.close()
    return time.perf_counter() - start, trainer.state.global_step - progress.first


def _last_measured(trainer: Any) -> float:
    """Held-out loss of the trained model, measured now unless that was the last thing done."""
    last = trainer.state.log_history[-2:]  # the very last are the loop's own times
    found = [entry["eval_loss"] for entry in last if "eval_loss" in entry and entry["step"] == trainer.state.max_steps]
    return found[-1] if found else trainer.evaluate()["eval_loss"]


def _save(config: TrainConfig, model: Any, tokenizer: Any) -> Path:
    """Write what was trained."""
    if config.method == "full":
        folder = config.output / "model"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    else:
        folder = config.output / "adapter"
        save_adapter(model, folder)
    return folder


def _draw(config: TrainConfig) -> None:
    from doratune.study.curves import draw_curves

    records = read_metrics(config.output / METRICS)
    draw_curves({config.method: records}, config.output / CURVES)


def _sizes(about: Summary) -> dict[str, int]:
    return {
        "trained": about.trained,
        "base": about.base,
        "direction": about.direction,
        "magnitude": about.magnitude,
    }
