"""Files of diffusers: what is written here its pipelines read as the same function, and the other way round."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import doratune as dt
from doratune.files import DIFFUSERS_WEIGHTS as WEIGHTS
from doratune.interop.diffusers import METADATA
from doratune.targets import adapted_layers
from file_helpers import assert_unchanged, state
from file_helpers import move as move_all
from helpers import error
from interop.image_models import DORA, LORA, MAGNITUDE, TEXT, adapted, image, text, text_encoder, unet


def pipeline():
    return StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(4,), norm_num_groups=4),
        text_encoder=text_encoder(),
        tokenizer=None,
        unet=unet(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def header(folder):
    with safe_open(folder / WEIGHTS, "pt") as file:
        return file.metadata()


# diffusers as the oracle


@pytest.mark.parametrize("config", [DORA, LORA, MAGNITUDE], ids=["dora", "lora", "magnitude"])
def test_a_pipeline_reads_what_is_written_here(config, tmp_path):
    ours = {"unet": adapted(unet(), config), "text_encoder": adapted(text_encoder(), TEXT)}
    dt.diffusers.save_adapter(ours, tmp_path)
    theirs = pipeline()
    theirs.load_lora_weights(tmp_path)
    assert error(image(ours["unet"]), image(unet())) > 1e-3
    assert error(image(theirs.unet), image(ours["unet"])) < 1e-5
    assert error(text(ours["text_encoder"]), text(text_encoder())) > 0.01
    assert error(text(theirs.text_encoder), text(ours["text_encoder"])) < 1e-5

    again = {"unet": unet(), "text_encoder": text_encoder()}
    assert dt.diffusers.load_adapter(again, tmp_path, trainable=True) is again
    assert torch.equal(image(again["unet"]), image(ours["unet"]))
    assert torch.equal(text(again["text_encoder"]), text(ours["text_encoder"]))
    assert dt.trainable_parameters(again["unet"])


def test_a_pipeline_reads_a_text_encoder_whose_attention_is_not_adapted(tmp_path):
    ours = adapted(text_encoder(), dt.AdapterConfig(rank=2, targets=["fc1"]))
    dt.diffusers.save_adapter({"text_encoder": ours}, tmp_path)
    theirs = pipeline()
    theirs.load_lora_weights(tmp_path)
    assert error(text(theirs.text_encoder), text(ours)) < 1e-5


@pytest.mark.parametrize("options", [True, False], ids=["with options", "without"])
@pytest.mark.parametrize("dora", [True, False], ids=["dora", "lora"])
def test_what_a_script_of_diffusers_saves_is_read(dora, options, tmp_path):
    theirs = pipeline()
    alpha = 5 if options else 4  # without options it is the rank
    torch.manual_seed(0)
    theirs.unet.add_adapter(LoraConfig(r=4, lora_alpha=alpha, use_dora=dora, target_modules=["to_q", "to_v", "conv1"]))
    # What transformers' add_adapter does; in 5.24 that asks for a PEFT newer than any released one.
    on_text = LoraConfig(r=4, lora_alpha=alpha, use_dora=dora, target_modules=["q_proj", "fc2"])
    inject_adapter_in_model(on_text, theirs.text_encoder, "default")
    parts = {"unet": theirs.unet, "text_encoder": theirs.text_encoder}
    for part in parts.values():
        move_all(part).eval()
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(theirs.unet),
        text_encoder_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(theirs.text_encoder)),
        **(
            {f"{k}_lora_adapter_metadata": m.peft_config["default"].to_dict() for k, m in parts.items()}
            if options
            else {}
        ),
    )
    assert (METADATA in header(tmp_path)) == options
    assert any("lora_linear_layer.down" in key for key in load_file(tmp_path / WEIGHTS))
    ours = dt.diffusers.load_adapter({"unet": unet(), "text_encoder": text_encoder()}, tmp_path)
    assert error(image(theirs.unet), image(unet())) > 1e-3
    assert error(image(ours["unet"]), image(theirs.unet)) < 1e-5
    assert error(text(theirs.text_encoder), text(text_encoder())) > 1e-3
    assert error(text(ours["text_encoder"]), text(theirs.text_encoder)) < 1e-5


def test_a_file_of_one_model_has_no_names_before_its_keys(tmp_path):
    theirs = unet()
    theirs.add_adapter(LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=["to_q", "conv1"]), "default")
    move_all(theirs).eval()
    theirs.save_lora_adapter(tmp_path)
    ours = dt.diffusers.load_adapter({"": unet()}, tmp_path)
    assert error(image(ours[""]), image(theirs)) < 1e-5
    dt.diffusers.save_adapter(ours, tmp_path / "again")
    again = unet()
    again.load_lora_adapter(tmp_path / "again", prefix=None, weight_name=WEIGHTS)
    assert error(image(again), image(theirs)) < 1e-5


def test_names_of_transformers_4_are_read(tmp_path):
    ours = adapted(
        text_encoder(),
        dt.AdapterConfig(rank=4, alpha=4, targets=["q_proj", "fc1"], rank_pattern={"fc1": 2}, alpha_pattern={"fc1": 2}),
    )
    dt.diffusers.save_adapter({"text_encoder": ours}, tmp_path)
    former = {
        k.replace("text_encoder.", "text_encoder.text_model."): t for k, t in load_file(tmp_path / WEIGHTS).items()
    }
    save_file(former, tmp_path / WEIGHTS)
    again = dt.diffusers.load_adapter({"text_encoder": text_encoder()}, tmp_path)
    assert torch.equal(text(again["text_encoder"]), text(ours))


# Files that do not fit


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusers")
    dt.diffusers.save_adapter({"unet": adapted(unet())}, folder)
    return load_file(folder / WEIGHTS), header(folder)


@pytest.fixture(scope="module")
def model():
    return unet()


def refused(models, written, folder, tensors=None, **options):
    before = {prefix: state(model) for prefix, model in models.items() if model is not None}
    found, meta = written
    raw = {**json.loads(meta[METADATA]), **options}
    save_file(
        {k: t for k, t in {**found, **(tensors or {})}.items() if t is not None},
        folder / WEIGHTS,
        {METADATA: json.dumps(raw)},
    )
    with pytest.raises(dt.AdapterError) as caught:
        dt.diffusers.load_adapter(models, folder)
    for prefix, was in before.items():
        assert_unchanged(models[prefix], was)
    return str(caught.value)


def test_every_problem_is_in_one_error(model, written, tmp_path):
    conv, query = "unet.mid_block.resnets.0.conv1", "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    message = refused(
        {"unet": model},
        written,
        tmp_path,
        {
            f"{conv}.lora_A.weight": None,
            f"{query}.lora_B.weight": torch.full((16, 3), torch.nan),
            f"{query}.lora_magnitude_vector": torch.ones(16),
            f"{query}.lora_B.bias": torch.ones(16),
            "unet.mid_block.resnets.1.conv1.lora_A.weight": torch.tensor(1.0),
            "text_encoder.q_proj.lora_A.weight": torch.ones(2, 2),
            "lora_unet_conv_in.lora_up.weight": torch.ones(2, 2),
            "transformer_blocks.0.to_q.lora_A.weight": torch.ones(2, 2),
        },
    )
    for line in (
        f"{conv}.lora_A.weight: missing",
        f"{query}.lora_B.weight: holds NaN",
        "the file holds this tensor twice, under two keys",
        f"{query}.lora_B.bias: unknown key",
        "unet.mid_block.resnets.1.conv1.lora_A.weight: expected shape (4, 16, 3, 3), found ()",
        "text_encoder.q_proj.lora_A.weight: models has no 'text_encoder'",
        "lora_unet_conv_in.lora_up.weight: kohya's names; use dt.kohya.load_adapter",
        "transformer_blocks.0.to_q.lora_A.weight: begins with none of unet; a model whose keys have no such name is",
    ):
        assert line in message
    assert "(8 problems)" in message


def test_options_that_cannot_be_honoured_are_refused_by_name(model, written, tmp_path):
    message = refused({"unet": model}, written, tmp_path, **{"unet.lora_bias": True, "unet.r": 0})
    assert "unet.lora_bias=True is not supported" in message
    assert "unet.r: expected a whole number" in message
    save_file(written[0], tmp_path / WEIGHTS, {METADATA: "["})
    with pytest.raises(dt.AdapterError, match="expected a JSON object"):
        dt.diffusers.load_adapter({"unet": model}, tmp_path)


def test_parts_and_models_have_to_agree(model, written, tmp_path):
    message = refused({"unet": model, "text_encoder": text_encoder()}, written, tmp_path)
    assert "text_encoder: the file holds nothing for it" in message
    message = refused({"unet": None, "transformer": model}, written, tmp_path)
    assert "transformer: the file holds nothing for it" in message
    with pytest.raises(dt.AdapterError, match="does not exist"):
        dt.diffusers.load_adapter({"unet": model}, tmp_path / "nowhere")
    with pytest.raises(dt.AdapterError, match="expected the file's prefixes"):
        dt.diffusers.load_adapter(model, tmp_path)


def test_what_diffusers_would_not_read_is_refused_in_one_error(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "conv": nn.Conv2d(4, 4, 1, groups=2), "embed": nn.Embedding(4, 4)})
    dt.attach(model, dt.AdapterConfig(rank=1, targets=["a", "conv", "embed"], bias="lora_only"))
    with pytest.raises(dt.AdapterError) as caught:
        dt.diffusers.save_adapter({"unet": model, "text_encoder": text_encoder()}, tmp_path)
    for line in (
        "unet.conv: PEFT's A for a grouped convolution",
        "unet.a.base_layer.bias (and 3 more): is of a trained bias, a module trained whole or an embedding",
        "text_encoder: the model has no adapter 'default' to save",
    ):
        assert line in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_chosen_adapter_is_written(tmp_path):
    model = adapted(unet(), LORA)
    dt.attach(model, DORA, "second")
    dt.diffusers.save_adapter({"unet": model}, tmp_path, "default")
    assert len(load_file(tmp_path / WEIGHTS)) == 2 * sum(
        "default" in m.adapters for m in adapted_layers(model).values()
    )


def test_home_is_written_to_as_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model = dt.attach(unet(), LORA)
    dt.save_adapter(model, "~/peft")
    dt.kohya.save_adapter(model, "~/kohya.safetensors")
    dt.diffusers.save_adapter({"unet": model}, "~/diffusers")
    assert {path.name for path in tmp_path.iterdir()} == {"peft", "kohya.safetensors", "diffusers"}
    dt.load_adapter(unet(), "~/peft")
    dt.kohya.load_adapter(unet(), "~/kohya.safetensors")
    dt.diffusers.load_adapter({"unet": unet()}, "~/diffusers")
    with pytest.raises(dt.AdapterError, match=r"pytorch_lora_weights.safetensors, which dt\.diffusers\.load_adapter"):
        dt.load_adapter(unet(), tmp_path / "diffusers")
