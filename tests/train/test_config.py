import dataclasses
from pathlib import Path

import pytest

import doratune as dt
from doratune.train import AdapterOptions, TrainConfig
from doratune.train.run import problems


def config(**values):
    return TrainConfig(**{"model": "m", "data": ("d",), **values})


def test_defaults_of_the_adapter_are_those_of_adapter_config():
    assert config().adapter_config() == dt.AdapterConfig()
    for field in dataclasses.fields(dt.AdapterConfig):
        assert getattr(AdapterOptions(), field.name) == getattr(dt.AdapterConfig(), field.name)
    assert [f.name for f in dataclasses.fields(AdapterOptions)] == [
        f.name for f in dataclasses.fields(dt.AdapterConfig)
    ]


def test_every_option_has_help():
    import inspect
    import re

    source = inspect.getsource(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        assert re.search(rf'    {field.name}: [^\n]*\n    """', source), f"{field.name} has no docstring"


@pytest.mark.parametrize(
    ("method", "expected"),
    [("dora", ("dora", 16)), ("lora", ("lora", 16)), ("magnitude", ("dora", 0)), ("full", None), ("head", None)],
)
def test_methods(method, expected):
    found = config(method=method).adapter_config()
    assert (found and (found.method, found.rank)) == expected


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("q_proj",), ("q_proj",)),
        ("q_proj", ("q_proj",)),
        (("q_proj", "v_proj"), ("q_proj", "v_proj")),
        (("self_attn.q_proj",), ("self_attn.q_proj",)),
        ((r".*\.(q|v)_proj",), r".*\.(q|v)_proj"),
        (("all-linear",), "all-linear"),
    ],
)
def test_one_word_that_is_no_name_is_an_expression(targets, expected):
    assert config(adapter=AdapterOptions(targets=targets)).adapter_config().targets == expected


@pytest.mark.parametrize(
    ("refused", "values"),
    [
        ("method full", {"method": "full", "task": "image-classification"}),
        ("method head", {"method": "head"}),
        (None, {"method": "head", "task": "text-classification"}),
        ("modules_to_save", {"adapter": AdapterOptions(modules_to_save=("lm_head",))}),
        (None, {"adapter": AdapterOptions(modules_to_save=("score",)), "task": "text-classification"}),
        ("bias all", {"adapter": AdapterOptions(bias="all")}),
        (None, {"adapter": AdapterOptions(bias="lora_only")}),
    ],
)
def test_weights_that_would_be_trained_in_float16_are_refused(refused, values):
    """Trainer would end at the first step: "Attempting to unscale FP16 gradients"."""
    found = "\n".join(config(**values, dtype="float16").problems())
    assert ("float16 loses the gradients of" in found) == bool(refused)
    assert (refused or "") in found
    assert not list(config(**values, dtype="bfloat16").problems())


def test_every_problem_is_found_at_once():
    wrong = config(
        data=(),
        max_length=0,
        steps=0,
        learning_rate=float("nan"),
        warmup=-1,
        eval_fraction=1.0,
        lora_plus_ratio=0,
        workers=-1,
        quantize="nf4",
        method="full",
        streaming=True,
        task="image-classification",
        prompt="once",
        report_to=("trackio",),
        adapter=AdapterOptions(rank=-1, dropout=2),
    )
    found = "\n".join(wrong.problems())
    for name in (
        "data",
        "max_length",
        "steps",
        "learning_rate",
        "warmup",
        "eval_fraction",
        "lora_plus_ratio",
        "workers",
        "quantize freezes the base; method full trains it",
        "streaming serves text-generation",
        "prompt asks for a sample",
        "report_to trackio: trackio is not installed",
        "rank",
        "dropout",
    ):
        assert name in found
    assert list(config().problems()) == []


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("quantize", "nf8", "expected one of 'nf4', 'int8', 'torchao-int8', 'torchao-int4' or None, found 'nf8'"),
        ("method", "dorra", "expected one of 'dora', 'lora', 'magnitude', 'full', 'head', found 'dorra'"),
        ("task", "text", "expected one of 'text-generation', "),
        ("dtype", "fp16", "expected one of 'auto', 'float32', "),
        ("loss_on", "prompt", "expected one of 'completion', 'all', found 'prompt'"),
        ("augment", ("spin",), "expected a list, each one of 'crop', "),
        ("steps", "3", "expected whole number or None, found '3'"),
        ("learning_rate", "1e-3", "expected number, found '1e-3'"),
        ("packing", "yes", "expected true or false or None, found 'yes'"),
        ("output", None, "expected path, found None"),
        ("data", None, "expected a list of strings, found None"),
        ("adapter", {"rank": 8}, "expected AdapterOptions(...), found {'rank': 8}"),
    ],
)
def test_values_that_are_none_of_the_option_s_from_python(name, value, expected):
    """Flags and recipes are looked at as they are read; a method that does not exist was trained as DoRA."""
    (problem,) = config(**{name: value}).problems()
    assert problem.startswith(f"{name}: {expected}")
    assert problems(config(**{name: value})) == [problem]


def test_paths_are_as_good_as_strings():
    found = TrainConfig(Path("model"), [Path("a.txt"), "b.txt"], "run", eval_data=Path("c.txt"), start_from=Path("d"))
    assert (found.model, found.data, found.eval_data, found.start_from) == (
        "model",
        ("a.txt", "b.txt"),
        ("c.txt",),
        "d",
    )
    assert found.output == Path("run")


def test_a_sample_needs_a_prompt_and_a_length():
    assert list(config(prompt="").problems()) == ["prompt is empty"]
    assert list(config(prompt="a", sample_tokens=0).problems()) == ["sample_tokens must be above 0; found 0"]


def test_a_seed_is_one_that_every_library_takes():
    assert list(config(seed=2**32).problems()) == ["seed must be below 2**32, as NumPy has it; found 4294967296"]


def test_streams_and_chats_need_what_they_need():
    assert list(config(streaming=True).problems()) == [
        "streaming needs steps: the length of the data is not known beforehand"
    ]
    assert "as_chat is for prompts" in "".join(config(as_chat=True, messages_column="m").problems())
    assert "augment changes images" in "".join(config(augment=("flip",)).problems())


def test_a_missing_library_for_8_bits_is_named(monkeypatch):
    monkeypatch.setattr("doratune.train.checks.installed", lambda name: False)
    for values in ({"optimizer": "adamw_8bit"}, {"quantize": "nf4"}):
        assert "needs bitsandbytes, which is not installed: pip install 'doratune[quant]'" in "".join(
            config(**values).problems()
        )


def test_a_new_head_is_saved_with_the_adapter():
    made = config(adapter=AdapterOptions(modules_to_save=("norm",))).adapter_config(["classifier", "norm"])
    assert made.modules_to_save == ("norm", "classifier")


def test_two_methods_that_contradict_each_other_are_refused():
    with pytest.raises(dt.AdapterError, match=r"method is 'dora', but the adapter's is 'lora'"):
        config(adapter=dt.AdapterConfig(method="lora")).adapter_config()
