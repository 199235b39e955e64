"""What lies in a merged model's folder besides its weights."""

import json

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer

from doratune.cli import main
from inference.small import TEMPLATE, save_moved, save_writer
from train.tiny import CHAT_TEMPLATE, chat_tokenizer, llama, save_image_folder, save_vision_model, tokenizer


def merge(adapter, output, *more):
    return main(["merge", str(adapter), "--output", str(output), *map(str, more)])


@pytest.mark.parametrize("config", [False, True], ids=["as TRL and our checkpoints", "with a config, as Axolotl"])
@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["base without template", "base with another"])
def test_the_adapters_own_tokenizer_goes_with_it(tmp_path, template, config, capsys):
    base = save_writer(tmp_path / "base", template)
    adapter = save_moved(tmp_path / "adapter", base)
    chat_tokenizer().save_pretrained(adapter)
    if config:
        llama().config.save_pretrained(adapter)
    assert merge(adapter, tmp_path / "merged") == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == CHAT_TEMPLATE
    capsys.readouterr()
    written = []
    for folder in (adapter, tmp_path / "merged"):
        assert main(["generate", str(folder), "--chat", "--prompt", "hello", "--max-tokens", "6"]) == 0
        written.append(capsys.readouterr().out)
    assert written[0] == written[1]


def test_a_tokenizer_of_words_and_merges_goes_with_it(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    words = tokenizer().get_vocab()
    (tmp_path / "base" / "vocab.json").write_text(json.dumps({"<|endoftext|>": 0, **words}))
    (tmp_path / "base" / "merges.txt").write_text("#version: 0.2\n")
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tokenizer_class": "GPT2Tokenizer"}))
    adapter = save_moved(tmp_path / "adapter", tmp_path / "base")
    assert merge(adapter, tmp_path / "merged") == 0
    expected = AutoTokenizer.from_pretrained(tmp_path / "base")("once")["input_ids"]
    assert len(expected) == 4
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("once")["input_ids"] == expected


def test_a_base_without_any_is_merged_without(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    assert merge(save_moved(tmp_path / "adapter", tmp_path / "base"), tmp_path / "merged") == 0
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}


def test_a_head_of_zeros_can_be_verified(tmp_path, capsys):
    model = llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(tmp_path / "base")
    adapter = save_moved(tmp_path / "adapter", tmp_path / "base")
    assert merge(adapter, tmp_path / "merged", "--verify") == 0
    assert "logits differ by 0.00e+00 at most" in capsys.readouterr().out


def test_images_are_scaled_as_the_base_says(tmp_path, capsys):
    from peft import LoraConfig, get_peft_model
    from transformers import ViTForImageClassification, ViTImageProcessor

    save_vision_model(tmp_path / "vit")
    torch.manual_seed(0)
    model = ViTForImageClassification.from_pretrained(tmp_path / "vit")
    model.save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.1] * 3).save_pretrained(tmp_path / "vit")
    config = LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "query"])
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    assert merge(tmp_path / "adapter", tmp_path / "merged") == 0
    name = "preprocessor_config.json"
    assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "vit" / name).read_bytes()
    photos = save_image_folder(tmp_path / "photos", 4)
    capsys.readouterr()
    found = []
    for folder in (tmp_path / "adapter", tmp_path / "merged"):
        assert main(["predict", str(folder), str(photos), "--json"]) == 0
        found.append([json.loads(line)["probability"] for line in capsys.readouterr().out.splitlines()])
    assert found[0] == pytest.approx(found[1], abs=1e-5)


@pytest.mark.parametrize(
    "error",
    [SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), OSError(28, "full")],
)
def test_a_full_disk_is_one_message(tmp_path, monkeypatch, capsys, error):
    llama().save_pretrained(tmp_path / "base")
    adapter = save_moved(tmp_path / "adapter", tmp_path / "base")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fail)
    assert merge(adapter, tmp_path / "merged") == 1
    said = capsys.readouterr().err
    assert f"cannot write the merged model to {tmp_path / 'merged'}: " in said
    assert ". Make room, or name an output on another disk" in said
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}, "nothing is left behind"


def test_an_output_that_is_a_file(tmp_path, capsys):
    adapter = save_moved(tmp_path / "adapter", save_writer(tmp_path / "base"))
    (tmp_path / "merged").touch()
    assert merge(adapter, tmp_path / "merged") == 1
    assert f"output {tmp_path / 'merged'} is a file; name a folder" in capsys.readouterr().err
