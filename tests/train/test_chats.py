"""Chats as other programs' data hold them."""

import json
from importlib import resources

import pytest

from doratune.train import chats, tokens
from doratune.train.gather import BadRow
from train.tiny import chat_tokenizer

ASK = {"role": "user", "content": "hi"}
SAY = {"role": "assistant", "content": "yes"}


def with_template(name):
    made = chat_tokenizer()
    made.chat_template = (resources.files("trl") / "chat_templates" / f"{name}.jinja").read_text()
    return made


def learnt(example, made):
    return made.decode([label for label in example.labels if label != tokens.IGNORED])


def test_roles_of_other_programs():
    (turn,) = chats.turns_of([{"from": "human", "value": "hi"}])
    assert (turn["role"], turn["content"]) == ("user", "hi")
    assert [turn["role"] for turn in chats.turns_of([{"role": "function", "content": "7"}])] == ["tool"]
    with pytest.raises(BadRow, match=r"message 1: role must be one of system.*found 'bot'"):
        chats.turns_of([{"from": "bot", "value": "hi"}])


@pytest.mark.parametrize(
    "message",
    [
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},  # LLaMA-Factory
        {"from": "function_call", "value": '[{"name": "add", "arguments": "{\\"a\\": 1}"}]'},
        {
            "role": "assistant",
            "content": None,
            "function_call": {"name": "add", "arguments": '{"a": 1}'},
        },
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
        },
    ],
)
def test_calls_of_functions_are_written_alike(message):
    (turn,) = chats.turns_of([message])
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    assert turn["tool_calls"] == [call]
    assert turn["role"] == "assistant"
    made = with_template("qwen2_5")
    text = made.decode(tokens.chat([ASK, message], made, learn_all=True).ids)
    assert '"arguments": {"a": 1}' in text  # not a text that was quoted once more


def test_templates_to_which_arguments_are_a_text():
    made = chat_tokenizer()
    made.chat_template = (  # as DeepSeek's
        "{% for m in messages if m.tool_calls %}"
        "{{ '```json\n' + m.tool_calls[0].function.arguments + '\n```' }}{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = chats.turns_of([ASK, {"role": "assistant", "content": None, "tool_calls": [call]}])
    assert '```json\n{"a": 1}\n```' in chats.apply_template(made, turns, tokenize=False)
    made.chat_template = "{{ 1 + 'a' }}"
    with pytest.raises(TypeError):
        chats.apply_template(made, turns, tokenize=False)


def test_a_call_that_is_none():
    with pytest.raises(BadRow, match="message 1: expected a function's name and arguments, or their JSON, found 'add'"):
        chats.turns_of([{"from": "function_call", "value": "add"}])


def test_calls_that_the_template_would_drop_are_refused():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    with pytest.raises(BadRow, match="calls functions, which the model's chat template does not write"):
        tokens.chat([ASK, call], chat_tokenizer(), learn_all=True)


def test_a_system_message_of_another_column():
    made = chat_tokenizer()
    example = tokens.chat([ASK, SAY], made, learn_all=False, system="be brief")
    assert made.decode(example.ids) == "[system]be brief<end>[user]hi<end>[assistant]yes<end>"
    assert learnt(example, made) == "yes<end>"
    own = [{"role": "system", "content": "own"}, ASK, SAY]
    assert tokens.chat(own, made, False, system="be brief") == tokens.chat(own, made, False)
    assert tokens.chat([ASK, SAY], made, False, system="") == tokens.chat([ASK, SAY], made, False)
    assert chats.system_of({"system": None, "system_prompt": "be"}) == "be"
    assert chats.system_of({"messages": []}) is None
    with pytest.raises(BadRow, match="system message: expected text, found 3"):
        chats.turns_of([ASK], 3)


def test_chats_written_as_json():
    assert chats.turns_of(json.dumps([ASK, SAY])) == [ASK, SAY]
    with pytest.raises(BadRow, match="expected a list of messages, or its JSON: "):
        chats.turns_of("[{'role': 'user', 'content': 'hi'}]")


def test_content_in_parts():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chats.turns_of([{"role": "user", "content": parts}]) == [{"role": "user", "content": "ab"}]
    with pytest.raises(BadRow, match=r"message 1: expected text, or parts of type text, found \{'type': 'image_url'"):
        chats.turns_of([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}])
    with pytest.raises(BadRow, match=r"message 1 \(user\) has no content"):
        chats.turns_of([{"role": "user", "content": []}])


def test_who_may_say_nothing():
    for role in ("system", "tool"):
        assert chats.turns_of([{"role": role, "content": ""}]) == [{"role": role, "content": ""}]
        with pytest.raises(BadRow, match="has no content"):
            chats.turns_of([{"role": role, "content": None}])


@pytest.mark.parametrize("template", [None, "qwen3"])
def test_answers_with_a_weight_of_zero_are_not_learnt(template):
    made = with_template(template) if template else chat_tokenizer()
    marked = tokens.marked_template(made)
    assert (marked is not None) == (template is not None)
    turns = [ASK, {**SAY, "content": "no", "weight": 0}, ASK, {**SAY, "weight": 1}]
    example = tokens.chat(turns, made, learn_all=False, marked=marked)
    plain = tokens.chat([ASK, {**SAY, "content": "no"}, ASK, SAY], made, learn_all=False, marked=marked)
    assert example.ids == plain.ids
    assert "no" in learnt(plain, made)
    assert "no" not in learnt(example, made)
    assert "yes" in learnt(example, made)
    with pytest.raises(BadRow, match="nothing to learn"):
        tokens.chat(turns[:2], made, learn_all=False, marked=marked)
    with pytest.raises(BadRow, match=r"message 2: weight must be 0 or 1; found 0\.5"):
        tokens.chat([ASK, {**SAY, "weight": 0.5}], made, learn_all=False)


def test_weights_that_the_marks_do_not_tell():
    made = chat_tokenizer()
    one_mark = "{% generation %}{% for m in messages %}{{ m['content'] }}{% endfor %}{% endgeneration %}"
    with pytest.raises(BadRow, match="does not mark each turn"):
        tokens.chat([ASK, {**SAY, "weight": 0}, ASK, SAY], made, learn_all=False, marked=one_mark)
