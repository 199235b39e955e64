import pytest
from transformers import BertConfig, GPT2Config, MambaConfig, OPTConfig, RobertaConfig

import doratune as dt
from doratune.train import TrainConfig
from doratune.train import positions as module
from doratune.train.tasks import classification, text
from train.tiny import reviews, save_encoder, save_model, save_rows, tokenizer, write_text

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 257}
KINDS = {
    "gpt2": (GPT2Config(n_positions=40, n_embd=16, n_layer=1, n_head=2, vocab_size=257), "text-generation", 40),
    "opt": (OPTConfig(max_position_embeddings=40, ffn_dim=16, word_embed_proj_dim=16, **SMALL), "text-generation", 40),
    "bert": (BertConfig(max_position_embeddings=40, **SMALL), "text-classification", 40),
    "roberta": (RobertaConfig(max_position_embeddings=40, pad_token_id=1, **SMALL), "text-classification", 38),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_of_positions_has_an_end(tmp_path, kind):
    config, task, most = KINDS[kind]
    config.save_pretrained(tmp_path)
    options = TrainConfig(str(tmp_path), ("d",), task=task)
    module.check_length(options, most, pytest.fail)
    with pytest.raises(dt.AdapterError, match=rf"texts of {most + 1} tokens, .* for {most}; use --max-length {most} "):
        module.check_length(options, most + 1, pytest.fail)


def test_rotary_models_are_told_of(tmp_path):
    said = []
    options = TrainConfig(str(save_model(tmp_path)), ("d",))
    module.check_length(options, 128, said.append)
    assert not said
    module.check_length(options, 129, said.append)
    assert said == [f"there are texts of 129 tokens (max_length); {tmp_path} was made for 128"]


def test_models_without_positions_take_any_length(tmp_path):
    MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=257).save_pretrained(tmp_path)
    module.check_length(TrainConfig(str(tmp_path), ("d",)), 10**6, pytest.fail)


def test_texts_to_classify_count_as_they_are_cut(tmp_path):
    long = [{"review": "wolf " * 20, "label": row["label"]} for row in reviews(8)]
    data = (str(save_rows(tmp_path / "rows.jsonl", long)),)
    options = {"model": str(save_encoder(tmp_path / "model")), "data": data, "task": "text-classification"}
    with pytest.raises(dt.AdapterError, match=r"max_length is 512, and .* texts of 100 tokens.* --max-length 64"):
        classification.prepare(TrainConfig(**options), lambda _: None)
    classification.prepare(TrainConfig(**options, max_length=64), lambda _: None)


@pytest.mark.parametrize("rows", [False, True])
def test_texts_to_write_count_as_they_are_cut(tmp_path, rows):
    KINDS["gpt2"][0].save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    pairs = [{"prompt": "ask", "completion": "tell " * 20}] * 4
    data = save_rows(tmp_path / "r.jsonl", pairs) if rows else write_text(tmp_path / "t.txt")
    for packing in (None, True):
        with pytest.raises(dt.AdapterError, match="positions for 40"):
            text.prepare(TrainConfig(str(tmp_path / "model"), (str(data),), packing=packing, max_length=60), print)
    text.prepare(TrainConfig(str(tmp_path / "model"), (str(data),), max_length=40), print)
    if rows:  # short enough, whatever max_length is
        save_rows(data, [{"prompt": "ask", "completion": "tell"}] * 4)
        text.prepare(TrainConfig(str(tmp_path / "model"), (str(data),), packing=True, max_length=60), print)
