import re

import pytest

import doratune as dt
from doratune.train import TrainConfig
from doratune.train.columns import choose, described, roles_of_text
from doratune.train.gather import BadRow, gather, hold_out
from doratune.train.sources import Row


def config(**values):
    return TrainConfig(model="m", data=("d",), **values)


def use(row):
    if row.values["x"] < 0:
        raise BadRow(f"{row.values['x']} is below 0")
    return row.values["x"]


def found(*values):
    return [Row(f"f:{number}", {"x": value}) for number, value in enumerate(values, 1)]


def test_all_bad_rows_are_listed_up_to_a_limit():
    with pytest.raises(dt.AdapterError) as caught:
        gather([*found(1, *[-1] * 30), Row("f:99", problem="cut")], use, config(), print)
    assert "31 of 32 rows cannot be used; --skip-bad goes on without them:\n  - f:2: -1" in str(caught.value)
    assert "f:2: -1 is below 0" in str(caught.value)
    assert "and 11 more" in str(caught.value)


def test_bad_rows_can_be_left_out_but_not_all():
    said = []
    assert gather(found(1, -2, 3), use, config(skip_bad=True), said.append) == [1, 3]
    assert said == ["1 of 3 rows left out (--skip-bad), such as f:2: -2 is below 0"]
    with pytest.raises(dt.AdapterError, match=r"1 of 1 rows cannot be used:\n  - f:1: -2 is below 0"):
        gather(found(-2), use, config(skip_bad=True), said.append)
    with pytest.raises(dt.AdapterError, match="d: no rows"):
        gather([], use, config(), said.append)


def test_holding_out_is_repeatable_and_whole():
    train, held = hold_out(20, 0.1)
    assert (train, held) == hold_out(20, 0.1)
    assert sorted(train + held) == list(range(20))
    assert len(held) == 2
    assert hold_out(1, 0.5) == ([0], [])
    assert len(hold_out(2, 0.9)[0]) == 1


def test_every_class_is_held_out_in_proportion():
    groups = [0] * 80 + [1] * 20
    train, held = hold_out(100, 0.1, groups)
    assert sorted(train + held) == list(range(100))
    assert sum(groups[i] for i in held) == 2
    assert len(held) == 10
    assert {groups[i] for i in hold_out(100, 0.99, groups)[0]} == {0, 1}, "no class is held out whole"
    assert hold_out(3, 0.1, [0, 1, 2])[1] == [], "no class is held out whole"
    for pair in range(4):
        groups = [0, 1, 2, 3]
        groups[pair] = (pair + 1) % 4
        (held,) = hold_out(4, 0.1, groups)[1]
        assert groups.count(groups[held]) == 2, "the one that is held out leaves another"


def test_columns_are_guessed_and_said():
    columns = roles_of_text(config(), ["id", "instruction", "output"], "f:1")
    assert columns == {"prompt": "instruction", "completion": "output"}
    assert "prompt = 'instruction' (guessed)" in described(columns, config())
    assert roles_of_text(config(text_column="id"), ["id", "text"], "f") == {"text": "id"}
    assert roles_of_text(config(), ["messages", "text"], "f") == {"messages": "messages"}
    assert described({"text": "id"}, config(text_column="id")) == "text = 'id'"


@pytest.mark.parametrize("sign", [";", "\t"])
def test_a_wrong_separator_is_said(sign):
    hint = "fields are separated by commas, in .tsv files by tabs"
    for options in ({}, {"text_column": "text"}, {"prompt_template": "{text}"}):
        with pytest.raises(dt.AdapterError, match=re.escape(hint)):
            roles_of_text(config(**options), [f"text{sign}label"], "f.csv:2")
    with pytest.raises(dt.AdapterError, match="no column looks like the label") as caught:
        choose(config(), [f"text{sign}label"], ["text", "label"], "f.csv:2")
    assert str(caught.value).count(hint) == 2
    with pytest.raises(dt.AdapterError) as caught:
        roles_of_text(config(), ["a;b", "c"], "f.csv:2")
    assert hint not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "template", "prompt"),
    [
        (["instruction", "input", "output", "text"], r"{instruction}\n{input}\n", "instruction"),
        (["instruction", "context", "response", "category"], r"{instruction}\n{context}\n", "instruction"),
        (["id", "system_prompt", "question", "response"], r"{system_prompt}\n{question}\n", "question"),
    ],
)
def test_half_a_prompt_is_not_guessed(names, template, prompt):
    with pytest.raises(dt.AdapterError) as caught:
        roles_of_text(config(), names, "f:1")
    assert f'--prompt-template "{template}", or --prompt-column {prompt} to' in str(caught.value)
    completion = "output" if "output" in names else "response"
    assert roles_of_text(config(prompt_column=prompt), names, "f") == {"prompt": prompt, "completion": completion}
    assert roles_of_text(config(prompt_template=template), names, "f") == {"completion": completion}


def test_a_completion_is_no_part_of_a_prompt():
    names = ["question", "input"]
    assert roles_of_text(config(completion_column="input"), names, "f") == {"prompt": "question", "completion": "input"}


def test_columns_that_are_not_there():
    with pytest.raises(
        dt.AdapterError, match=r"f: no column looks like a text.* among foo, bar; name them with --text"
    ):
        roles_of_text(config(), ["foo", "bar"], "f")
    with pytest.raises(dt.AdapterError, match=r"text_column 'txt' is not among the columns \(foo, bar\)"):
        roles_of_text(config(text_column="txt"), ["foo", "bar"], "f")
    with pytest.raises(dt.AdapterError) as caught:
        choose(config(label_column="lbl"), ["foo"], ["text", "label"], "f")
    assert "2 problems" in str(caught.value)
    assert "name it with --text-column" in str(caught.value)
