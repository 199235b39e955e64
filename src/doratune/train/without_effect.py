"""Options that change nothing in a run: typed all the same, they are a mistake.

Only flags are looked at. A recipe serves several methods, so that its values may be of no use to one of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from doratune.train.config import ADAPTER_OPTIONS, TrainConfig

SIZES = ("rank", "alpha", "rank_pattern", "alpha_pattern", "rank_stabilized")
LOW_RANK = (*SIZES, "dropout", "init", "lora_plus_ratio")
MAGNITUDE = ("norm_gradient", "norm_refresh", "eight_bit_outputs", "magnitude_learning_rate", "magnitude_weight_decay")
ADAPTER = (*ADAPTER_OPTIONS, "lora_plus_ratio", "magnitude_learning_rate", "magnitude_weight_decay")
DECIDED = (*SIZES, "init", "targets", "exclude", "bias", "modules_to_save")
"""What the file of an adapter says that training begins with; its other options say how it is trained."""
WRITTEN = ("prompt_column", "completion_column", "messages_column", "prompt_template", "as_chat", "packing", "loss_on")
IMAGES = ("image_column", "image_size")
OF_TASKS = {
    "text-generation": ("label_column", *IMAGES),
    "text-classification": (*WRITTEN, *IMAGES),
    "image-classification": ("text_column", *WRITTEN, "max_length"),
}


def without_effect(config: TrainConfig, flags: Collection[str]) -> Iterator[str]:
    """Those among the options that were typed, with the reason."""
    for why, names in _reasons(config):
        found = [name for name in dict.fromkeys(names) if name in flags]
        if found:
            yield f"{', '.join(found)}: without effect, because {why}; leave {'it' if len(found) == 1 else 'them'} out"


def _reasons(c: TrainConfig) -> Iterator[tuple[str, Collection[str]]]:
    if not c.is_adapter:
        yield f"method {c.method} trains no adapter", ADAPTER
    elif c.method == "magnitude":
        yield "method magnitude trains neither A nor B", (*LOW_RANK, "norm_gradient")
    elif c.method == "lora":
        yield "method lora has no magnitudes", MAGNITUDE
    if c.is_adapter and c.start_from is not None:
        yield "the adapter of start_from has its own", DECIDED
    yield f"the task is {c.task}", OF_TASKS[c.task]
    if c.messages_column:
        yield "messages_column is given", ("prompt_column", "completion_column", "prompt_template", "text_column")
    elif c.prompt_template:
        yield "prompt_template is given", ("prompt_column", "text_column")
    elif c.prompt_column or c.completion_column:
        yield "columns of prompt or completion are given", ("text_column",)
    if c.steps is not None:
        yield f"steps is {c.steps}, which wins unless it is none", ("epochs",)
    if c.eval_data:
        yield "there is eval_data", ("eval_fraction",)
    elif c.streaming:
        yield "the first examples of a stream are held out", ("eval_fraction",)
    if c.test_data:
        yield "there is test_data", ("test_fraction",)
    if c.keep_best:
        yield "with keep_best a checkpoint is written after every measurement", ("save_every",)
    if c.prompt is None:
        yield "there is no prompt to continue", ("sample_tokens",)
    if c.quantize != "nf4":
        yield f"it is for quantize nf4, and quantize is {c.quantize or 'none'}", ("double_quant",)
