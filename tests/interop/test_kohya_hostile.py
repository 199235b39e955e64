"""Files of kohya's format that do not fit, and adapters that it cannot hold: one error, and nothing has changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import nn

import doratune as dt
from doratune.targets import adapted_layers
from file_helpers import assert_unchanged, state
from interop.image_models import LORA, TEXT, adapted, text_encoder, unet
from interop.kohya_files import CONV, QUERY, lycoris, rewrite

# Files that do not fit


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    file = tmp_path_factory.mktemp("kohya") / "a.safetensors"
    dt.kohya.save_adapter(adapted(unet()), file)
    return file


@pytest.fixture
def valid(written, tmp_path):
    return Path(shutil.copy(written, tmp_path))


@pytest.fixture(scope="module")
def model():
    """One for all tests of files that are refused: they leave it as it was."""
    return unet()


def refused(models, file):
    """What the error says; nothing has changed."""
    parts = [models] if isinstance(models, nn.Module) else [model for model in models.values() if model is not None]
    before = [state(part) for part in parts]
    with pytest.raises(dt.AdapterError) as caught:
        dt.kohya.load_adapter(models, file)
    for part, was in zip(parts, before, strict=True):
        assert_unchanged(part, was)
    return str(caught.value)


def test_every_problem_is_in_one_error(model, valid):
    rewrite(
        valid,
        {
            f"{QUERY}.lora_up.weight": None,
            f"{CONV}.lora_down.weight": torch.full((2, 16, 3, 3), torch.nan),
            f"{CONV}.alpha": torch.tensor(-1.0),
            "lora_unet_conv_out.hada_w1_a": torch.ones(2),
            "lora_unet_conv_out.hada_w1_b": torch.ones(2),
            "lora_unet_conv_out.alpha": torch.tensor(1.0),
            "lora_unet_nowhere.lora_down.weight": torch.ones(2, 2),
            "lora_unet_nowhere.dora_scale": torch.ones(2, 1),
            "lora_unet_conv_norm_out.w_norm": torch.ones(2),
            "lora_te_x.lora_down.weight": torch.ones(2),
            "stray": torch.ones(2),
            "unet.conv_in.lora_A.weight": torch.ones(2),
        },
    )
    message = refused(model, valid)
    for line in (
        f"{QUERY}.lora_up.weight: missing",
        f"{CONV}: alpha: expected one finite number above 0, found [-1.0]",
        "lora_unet_conv_out.hada_w1_a (and 1 more): LoHa is not supported; LoRA and DoRA are",
        "lora_unet_nowhere: the model has no such layer",
        "lora_unet_conv_norm_out.w_norm: a trained norm layer (train_norm) is not supported",
        "lora_te_x.lora_down.weight: models has no 'lora_te'",
        "stray: begins with none of lora_unet",
        "unet.conv_in.lora_A.weight: PEFT's names; use dt.load_adapter for PEFT's folders",
    ):
        assert f"- {line}" in message
    assert "(8 problems)" in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({f"{CONV}.lora_down.weight": torch.full((2, 16, 3, 3), torch.nan)}, "lora_down.weight: holds NaN"),
        ({f"{CONV}.lora_down.weight": torch.ones(2, 16, 1, 1)}, "expected shape (2, 16, 3, 3), found (2, 16, 1, 1)"),
        ({f"{CONV}.lora_up.weight": torch.ones(16, 5, 1, 1)}, "expected shape (16, 2, 1, 1), found (16, 5, 1, 1)"),
        ({f"{CONV}.lora_up.weight": torch.ones(16, 2, 1, 1).int()}, "float16 or bfloat16, found int32"),
        ({f"{CONV}.lora_down.weight": torch.tensor(1.0)}, "expected shape (1, 16, 3, 3), found ()"),
        ({f"{CONV}.lora_down.weight": torch.ones(0, 16, 3, 3)}, "expected shape (1, 16, 3, 3), found (0, 16, 3, 3)"),
        ({f"{CONV}.dora_scale": torch.ones(15, 1, 1, 1)}, "expected shape (16, 1, 1, 1), found (15, 1, 1, 1)"),
        ({f"{CONV}.dora_scale": torch.tensor(1.0)}, "expected shape (16, 1, 1, 1), found ()"),
        ({f"{QUERY}.dora_scale": torch.ones(1, 16)}, "lies along the input axis (LyCORIS with wd_on_output=False)"),
        ({f"{CONV}.dora_scale": None}, "has no dora_scale, which other layers have"),
        ({f"{CONV}.alpha": torch.tensor(0.0)}, "expected one finite number above 0, found [0.0]"),
        ({f"{CONV}.alpha": torch.tensor(1j)}, "expected one finite number above 0, found [1j]"),
        ({f"{CONV}.alpha": torch.ones(2)}, "expected one finite number above 0, found [1.0, 1.0]"),
        ({f"{CONV}.lora_down.weight": None}, f"does not fit: {CONV}.lora_down.weight: missing"),
        ({f"{CONV}.lora_mid.weight": torch.ones(2, 2)}, "Tucker decomposition of a convolution (use_tucker)"),
        ({f"{CONV}.diff_b": torch.ones(2)}, "a whole change of a weight or bias is not supported"),
        (
            {f"{CONV}.scalar": torch.ones(2)},
            "scalar: unknown; expected lora_down.weight, lora_up.weight, alpha or dora_scale",
        ),
        ({"lora_unet_middle_block_0_in_layers_2.lora_down.weight": torch.ones(2)}, "holds this layer twice"),
        (
            {
                "lora_unet_conv_norm_out.lora_up.weight": torch.ones(2, 2),
                "lora_unet_conv_norm_out.dora_scale": torch.ones(2),
            },
            "GroupNorm",
        ),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused_by_its_key(model, valid, change, expected):
    message = refused(model, rewrite(valid, change))
    assert expected in message
    assert next(iter(change)).split(".")[0] in message


def test_the_input_axis_is_refused_once_for_all_layers(model, tmp_path):
    lycoris(unet(), tmp_path / "a.safetensors", wd_on_output=False)
    message = refused(model, tmp_path / "a.safetensors")
    assert "more): its dora_scale lies along the input axis" in message
    assert "problems" not in message


def test_what_is_no_safetensors_file_is_refused(model, valid, tmp_path):
    (tmp_path / "short.safetensors").write_bytes(valid.read_bytes()[:-8])
    assert "it may be truncated" in refused(model, tmp_path / "short.safetensors")
    (tmp_path / "a.ckpt").write_bytes(b"x")
    assert "is never read" in refused(model, tmp_path / "a.ckpt")
    assert "is a folder; name the safetensors file" in refused(model, tmp_path)
    assert "does not exist" in refused(model, tmp_path / "b.safetensors")


def test_a_model_with_pefts_layers_is_refused_as_such(valid):
    model = unet()
    model.add_adapter(LoraConfig(target_modules=["to_q"]))
    assert "is PEFT's (Linear), and its adapters would be adapted once more" in refused(model, valid)


def test_models_that_are_none_are_refused(model, valid):
    for models, found in (({"lora_unet": 1}, "found {'lora_unet': 'int'}"), ({}, "found {}"), (3, "found int")):
        with pytest.raises(dt.AdapterError) as caught:
            dt.kohya.load_adapter(models, valid)
        assert found in str(caught.value)
    assert "lora_te: the file holds nothing for it" in refused({"lora_unet": model, "lora_te": text_encoder()}, valid)


def test_if_one_model_cannot_take_its_part_none_does(tmp_path):
    parts = {"lora_unet": adapted(unet()), "lora_te": adapted(text_encoder(), TEXT)}
    dt.kohya.save_adapter(parts, tmp_path / "a.safetensors")
    again = {"lora_unet": adapted(unet(), LORA), "lora_te": adapted(text_encoder(), TEXT)}
    dt.attach(again["lora_unet"], LORA, "other")
    dt.delete_adapter(again["lora_unet"], "default")
    dt.set_adapter(again["lora_unet"], "other")
    assert "already has an adapter 'default'" in refused(again, tmp_path / "a.safetensors")
    assert dt.active_adapter(again["lora_unet"]) == "other"


# What the format cannot hold


def test_what_has_no_place_is_refused_in_one_error(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.lin = nn.Linear(4, 4)
            self.attn = nn.MultiheadAttention(4, 1)
            self.a = nn.ModuleDict({"b_c": nn.Linear(4, 4)})
            self.a_b = nn.ModuleDict({"c": nn.Linear(4, 4)})
            self.head = nn.Linear(4, 2)

    targets = ["embed", "lin", "q_proj", "b_c"]
    model = dt.attach(Model(), dt.AdapterConfig(rank=1, targets=targets, bias="lora_only", modules_to_save=["head"]))
    with pytest.raises(dt.AdapterError) as caught:
        dt.kohya.save_adapter({"lora_unet": model, "lora_te": Model()}, tmp_path / "a.safetensors")
    for line in (
        "lora_unet: embed: is an embedding, for which this format has no place",
        "lora_unet: attn.q_proj: is a projection packed into nn.MultiheadAttention's weight, for which",
        "lora_unet: a.b_c: its name there, a_b_c, is that of a_b.c, too, for which",
        "(and 4 more): is a trained bias or of a module trained whole, for which this format has no place",
        "lora_te: the model has no adapter 'default' to save",
    ):
        assert line in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_leaves_what_was_there(valid, tmp_path):
    before = valid.read_bytes()
    model = adapted(unet())
    with torch.no_grad():
        next(iter(adapted_layers(model).values())).lora_A["default"].fill_(torch.nan)
    with pytest.raises(dt.AdapterError, match="not finite"):
        dt.kohya.save_adapter(model, valid)
    with pytest.raises(dt.AdapterError, match=r"expected a name that ends in \.safetensors"):
        dt.kohya.save_adapter(model, tmp_path / "a.pt")
    assert valid.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
