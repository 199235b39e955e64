import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

import doratune as dt
from doratune.inference.prompts import Prompt, PromptColumns, chat, read_prompts
from doratune.train.information import Information
from inference.small import TEMPLATE
from train.tiny import tokenizer

USER = {"role": "user", "content": "hello"}
ASSISTANT = {"role": "assistant", "content": "hi"}


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_lines_of_a_text_file(tmp_path):
    path = write(tmp_path / "p.txt", "once", "", "  ", "upon")
    assert read_prompts(path) == [Prompt("once"), Prompt("upon")]
    assert read_prompts(path, as_chat=True, system="Be short.")[1].messages == (
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "upon"},
    )


def test_rows_of_a_table(tmp_path):
    path = write(
        tmp_path / "p.jsonl",
        {"prompt": "once", "completion": "upon"},
        {"messages": [USER]},
        {"messages": [USER, ASSISTANT]},
    )
    once, open_chat, answered = read_prompts(path)
    assert once == Prompt("once")
    assert open_chat == answered == Prompt(messages=(USER,)), "the answer is the model's to write"
    assert open_chat.as_json() == {"messages": [USER]}
    assert once.as_json() == {"prompt": "once"}
    assert (once.shown(), open_chat.shown()) == ("once", "hello")
    found = write(tmp_path / "p.jsonl", {"conversations": [{"from": "human", "value": "hello"}]}, {"question": "once"})
    assert read_prompts(found) == [open_chat, once], "columns and roles as in training"
    (tmp_path / "p.csv").write_text("prompt,more\nonce,1\n")
    assert read_prompts(tmp_path / "p.csv") == [Prompt("once")]


def test_tools_of_a_chat_reach_the_template(tmp_path):
    path = write(tmp_path / "p.jsonl", {"messages": [USER], "tools": [{"name": "add"}]}, {"messages": [USER]})
    made = tokenizer()
    made.chat_template = "{{ tools }}" + TEMPLATE
    with_tools, without = read_prompts(path)
    assert with_tools.render(made).startswith("[{'name': 'add'}]")
    assert without.render(made).startswith("None")


def test_prompts_of_several_columns(tmp_path):
    path = write(tmp_path / "p.jsonl", {"instruction": "add", "input": "1 2", "output": "3"})
    with pytest.raises(dt.AdapterError, match="'instruction' alone or together with 'input'; say which: --prompt-temp"):
        read_prompts(path)
    for columns, expected in (
        (PromptColumns(column="instruction"), "add"),
        (PromptColumns(template="{instruction}:\\n{input}"), "add:\n1 2"),
        (PromptColumns(trained="{instruction}<{input}>"), "add<1 2>"),
        (PromptColumns(column="output", trained="{instruction}<{input}>"), "3"),
    ):
        assert read_prompts(path, columns=columns) == [Prompt(expected)]
    for columns, problem in (
        (PromptColumns(column="absent"), "p.jsonl:1: has no column 'absent'; it has instruction, input, output"),
        (PromptColumns(template="{absent}"), "p.jsonl:1: prompt_template cannot be filled: KeyError: 'absent'"),
        (PromptColumns(template="{"), "p.jsonl:1: prompt_template cannot be filled: ValueError"),
        (PromptColumns(trained="{absent}"), "'instruction' alone or together"),
    ):
        with pytest.raises(dt.AdapterError, match=problem):
            read_prompts(path, columns=columns)


def test_the_template_that_all_adapters_were_trained_with(tmp_path):
    folders = [tmp_path / name for name in ("one", "two", "three", "none")]
    for folder, template in zip(folders, ("{a}", "{a}", "{b}"), strict=False):
        folder.mkdir()
        Information("text-generation", "m", "dora", prompt_template=template).save(folder)
    assert PromptColumns.of(folders[:2]).trained == "{a}"
    assert PromptColumns.of(folders[:3]).trained is PromptColumns.of(folders[2:]).trained is None


def test_every_bad_line_is_listed(tmp_path):
    path = write(
        tmp_path / "p.jsonl",
        "{",
        "[]",
        {"foo": "?"},
        {"prompt": 3},
        {"messages": []},
        {"messages": [ASSISTANT]},
        {"messages": [{"role": "robot", "content": "x"}]},
        {"messages": [{"role": "user"}]},
        {"prompt": "good"},
    )
    with pytest.raises(dt.AdapterError) as caught:
        read_prompts(path)
    said = str(caught.value)
    assert "8 problems" in said
    for number, part in enumerate(
        (
            "is not JSON",
            "expected an object",
            "expected a column prompt or messages, found foo",
            "prompt: expected text, found 3",
            "expected a list",
            "none that is to be answered",
            "role must be one of",
            "(user) has no content",
        ),
        1,
    ):
        assert part in next(line for line in said.splitlines() if f"p.jsonl:{number}:" in line)


def test_no_prompts(tmp_path):
    with pytest.raises(dt.AdapterError, match="holds no prompt"):
        read_prompts(write(tmp_path / "p.txt", "", " "))
    with pytest.raises(dt.AdapterError, match="no such file"):
        read_prompts(tmp_path / "absent.txt")
    with pytest.raises(dt.AdapterError, match="is a folder; expected a file of prompts"):
        read_prompts(tmp_path)


def test_prompts_from_a_pipe():
    reading, writing = os.pipe()
    os.write(writing, b"once\n\nupon\n")
    os.close(writing)
    try:
        assert read_prompts(Path(f"/dev/fd/{reading}")) == [Prompt("once"), Prompt("upon")]
    finally:
        os.close(reading)


def test_a_chat_is_written_in_the_models_template():
    words = tokenizer()
    words.chat_template = TEMPLATE
    prompt = chat("more", "Be short.", [USER, ASSISTANT])
    assert prompt.render(words) == "<system>Be short.\n<user>hello\n<assistant>hi\n<user>more\n<assistant>"
    words.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(dt.AdapterError, match="refuses these messages: no system here"):
        prompt.render(words)
    with pytest.raises(dt.AdapterError, match=r"^p\.jsonl:3: the model's chat template refuses"):
        replace(prompt, where="p.jsonl:3").render(words)
    words.chat_template = None
    with pytest.raises(dt.AdapterError, match="no chat template"):
        prompt.render(words)


def test_of_many_prompts_that_cannot_be_used_some_are_listed(tmp_path):
    path = write(tmp_path / "x.jsonl", *[{"text": "a"}] * 100)
    with pytest.raises(dt.AdapterError, match=r"\(100 problems\)(.*\n){21}  - and 80 more$"):
        read_prompts(path, columns=PromptColumns("absent"))


def test_system_messages_beside_chats_and_prompts_of_messages(tmp_path):
    path = write(
        tmp_path / "p.jsonl", {"messages": [USER], "system": "Be short."}, {"prompt": [USER], "completion": [ASSISTANT]}
    )
    beside, messages = read_prompts(path)
    assert beside.messages == ({"role": "system", "content": "Be short."}, USER)
    assert messages == Prompt(messages=(USER,))
    assert read_prompts(write(path, {"ask": [USER]}), columns=PromptColumns("ask")) == [messages]
