"""One training run, from options to results: check, load, measure, train, measure, write."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from doratune.checkpoint import inexpressible, save_adapter
from doratune.distributed import is_first, is_spread, processes
from doratune.errors import AdapterError
from doratune.extras import require
from doratune.files import output_problem
from doratune.model_files import save_model
from doratune.train import recipe, resuming, start
from doratune.train.assemble import autocast, make_model, make_trainer, precision
from doratune.train.card import write_card
from doratune.train.checkpoints import find_last, remove_incomplete
from doratune.train.config import TrainConfig
from doratune.train.curves import draw_curves
from doratune.train.failures import explained
from doratune.train.model_names import model_problem
from doratune.train.models import choose_dtype, loader_name
from doratune.train.noted import information
from doratune.train.output import CHECKPOINTS, CURVES, METRICS, RECIPE
from doratune.train.processes import is_first_asked
from doratune.train.results import TrainResult, peak_memory, read_metrics
from doratune.train.sample import continuation
from doratune.train.sources import path_of
from doratune.train.tasks import task_of
from doratune.train.tasks.prepared import Prepared


def train(config: TrainConfig, console: Console | None = None) -> TrainResult:
    """Fine-tune a model as the options say, and write everything to the output folder.

    Args:
        config: the options.
        console: where progress is shown; None: nothing is shown.

    Raises:
        AdapterError: listing every problem with options, files and data before a model is loaded; later, if the model
            cannot be loaded or adapted, or training fails for a reason that is understood.
        KeyboardInterrupt: on Ctrl-C or SIGTERM; in the loop the step is finished, and its checkpoint written.
    """
    if found := problems(config) or ([] if config.recipe else start.overruled(config)):
        raise AdapterError.of("these options cannot work", found)
    require("transformers")
    from doratune.train.interruption import told

    if console is None or not is_first_asked():
        console = Console(quiet=True)
    with told(config, console):
        return _train(config, console)


def _train(config: TrainConfig, console: Console) -> TrainResult:
    import transformers

    from doratune.train.callbacks import recording

    say = functools.partial(console.out, highlight=False)
    for line in start.described(config):
        say(line)
    config = start.resolved(config)
    dtype = choose_dtype(config.dtype, not config.is_adapter)
    if far := [name for name in (config.model, *config.data, *config.eval_data) if not path_of(name).exists()]:
        say(f"not here, so looked for on the hub: {', '.join(far)}")
    prepared = task_of(config.task).prepare(config, say)
    mixed = autocast(config, dtype)
    say(precision(config, dtype, mixed))
    transformers.set_seed(config.seed)  # of a new head
    model, about = make_model(config, prepared, dtype)
    if is_first_asked():
        _make_folder(config.output)
        _note_recipe(config, say)
    trainer = make_trainer(config, model, prepared, dtype, mixed, recording(config, prepared))
    with explained(config, config.output / CHECKPOINTS):
        before = trainer.evaluate()
        sample_before = _sample(config, model, prepared)
        seconds, speed = _fit(config, trainer, prepared, console, before)
        best = trainer.state.best_global_step if config.keep_best else None
        after = _measured(trainer, best or trainer.state.global_step)
        test = {} if prepared.test is None else trainer.evaluate(prepared.test, metric_key_prefix="test")
        sample_after = _sample(config, model, prepared)
        folder = _save(config, model, prepared)
        if is_first():
            _draw(config, prepared)
        adapter = config.adapter_config()
        result = TrainResult(
            task=config.task,
            method=config.method,
            rank=adapter.rank if adapter else None,
            model=config.model,
            adapter=str(folder),
            trained=about.trained,
            base=about.base,
            direction=about.direction,
            magnitude=about.magnitude,
            steps=trainer.state.global_step,
            best_step=best,
            peft=not (config.is_adapter and inexpressible(model, "default")),
            loader=loader_name(config.task, model.config),
            seed=config.seed,
            processes=processes(),
            loss_before=before["eval_loss"],
            loss_after=after["eval_loss"],
            accuracy_before=before.get("eval_accuracy"),
            accuracy_after=after.get("eval_accuracy"),
            test_examples=0 if prepared.test is None else len(prepared.test),
            test_loss=test.get("test_loss"),
            test_accuracy=test.get("test_accuracy"),
            example=prepared.example,
            examples=prepared.examples,
            held_out_examples=len(prepared.held_out),
            seconds=seconds,
            unit=prepared.unit,
            speed=speed,
            peak_memory=peak_memory(model.device),
            device=str(model.device),
            dtype=str(dtype).removeprefix("torch."),
            labels=prepared.labels,
            chat=config.as_chat or "messages" in prepared.columns,
            prompt=config.prompt,
            sample_before=sample_before,
            sample_after=sample_after,
        )
        if is_first():
            write_card(folder, config, result)
            result.save(config.output)
    return result


def problems(config: TrainConfig) -> list[str]:
    """What can be found wrong before anything large is loaded."""
    if wrong := config.wrong_types():
        return wrong
    found = list(start.problems(config))
    whole = config if found else start.resolved(config)
    found += [*whole.problems(), *task_of(config.task).problems(config)]
    problem = model_problem(config.model) if config.model else None
    if problem:
        found.append(problem)
    output = config.output
    if not is_first_asked():
        pass  # the first process looks, and writes there while others are still on their way
    elif why := output_problem(output):
        found.append(why)
    elif config.resume:
        found += resuming.problems(config)
    elif output.is_dir() and any(output.iterdir()):
        found.append(f"output {output} is not empty; name another folder, or go on with what is there: --resume")
    return found


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AdapterError(f"output {output} cannot be made: {error.strerror or error}; name another folder") from error


def _note_recipe(config: TrainConfig, say: Any) -> None:
    """Write the options beside the results; of a resumed run, say what is different now.

    A resumed run's are written once its checkpoint was taken: if it is refused, the older ones are those to go on with.
    """
    path = config.output / RECIPE
    if config.resume and path.is_file():
        for line in recipe.differences(path, config):
            say(f"other than when the run began: {line}")
        for folder in remove_incomplete(config.output / CHECKPOINTS):
            say(f"{folder} had been cut short and was deleted")
        last, damaged = find_last(config.output / CHECKPOINTS)
        for line in damaged:
            say(line)
        if last is None:
            say("there is no checkpoint to go on from: the run starts over")
    else:
        recipe.save_recipe(path, config)


def _fit(
    config: TrainConfig, trainer: Any, prepared: Prepared, console: Console, before: dict[str, float]
) -> tuple[float, float]:
    """Run the loop; seconds, and units a second, of this process."""
    from doratune.train.callbacks import Progress, Resumed
    from doratune.train.interruption import Interruption

    progress = Progress(console, prepared.unit, prepared.examples, before)
    interruption = Interruption(console)
    trainer.add_callback(progress)
    trainer.add_callback(interruption)
    if config.resume:
        trainer.add_callback(Resumed(config, console))
    began = time.perf_counter()
    last, _ = find_last(config.output / CHECKPOINTS)
    try:
        trainer.train(resume_from_checkpoint=str(last) if config.resume and last else None)
        speed = progress.speed(trainer.args, trainer.state)
        if interruption.asked and trainer.state.global_step < trainer.state.max_steps:
            raise interruption.asked
        if config.patience and trainer.state.global_step < trainer.state.max_steps:
            steps = f"step {trainer.state.global_step} of {trainer.state.max_steps}"
            ended = f"ended at {steps}: no lower held-out loss in {config.patience} measurements (patience)"
            console.out(ended, highlight=False)
    finally:
        progress.close()
        interruption.close()
    return time.perf_counter() - began, speed


def _measured(trainer: Any, step: int) -> dict[str, float]:
    """Held-out metrics of the trained model, which it had at this step; measured now unless they were then."""
    found = [entry for entry in trainer.state.log_history if "eval_loss" in entry and entry["step"] == step]
    metrics: dict[str, float] = found[-1] if found else trainer.evaluate()
    return metrics


def _sample(config: TrainConfig, model: Any, prepared: Prepared) -> str | None:
    if config.prompt is None:
        return None
    return continuation(model, prepared.processor, config.prompt, config.sample_tokens)


def _save(config: TrainConfig, model: Any, prepared: Prepared) -> Path:
    """Write what was trained, and what it is for."""
    folder = config.output / ("adapter" if config.is_adapter else "model")
    if config.is_adapter and (is_first() or is_spread(model)):
        save_adapter(model, folder)
    if not is_first():
        return folder
    if not config.is_adapter:
        save_model(model, folder)
    if prepared.unit == "images" or not config.is_adapter:
        prepared.processor.save_pretrained(folder)
    information(config, prepared).save(folder)
    return folder


def _draw(config: TrainConfig, prepared: Prepared) -> None:
    records = read_metrics(config.output / METRICS)
    loss_unit = "nats per token" if prepared.unit == "tokens" else f"nats per {prepared.unit.rstrip('s')}"
    title = f"{config.method}, {config.task} on {Path(config.model).name}"
    draw_curves({config.method: records}, config.output / CURVES, title, loss_unit)
