import dataclasses

import pytest

from doratune.cli import main
from doratune.train import AdapterOptions, TrainConfig
from doratune.train.start import OF_THE_RUN
from doratune.train.without_effect import ADAPTER, DECIDED, LOW_RANK, MAGNITUDE, OF_TASKS, without_effect

ALL = {f.name for kind in (TrainConfig, AdapterOptions) for f in dataclasses.fields(kind)}


def found(flags, **options):
    lines = list(without_effect(TrainConfig("m", ("d",), **options), flags))
    return {name for line in lines for name in line.split(":")[0].split(", ")}


def test_every_name_is_an_option():
    assert {*ADAPTER, *LOW_RANK, *MAGNITUDE, *DECIDED, *(name for names in OF_TASKS.values() for name in names)} <= ALL


@pytest.mark.parametrize(
    ("method", "vain", "of_use"),
    [
        ("full", {"rank", "targets", "bias", "lora_plus_ratio", "magnitude_learning_rate"}, {"weight_decay"}),
        ("head", {"dropout", "modules_to_save", "norm_refresh"}, {"weight_decay"}),
        ("lora", {"norm_gradient", "magnitude_weight_decay"}, {"rank", "targets", "lora_plus_ratio"}),
        ("magnitude", {"rank", "dropout", "init", "lora_plus_ratio"}, {"targets", "magnitude_learning_rate"}),
        ("dora", set(), {*ADAPTER}),
    ],
)
def test_by_method(method, vain, of_use):
    assert found({*vain, *of_use, "method", "steps"}, method=method) == vain


def test_by_task_and_other_options():
    assert found(ALL, method="dora", prompt="once", quantize="nf4") == {"label_column", "image_column", "image_size"}
    assert {"loss_on", "packing", "image_size"} <= found(ALL, task="text-classification")
    assert {"text_column", "max_length"} <= found(ALL, task="image-classification")
    others = {"epochs", "eval_fraction", "test_fraction", "sample_tokens", "double_quant"}
    assert found(others, steps=2, eval_data=("e",), test_data=("t",)) == others
    assert found(others) == {"sample_tokens", "double_quant"}
    assert found(others, streaming=True, steps=2, prompt="a", quantize="nf4") == {"epochs", "eval_fraction"}


def test_an_adapter_to_begin_with_decides_what_it_is():
    assert found({*DECIDED, *OF_THE_RUN, "method"}, start_from="run/adapter") == set(DECIDED)
    assert {*DECIDED, *OF_THE_RUN, "lora_plus_ratio", "magnitude_learning_rate", "magnitude_weight_decay"} == {*ADAPTER}


@pytest.mark.parametrize(
    ("given", "vain"),
    [
        ({"messages_column": "m"}, {"prompt_template", "prompt_column", "completion_column", "text_column"}),
        ({"prompt_template": "{a}"}, {"prompt_column", "text_column"}),
        ({"completion_column": "c"}, {"text_column"}),
        ({"text_column": "t"}, set()),
    ],
)
def test_of_columns_that_exclude_each_other_some_are_not_read(given, vain):
    columns = {"messages_column", "prompt_template", "prompt_column", "completion_column", "text_column"}
    assert found(columns, **given) == vain


def test_flags_are_refused_in_one_message_and_values_of_a_recipe_are_not(tmp_path, capsys):
    recipe = tmp_path / "r.toml"
    recipe.write_text('model = "m"\nsteps = 5\nrank = 2\n')
    flags = ["--data", str(tmp_path / "absent.txt"), "--method", "full", "--alpha", "32", "--epochs=2"]  # 32 by default
    assert main(["train", "--recipe", str(recipe), *flags]) == 1
    told = capsys.readouterr().err
    assert "  - alpha: without effect, because method full trains no adapter; leave it out\n" in told
    assert "  - epochs: without effect, because steps is 5, which wins unless it is none; leave it out\n" in told
    assert "absent.txt" in told
    assert "rank" not in told
