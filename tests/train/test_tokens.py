import pytest

import doratune as dt
from doratune.train import chats
from doratune.train import tokens as module
from doratune.train.gather import BadRow
from train.tiny import chat_tokenizer, sentencepiece_tokenizer, tokenizer


def learnt(example, made):
    return made.decode([label for label in example.labels if label != module.IGNORED])


def test_no_token_is_lost_or_doubled_over_pieces(monkeypatch):
    monkeypatch.setattr(module, "PIECE", 7)
    text = "one two\n\nthree\n\n\n four five six\n\nseven"
    assert "".join(module._pieces(text)) == text
    whole = tokenizer()(text)["input_ids"] + [256]
    assert module.document(text, tokenizer()).ids.tolist() == whole


def test_loss_is_on_the_completion_and_the_end_sign():
    made = tokenizer()
    example = module.completion("ask ", "tell", made, learn_prompt=False)
    assert made.decode(example.ids) == "ask tell<end>"
    assert learnt(example, made) == "tell<end>"
    assert learnt(module.completion("ask ", "tell", made, learn_prompt=True), made) == "ask tell<end>"


def test_a_start_sign_comes_where_the_tokenizer_puts_one():
    from tokenizers.processors import TemplateProcessing

    made = tokenizer()
    made.bos_token = "<end>"
    assert module.completion("a", "b", made, False).ids[0] != 256
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 256)])
    assert module.completion("a", "b", made, False).ids.tolist() == [256, *tokenizer()("ab")["input_ids"], 256]


def test_a_prompt_has_the_signs_before_a_text_and_none_behind():
    made = sentencepiece_tokenizer()
    assert made("once upon")["input_ids"] == [1, 3, 4, 2]
    assert module.opening("once upon", made) == [1, 3, 4]
    assert module.completion("once upon", "a", made, False).ids.tolist() == [1, 3, 4, 5, 2]
    assert module.plain("once upon", made) == [3, 4]
    made.bos_token = None  # as encoders, whose first sign is no beginning of a text
    assert module.opening("once upon", made) == [1, 3, 4]


def test_a_chat_is_learnt_where_the_assistant_speaks():
    made = chat_tokenizer()
    turns = [("system", "be"), ("user", "hi"), ("assistant", "yes"), ("user", "and"), ("assistant", "no")]
    example = module.chat([{"role": r, "content": c} for r, c in turns], made, learn_all=False)
    assert made.decode(example.ids) == "[system]be<end>[user]hi<end>[assistant]yes<end>[user]and<end>[assistant]no<end>"
    assert learnt(example, made) == "yes<end>no<end>"
    other = module.chat([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}], made, learn_all=False)
    assert learnt(other, made) == "yes<end>"
    assert learnt(module.chat([{"role": "assistant", "content": "x"}], made, True), made) == "[assistant]x<end>"


def test_a_template_that_changes_earlier_turns_is_refused_for_completions_only():
    made = chat_tokenizer()
    made.chat_template = "{{ messages|length }}" + made.chat_template
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    with pytest.raises(BadRow, match=r"chat template changes earlier turns.*--loss-on all"):
        module.chat(turns, made, learn_all=False)
    assert module.chat(turns, made, learn_all=True).learns


def test_marks_of_the_template_are_used_where_there_are():
    """Qwen3's template drops the thoughts of earlier turns; TRL has a version of it that does not, with marks."""
    from importlib import resources

    made = chat_tokenizer()
    assert module.marked_template(made) is None
    made.chat_template = (resources.files("trl") / "chat_templates" / "qwen3.jinja").read_text()
    marked = module.marked_template(made)
    turns = [("user", "wolf"), ("assistant", "yes"), ("user", "bear"), ("assistant", "no")]
    messages = [{"role": r, "content": c} for r, c in turns]
    with pytest.raises(BadRow, match="changes earlier turns"):
        module.chat(messages, made, learn_all=False)
    example = module.chat(messages, made, learn_all=False, marked=marked)
    text = learnt(example, made)
    assert text.index("yes") < text.index("no")
    assert "wolf" not in text
    assert "bear" not in text
    made.chat_template = marked
    assert module.marked_template(made) == marked


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("hello", "expected a list of messages, found 'hello'"),
        ([], "expected a list of messages"),
        (["hi"], "message 1: expected role and content"),
        ([{"role": "usr", "content": "x"}], "message 1: role must be one of system.*found 'usr'"),
        (
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}],
            r"message 2 \(assistant\) has no content",
        ),
        ([{"role": "user", "content": "x"}], "nothing to learn"),
    ],
)
def test_wrong_chats(messages, said):
    with pytest.raises(BadRow, match=said):
        module.chat(messages, chat_tokenizer(), learn_all=False)


def test_a_template_that_refuses_is_heard():
    made = chat_tokenizer()
    made.chat_template = "{{ raise_exception('no system please') }}"
    with pytest.raises(BadRow, match="no system please"):
        module.chat([{"role": "assistant", "content": "x"}], made, False)


def test_a_model_without_a_template_is_named():
    with pytest.raises(dt.AdapterError, match="tokenizer of M has no chat template"):
        module.require_template(tokenizer(), "M")


@pytest.mark.parametrize(("value", "said"), [(None, "expected text, found None"), (3, "found 3"), (" \n", "is empty")])
def test_empty_and_other_values(value, said):
    with pytest.raises(BadRow, match=said):
        module.document(value, tokenizer())
    with pytest.raises(BadRow, match=said):
        module.completion("x", value, tokenizer(), False)


def test_whether_anything_is_learnt():
    example = module.completion("abc", "de", tokenizer(), False)
    assert not example.cut(3).learns
    assert example.cut(4).learns
    assert not module.Tokens.of([7]).learns


def test_null_fields_of_a_chat_are_absent_fields():
    """Llama 3's template refuses whatever has a field tool_calls; tables with one have it in every row."""
    made = chat_tokenizer()
    made.chat_template = (
        "{% for m in messages %}{% if 'tool_calls' in m or 'name' in m %}{{ raise_exception('one call at a time') }}"
        "{% endif %}[{{ m['role'] }}]{{ m['content'] }}<end>{% endfor %}"
    )
    turns = [
        {"role": "user", "content": "hi", "tool_calls": None, "name": None},
        {"role": "assistant", "content": "yes", "tool_calls": [], "name": None},
    ]
    assert made.decode(module.chat(turns, made, learn_all=True).ids) == "[user]hi<end>[assistant]yes<end>"
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert chats.turns_of([call]) == [call]
    called = {"name": "f", "arguments": {"x": 1, "y": None}}  # as a table has it, if others have y
    (turn,) = chats.turns_of([{**call, "tool_calls": [called]}])
    assert turn["tool_calls"] == [{"name": "f", "arguments": {"x": 1}}]
    assert chats.tools_of([{"name": "f", "parameters": {"x": {"type": "int"}, "y": None}}]) == [
        {"name": "f", "parameters": {"x": {"type": "int"}}}
    ]


def test_tools_of_a_chat_reach_the_template():
    made = chat_tokenizer()
    made.chat_template = "{% if tools %}{{ tools | map(attribute='name') | join }}<end>{% endif %}" + made.chat_template
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    for tools in ([{"name": "add"}], '[{"name": "add"}]'):
        example = module.chat(turns, made, learn_all=False, tools=tools)
        assert made.decode(example.ids) == "add<end>[user]hi<end>[assistant]yes<end>"
        assert learnt(example, made) == "yes<end>"
    for tools in (None, "", []):
        assert module.chat(turns, made, True, tools=tools) == module.chat(turns, made, True)
    with pytest.raises(BadRow, match="tools: expected a list of functions, found 'add'"):
        module.chat(turns, made, True, tools='"add"')
    with pytest.raises(BadRow, match="tools: expected a list of functions, or its JSON: Expecting value"):
        module.chat(turns, made, True, tools="add")


def test_half_a_character_is_a_bad_row():
    made = chat_tokenizer()
    for use in (
        lambda text: module.document(text, made),
        lambda text: module.completion("ask", text, made, False),
        lambda text: module.chat([{"role": "assistant", "content": text}], made, True),
    ):
        use("ab\U0001f600")
        with pytest.raises(BadRow, match=r"character 3 is \\ud83d, half of one"):
            use("ab\ud83d")
