import pytest
import torch

import doratune as dt
from doratune.train import TrainConfig
from doratune.train import text as module
from train.tiny import llama, tokenizer, words


def config(tmp_path, texts, **values):
    files = []
    for number, content in enumerate(texts):
        path = tmp_path / f"{number}.txt"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        files.append(str(path))
    return TrainConfig(model="m", data=tuple(files), **values)


def all_tokens(blocks):
    return [row["input_ids"] for part in (blocks.train, blocks.held_out) for row in part]


def test_documents_are_joined_with_an_end_sign_and_cut_into_equal_blocks(tmp_path):
    blocks = module.load_blocks(config(tmp_path, ["a" * 50, "b" * 40], max_length=10), tokenizer())
    tokens = all_tokens(blocks)
    assert {len(block) for block in tokens} == {10}
    assert len(tokens) == 9
    assert blocks.unused == 2  # 50 + end + 40 + end
    text = tokenizer().decode([t for block in sorted(tokens) for t in block])
    assert text.count("a") == 50
    assert text.count("<end>") == 1  # the second lies in the unused rest


def test_no_token_is_lost_or_doubled_over_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 7)
    text = "one two\n\nthree\n\n\n four five six\n\nseven"
    assert "".join(module._pieces(text)) == text
    whole = tokenizer()(text)["input_ids"] + [256]
    assert module._tokens(text, tokenizer()) == whole


def test_the_held_out_part_does_not_depend_on_the_seed(tmp_path):
    first, second = (
        module.load_blocks(config(tmp_path, [words(100)], max_length=16, seed=seed), tokenizer()) for seed in (0, 1)
    )
    assert first.held_out["input_ids"] == second.held_out["input_ids"]
    held = {tuple(row) for row in first.held_out["input_ids"]}
    assert not held & {tuple(row) for row in first.train["input_ids"]}
    assert len(first.held_out) == round(0.1 * (len(first.train) + len(first.held_out)))


def test_eval_data_is_used_as_it_is(tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("x" * 32)
    blocks = module.load_blocks(config(tmp_path, ["a" * 64], max_length=16, eval_data=(str(other),)), tokenizer())
    assert (len(blocks.train), len(blocks.held_out)) == (4, 2)


def test_too_little_text_is_said(tmp_path):
    with pytest.raises(dt.AdapterError, match=r"fills 0 blocks of 512 .* smaller max_length"):
        module.load_blocks(config(tmp_path, ["short"]), tokenizer())


def test_problems_of_files(tmp_path):
    files = config(tmp_path, ["", " \n ", b"\xff\xfe\x00", "good"])
    files.data = (*files.data, str(tmp_path / "absent.txt"), str(tmp_path))
    found = list(module.problems(files))
    assert len(found) == 5
    for line, part in zip(found, ("is empty", "white space", "not UTF-8", "no such file", "is a folder"), strict=True):
        assert part in line


def test_collate_predicts_every_token():
    batch = module.collate([{"input_ids": [1, 2]}, {"input_ids": [3, 4]}])
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [[1, 2], [3, 4]]
    assert batch["labels"] is not batch["input_ids"]


def test_continuation_is_repeatable_and_leaves_the_mode(tmp_path):
    model = llama().train()
    first = module.continuation(model, tokenizer(), "once", 5)
    assert first == module.continuation(model, tokenizer(), "once", 5)
    assert model.training
    with torch.no_grad():
        ids = tokenizer()("once", return_tensors="pt")["input_ids"]
        expected = int(model.eval()(ids).logits[0, -1].argmax())
    assert first == "" or tokenizer()(first)["input_ids"][0] == expected
