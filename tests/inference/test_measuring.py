import dataclasses

import pytest

import doratune as dt
from doratune.inference.measuring import TAKEN, Measuring
from doratune.train import Information, TrainConfig
from train.tiny import save_rows


@pytest.fixture
def data(tmp_path):
    return [
        str(save_rows(tmp_path / "data.jsonl", [{"tale": "a", "ask": "b", "tell": "c", "grade": "d", "text": "e"}]))
    ]


def noted(task="text-generation", **values):
    return Information(task, "base", values.pop("method", "dora"), **values)


def config(measuring, data, task="text-generation", **told):
    return measuring.config(task, "base", data, told)


def test_what_nobody_says_is_as_in_train(data):
    assert config(Measuring(), data) == TrainConfig("base", tuple(data), split="test")
    assert dataclasses.asdict(Measuring()).items() >= {"batch_size": TrainConfig.batch_size, "dtype": "auto"}.items()


def test_what_was_noted_counts_unless_it_is_said(data):
    options = {"as_chat": True, "loss_on": "all", "max_length": 24, "packing": True}
    about = noted(**options, columns={"prompt": "ask", "completion": "tell"})
    found = config(Measuring(), data, one=about, two=about)
    assert {name: getattr(found, name) for name in options} == options
    assert (found.prompt_column, found.completion_column) == ("ask", "tell")
    said = {"as_chat": False, "loss_on": "completion", "max_length": 99, "packing": False}
    found = config(Measuring(**said), data, one=about)
    assert {name: getattr(found, name) for name in said} == said


def test_files_of_earlier_versions_and_of_others_say_nothing(data):
    old = noted(max_length=24)
    found = config(Measuring(), data, one=old)
    default = TrainConfig("base", tuple(data))
    assert found.max_length == 24
    assert [getattr(found, name) == getattr(default, name) for name in ("as_chat", "loss_on", "packing")] == [True] * 3


def test_columns_that_the_data_lack_are_guessed(data):
    found = config(Measuring(), data, one=noted(columns={"text": "story"}))
    assert found.text_column is None
    found = config(Measuring(), data, one=noted(columns={"completion": "tell"}, prompt_template="{ask}: {what}"))
    assert (found.completion_column, found.prompt_template) == ("tell", None)
    found = config(Measuring(), data, one=noted(columns={"completion": "tell"}, prompt_template="{ask}:"))
    assert found.prompt_template == "{ask}:"


def test_text_files_have_no_columns(tmp_path):
    (tmp_path / "data.txt").write_text("once")
    found = config(Measuring(), [str(tmp_path / "data.txt")], one=noted(columns={"text": "tale"}))
    assert found.text_column is None


def test_one_column_that_is_said_replaces_those_of_training_for_language_models_only(data):
    about = noted(columns={"messages": "ask"})
    found = config(Measuring(text_column="tale"), data, one=about)
    assert (found.text_column, found.messages_column) == ("tale", None)
    about = noted("text-classification", columns={"text": "tale", "label": "tell"})
    found = config(Measuring(label_column="grade"), data, "text-classification", one=about)
    assert (found.text_column, found.label_column) == ("tale", "grade")


def test_adapters_that_were_trained_in_different_ways_ask_for_flags(data):
    one = noted(loss_on="all", max_length=24, columns={"text": "tale"})
    two = noted(loss_on="completion", max_length=32, columns={"prompt": "ask", "completion": "tell"})
    with pytest.raises(dt.AdapterError) as caught:
        config(Measuring(), data, one=one, two=two)
    assert caught.value.problems == [
        "text_column: one 'tale', two None; say which with --text-column",
        "prompt_column: one None, two 'ask'; say which with --prompt-column",
        "completion_column: one None, two 'tell'; say which with --completion-column",
        "loss_on: one 'all', two 'completion'; say which with --loss-on",
        "max_length: one 24, two 32; say which with --max-length",
    ]
    said = Measuring(text_column="tale", loss_on="all", max_length=16)
    assert config(said, data, one=one, two=two).max_length == 16


@pytest.mark.parametrize(("method", "expected"), [("full", "full"), ("head", "head"), ("lora", "dora"), ("", "dora")])
def test_whole_models_have_the_dtype_of_their_training(data, method, expected):
    assert config(Measuring(), data, one=noted(method=method)).method == expected


def test_options_that_cannot_work_or_have_no_effect():
    wrong = Measuring(batch_size=0, max_length=0, image_column="a", label_column="b")
    assert list(wrong.problems("text-generation")) == [
        "max_length must be above 0; found 0",
        "batch_size must be above 0; found 0",
        "label_column is without effect on text-generation; leave it out",
        "image_column is without effect on text-generation; leave it out",
    ]
    assert len(list(wrong.problems(None))) == 2
    assert "as_chat is without effect" in next(Measuring(as_chat=False).problems("image-classification"))
    assert {option for options in TAKEN.values() for option in options} < {
        field.name for field in dataclasses.fields(TrainConfig)
    }
