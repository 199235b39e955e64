"""Files of older versions of transformers, whose models had other names for their layers."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import doratune as dt
from helpers import error, move


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes)).eval()
    return model, lambda m: m(torch.ones(1, 3, 8, 8)).logits


def llava():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text, vision = LlamaConfig(vocab_size=32, **sizes), CLIPVisionConfig(image_size=8, patch_size=4, **sizes)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_id=31)).eval()
    return model, lambda m: m(input_ids=torch.tensor([[1, 5, 2, 3]])).logits


OLD = {
    "vit": [("vit.layers.", "vit.encoder.layer."), ("attention.q_proj", "attention.attention.query")],
    "llava": [("model.language_model.layers", "language_model.model.layers")],
}


def under_old_names(folder, replacements, **options):
    path = folder / "adapter_model.safetensors"
    tensors = {}
    for key, tensor in load_file(path).items():
        for today, old in replacements:
            key = key.replace(today, old)
        tensors[key] = tensor
    save_file(tensors, path, {"format": "pt"})
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | options))


def saved(make, folder, targets):
    model, run = make()
    move(dt.attach(model, dt.AdapterConfig(rank=2, targets=targets)))
    dt.save_adapter(model, folder)
    return run(model).detach()


@pytest.mark.parametrize(
    ("make", "targets", "old_targets"),
    [(vit, ["q_proj"], ["query"]), (llava, r"model\.language_model.*q_proj", r"language_model\.model.*q_proj")],
)
def test_a_file_with_old_names_is_the_same_adapter(make, targets, old_targets, tmp_path):
    expected = saved(make, tmp_path, targets)
    under_old_names(tmp_path, OLD[make.__name__], target_modules=old_targets)
    model, run = make()
    dt.load_adapter(model, tmp_path)
    assert error(run(model), expected) < 1e-6
    dt.save_adapter(model, tmp_path / "again")
    theirs = peft.PeftModel.from_pretrained(make()[0], tmp_path / "again").eval()
    assert error(run(theirs), expected) < 1e-5


def test_options_for_single_layers_under_old_names_are_not_passed_over(tmp_path):
    saved(vit, tmp_path, ["q_proj"])
    under_old_names(tmp_path, OLD["vit"], target_modules=["query"], alpha_pattern={"0.attention.attention.query": 1.0})
    with pytest.raises(dt.AdapterError, match=r"alpha_pattern '0.attention.attention.query': fits no layer"):
        dt.load_adapter(vit()[0], tmp_path)


def test_a_file_of_another_model_is_refused_as_before(tmp_path):
    saved(vit, tmp_path, ["q_proj"])
    under_old_names(tmp_path, [("layers.1.", "layers.7.")])
    with pytest.raises(dt.AdapterError, match=r"vit\.layers\.7\.attention\.q_proj: .*no such module|not target it"):
        dt.load_adapter(vit()[0], tmp_path)
