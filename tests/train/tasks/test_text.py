import re

import datasets
import pytest
import torch
import transformers

import doratune as dt
from doratune.train import TrainConfig, sources
from doratune.train.tasks import text as module
from train.tiny import llama, save_chat_model, save_model, save_rows, tokenizer, words


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return str(save_chat_model(tmp_path_factory.mktemp("chat")))


@pytest.fixture
def said():
    return []


def texts(tmp_path, model, contents, **values):
    files = []
    for number, content in enumerate(contents):
        path = tmp_path / f"{number}.txt"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        files.append(str(path))
    return TrainConfig(model=model, data=tuple(files), **values)


def rows(tmp_path, model, values, **options):
    return TrainConfig(model=model, data=(str(save_rows(tmp_path / "rows.jsonl", values)),), **options)


PAIRS = [{"prompt": f"ask {i} ", "completion": "tell " * (i % 4 + 1)} for i in range(20)]
CHATS = [
    {"messages": [{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": "tell"}]} for i in range(20)
]


def decoded(part, made=None):
    made = made or tokenizer()
    return [(made.decode(row["input_ids"]), made.decode([t for t in row["labels"] if t != -100])) for row in part]


def test_documents_are_joined_with_an_end_sign_and_cut_into_equal_blocks(tmp_path, model, said):
    found = module.prepare(texts(tmp_path, model, ["a" * 50, "b" * 40], max_length=10), said.append)
    tokens = [row["input_ids"] for part in (found.train, found.held_out) for row in part]
    assert {len(block) for block in tokens} == {10}
    assert len(tokens) == 9
    text = tokenizer().decode([t for block in sorted(tokens) for t in block])
    assert text.count("a") == 50
    assert text.count("<end>") == 1  # the second lies in the unused rest
    assert said == ["8 blocks of 10 tokens to train on, 1 held out; 2 tokens at the end fill no block"]


def test_the_held_out_part_does_not_depend_on_the_seed(tmp_path, model, said):
    first, second = (
        module.prepare(texts(tmp_path, model, [words(100)], max_length=16, seed=seed), said.append) for seed in (0, 1)
    )
    held = {tuple(row["input_ids"]) for row in first.held_out}
    assert held == {tuple(row["input_ids"]) for row in second.held_out}
    assert not held & {tuple(row["input_ids"]) for row in first.train}
    assert len(first.held_out) == round(0.1 * (len(first.train) + len(first.held_out)))


def test_eval_data_is_used_as_it_is(tmp_path, model, said):
    other = tmp_path / "other.txt"
    other.write_text("x" * 32)
    found = module.prepare(texts(tmp_path, model, ["a" * 64], max_length=16, eval_data=(str(other),)), said.append)
    assert (len(found.train), len(found.held_out)) == (4, 2)


def test_too_little_text_is_said(tmp_path, model, said):
    with pytest.raises(dt.AdapterError, match=r"fills 0 blocks of 512 .* smaller max_length"):
        module.prepare(texts(tmp_path, model, ["short"]), said.append)


def test_documents_can_stand_for_themselves(tmp_path, model, said):
    config = rows(tmp_path, model, [{"text": "abc"}, {"text": "de"}], packing=False, max_length=3)
    found = module.prepare(config, said.append)
    assert sorted(decoded([*found.train, *found.held_out])) == [("abc", "abc"), ("de<end>", "de<end>")]
    assert "1 of 1 examples" in "".join(said)


def test_files_that_are_packed_and_patterns(tmp_path, model):
    files = texts(tmp_path, model, ["good"])
    packed = tmp_path / "chats.jsonl.gz"
    packed.write_bytes(b"\x1f\x8b\x08")
    files.data = (str(packed), str(tmp_path / "*.jsonl"))
    one, other = module.problems(files)
    assert one == f"data {packed} is compressed; unpack it (gunzip) and name what is in it"
    assert other.endswith(": no such file; patterns are for the shell: leave out the quotes, or name the files")


def test_problems_of_files(tmp_path, model):
    files = texts(tmp_path, model, ["", " \n ", b"\xff\xfe\x00", "good"])
    files.data = (*files.data, str(tmp_path / "absent.txt"), str(tmp_path))
    found = list(module.problems(files))
    assert len(found) == 5
    for line, part in zip(
        found, ("is empty", "white space", "not UTF-8", "no such file", "image-classification"), strict=True
    ):
        assert part in line


def test_prompts_and_completions(tmp_path, model, said):
    found = module.prepare(rows(tmp_path, model, PAIRS), said.append)
    assert (len(found.train), len(found.held_out)) == (18, 2)
    for whole, learnt in decoded([*found.train, *found.held_out]):
        assert whole.startswith("ask")
        assert learnt == whole[whole.index("tell") :]
    assert said[0] == "columns: prompt = 'prompt' (guessed), completion = 'completion' (guessed)"


def test_columns_that_are_passed_over_are_named(tmp_path, model, said):
    pairs = [{**pair, "rejected": "x", "label": False} for pair in PAIRS]
    module.prepare(rows(tmp_path, model, pairs), said.append)
    assert said[0].endswith("completion = 'completion' (guessed); passed over: 'rejected', 'label'")
    said.clear()
    many = [{"text": "abc " * 20, **{f"c{number}": 1 for number in range(9)}}]
    module.prepare(rows(tmp_path, model, many, max_length=4), said.append)
    assert said[0].endswith("; passed over: 'c0', 'c1', 'c2', 'c3', 'c4', 'c5', and 3 more")


def test_prompts_of_messages(tmp_path, chat_model, said):
    """TRL's form: the answers that are in the prompt are not learnt."""
    before = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "?"},
    ]
    pairs = [{"prompt": before, "completion": [{"role": "assistant", "content": "yes"}]}] * 20
    found = module.prepare(rows(tmp_path, chat_model, pairs), said.append)
    whole = "[user]hi<end>[assistant]no<end>[user]?<end>[assistant]yes<end>"
    assert set(decoded([*found.train, *found.held_out])) == {(whole, "yes<end>")}
    with pytest.raises(dt.AdapterError, match="completion: expected messages, as the prompt has, found 'yes'"):
        module.prepare(rows(tmp_path, chat_model, [{"prompt": before, "completion": "yes"}]), said.append)


def test_columns_beside_chats(tmp_path, chat_model, said):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    row = {"messages": messages, "system_prompt": "be", "tools": [{"name": "add"}]}
    found = module.prepare(rows(tmp_path, chat_model, [row] * 20), said.append)
    assert set(decoded(found.train)) == {("[system]be<end>[user]hi<end>[assistant]yes<end>", "yes<end>")}
    assert said[0] == "columns: messages = 'messages' (guessed)"
    assert any(line.startswith("20 chats have a column 'tools', which the model's chat template") for line in said)


def test_prompts_that_run_into_their_completions_are_told(tmp_path, model, said):
    module.prepare(rows(tmp_path, model, [{"question": "How many?", "answer": "4"}] * 20), said.append)
    (told,) = (line for line in said if "run into" in line)
    assert told.startswith("20 prompts run into their completions, such as 'How many?4': nothing is put between them")
    said.clear()
    for prompt, completion in (("How many? ", "4"), ("How many?", " 4"), ("<|assistant|>", "4"), ("How many:", "4")):
        module.prepare(rows(tmp_path, model, [{"prompt": prompt, "completion": completion}] * 20), said.append)
    assert not any("run into" in line for line in said)


def test_loss_on_all(tmp_path, model, said):
    found = module.prepare(rows(tmp_path, model, PAIRS, loss_on="all"), said.append)
    assert all(whole == learnt for whole, learnt in decoded(found.train))


ALPACA = {"instruction": "ask", "output": "tell"}


def test_columns_that_the_first_row_lacks_are_not_dropped(tmp_path, model, said):
    values = [ALPACA, *[{**ALPACA, "input": "words"}] * 19]
    with pytest.raises(dt.AdapterError, match=r"rows.jsonl:1 and the rows after it: the prompt could be 'instruction'"):
        module.prepare(rows(tmp_path, model, values), said.append)
    template = rows(tmp_path, model, values, prompt_template="{instruction} {input}")
    with pytest.raises(dt.AdapterError, match=r"1 of 20 rows cannot be used.*\n.*rows.jsonl:1: .*KeyError: 'input'"):
        module.prepare(template, said.append)


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_of_rows_that_were_not_looked_at_are_not_dropped(tmp_path, model, said, monkeypatch, streaming):
    monkeypatch.setattr(sources, "NAMED", 5)
    options = {"streaming": True, "steps": 1} if streaming else {}
    values = [*[ALPACA] * 9, {**ALPACA, "input": "words"}]
    with pytest.raises(dt.AdapterError, match=r"rows.jsonl:10: the prompt could be 'instruction' alone or together"):
        module.prepare(rows(tmp_path, model, values, **options), said.append)


def test_a_first_row_without_text_is_a_bad_row(tmp_path, model, said):
    values = [{"note": "x"}, *[{"text": "once upon a time"}] * 19]
    with pytest.raises(dt.AdapterError, match=r"rows.jsonl:1: has no column 'text'; it has note"):
        module.prepare(rows(tmp_path, model, values), said.append)
    for options in ({}, {"text_column": "text"}):
        module.prepare(rows(tmp_path, model, values, max_length=8, skip_bad=True, **options), said.append)
        assert any(line.startswith("1 of 20 rows left out (--skip-bad)") for line in said)
        said.clear()


def test_a_prompt_template_takes_any_columns(tmp_path, model, said):
    values = [{"instruction": "do", "input": f"i{n}", "output": "out"} for n in range(4)]
    config = rows(tmp_path, model, values, prompt_template="<{instruction}|{input}>\\n")
    found = module.prepare(config, said.append)
    assert decoded(found.train)[0][0].startswith("<do|i0>\n")
    said_of = {
        "<{instrucion}>": "asks for 'instrucion'; the columns are instruction, input, output",
        "<{instruction.absent}>": "rows.jsonl:1: prompt_template cannot be filled: AttributeError",
        "{": "double braces that are text",
    }
    for template, message in said_of.items():
        config.prompt_template = template
        with pytest.raises(dt.AdapterError, match=message):
            module.prepare(config, said.append)


def test_a_prompt_template_takes_texts_and_numbers(tmp_path, model, said):
    values = [{"ask": None, "n": 3, "parts": ["x", {"y": "z"}], "output": "out"}] * 2
    config = rows(tmp_path, model, values, prompt_template="<{ask}|{n:02d}|{parts[0]}|{parts[1][y]}>")
    assert decoded(module.prepare(config, said.append).train)[0][0] == "<|03|x|z>out<end>"
    for field, kind in (("parts", "a list"), ("parts[1]", "an object")):
        config.prompt_template = f"<{{{field}}}>"
        with pytest.raises(
            dt.AdapterError, match=rf"rows.jsonl:1: .*{re.escape(repr(field))} is {kind}, expected text"
        ):
            module.prepare(config, said.append)


@pytest.mark.parametrize("kind", ["bert", "roberta", "bart", "decoder"])
def test_encoders_are_refused_before_data_are_read(tmp_path, kind, said, monkeypatch):
    made = {
        "bert": transformers.BertConfig(),
        "roberta": transformers.RobertaConfig(),
        "bart": transformers.BartConfig(),
        "decoder": transformers.BertConfig(is_decoder=True),
    }[kind]
    made.save_pretrained(tmp_path)
    monkeypatch.setattr(module, "load_tokenizer", lambda _: None)
    monkeypatch.setattr(module, "Reader", lambda *_: {}["read"])
    message = "a bart has an encoder, which would be left out" if kind == "bart" else f"a {kind} is an encoder"
    expected = pytest.raises(dt.AdapterError, match=f"{message}.*name a decoder")
    if kind == "decoder":
        expected = pytest.raises(KeyError, match="read")
    with expected:
        module.prepare(TrainConfig(str(tmp_path), ("d",)), said.append)


def test_chats_and_prompts_as_chats(tmp_path, chat_model, said):
    found = module.prepare(rows(tmp_path, chat_model, CHATS), said.append)
    assert all(learnt == "tell<end>" for _, learnt in decoded(found.train))
    found = module.prepare(rows(tmp_path, chat_model, PAIRS, as_chat=True), said.append)
    assert all(whole.startswith("[user]ask") for whole, _ in decoded(found.train))


def test_tools_of_chats_reach_the_template(tmp_path, chat_model, said, monkeypatch):
    seen = []
    monkeypatch.setattr("doratune.train.tokens.tools_of", seen.append)
    module.prepare(rows(tmp_path, chat_model, [{**chat, "tools": [{"name": "add"}]} for chat in CHATS]), said.append)
    assert seen == [[{"name": "add"}]] * 20


def test_chats_need_a_template(tmp_path, model, said):
    with pytest.raises(dt.AdapterError, match="has no chat template"):
        module.prepare(rows(tmp_path, model, CHATS), said.append)


def test_cuts_are_counted(tmp_path, model, said):
    values = [*PAIRS, {"prompt": "p" * 100, "completion": "c"}, {"prompt": "p", "completion": "c" * 100}]
    config = rows(tmp_path, model, values, max_length=50, eval_data=(str(tmp_path / "rows.jsonl"),))
    module.prepare(config, said.append)
    assert "2 of 22 examples to train on were cut to 50 tokens (max_length)" in said
    assert "1 examples to train on were left out: nothing is to be learnt within 50 tokens (max_length)" in said


def test_bad_rows_are_listed_by_line_or_left_out(tmp_path, model, said):
    values = [*PAIRS, {"prompt": "x"}, {"prompt": "", "completion": "y"}, {"prompt": "x", "completion": 3}, [1]]
    config = rows(tmp_path, model, values)
    with pytest.raises(dt.AdapterError) as caught:
        module.prepare(config, said.append)
    for part in (
        "4 of 24 rows cannot be used",
        "rows.jsonl:21: has no column 'completion'; it has prompt",
        "rows.jsonl:22: prompt is empty",
        "rows.jsonl:23: completion: expected text, found 3",
        "rows.jsonl:24: expected an object with columns, found list",
        "--skip-bad goes on without them",
    ):
        assert part in str(caught.value)
    config.skip_bad = True
    found = module.prepare(config, said.append)
    assert len(found.train) + len(found.held_out) == 20
    assert any(line.startswith("4 of 24 rows left out (--skip-bad), such as") for line in said)


def test_a_padded_batch_gives_each_example_its_own_loss(tmp_path, model, said):
    found = module.prepare(rows(tmp_path, model, PAIRS), said.append)
    batch = found.collate([found.train[i] for i in range(4)])
    network = llama().eval()
    with torch.no_grad():
        together = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for i in range(4):
            alone = network(input_ids=torch.tensor([found.train[i]["input_ids"]])).logits
            assert torch.allclose(together[i, : alone.shape[1]], alone[0], atol=1e-5)
            assert batch["labels"][i].tolist()[alone.shape[1] :] == [-100] * (together.shape[1] - alone.shape[1])


def test_packed_examples_do_not_see_each_other(tmp_path, model, said):
    config = rows(tmp_path, model, PAIRS, loss_on="all", max_length=80)
    plain = module.prepare(config, said.append)
    config.packing = True
    packed = module.prepare(config, said.append)
    assert len(packed.train) < len(plain.train) / 2
    network = llama().eval()
    network.config.use_cache = False  # as while training
    with torch.no_grad():
        batch = packed.collate(list(packed.train))
        together = network(**batch).loss
        alone = [network(**plain.collate([row])).loss * (len(row["input_ids"]) - 1) for row in plain.train]
    count = sum(len(row["input_ids"]) - 1 for row in plain.train)
    assert int((batch["labels"][:, 1:] != -100).sum()) == count
    assert torch.allclose(together, sum(alone) / count, atol=1e-5)


def test_collate_predicts_every_token():
    batch = module.collate_blocks([{"input_ids": [1, 2]}, {"input_ids": [3, 4]}])
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [[1, 2], [3, 4]]
    assert batch["labels"] is not batch["input_ids"]


def test_parts_of_data_sets(tmp_path, model, said):
    whole = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(PAIRS), "test": datasets.Dataset.from_list(PAIRS[:3])}
    )
    whole.save_to_disk(tmp_path / "set")
    name = str(tmp_path / "set")
    found = module.prepare(TrainConfig(model=model, data=(name,), eval_data=(name,)), said.append)
    assert (len(found.train), len(found.held_out)) == (20, 3)
    with pytest.raises(dt.AdapterError, match="has no split 'valid'; it has train, test"):
        module.prepare(TrainConfig(model=model, data=(name,), split="valid"), said.append)
