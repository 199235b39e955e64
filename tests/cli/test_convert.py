"""A DoRA adapter's folder as a plain LoRA adapter's: what is printed, what lies in it, what is refused."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer

import doratune as dt
from doratune.cli import main
from doratune.files import WEIGHTS
from doratune.train.information import Information
from doratune.train.models import load_model
from doratune.train.placement import quantized
from helpers import move
from inference.small import save_moved, save_writer
from train.tiny import (
    CHAT_TEMPLATE,
    chat_tokenizer,
    llama,
    save_image_folder,
    save_model,
    save_vision_model,
    write_text,
)


def convert(adapter, output, *more):
    return main(["convert", str(adapter), "--output", str(output), *map(str, more)])


@pytest.fixture
def adapter(tmp_path):
    return save_moved(tmp_path / "adapter", save_writer(tmp_path / "base"))


def test_it_says_what_is_kept(adapter, tmp_path, capsys):
    assert convert(adapter, tmp_path / "lora", "--rank", 4, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    model = dt.load_adapter(llama(), adapter)
    report = dt.convert_to_lora(model, 4)
    assert found["output"] == str(tmp_path / "lora")
    assert found["rank"] == 4
    assert found["kept"] == pytest.approx(report.kept, abs=1e-6)
    assert [layer["path"] for layer in found["layers"]] == [layer.path for layer in report.layers]
    for layer, expected in zip(found["layers"], report.layers, strict=True):
        assert layer["kept"] == pytest.approx(expected.kept, abs=1e-6)
        assert layer["change"] == pytest.approx(expected.change, rel=1e-5)
    assert found["bytes"] == (tmp_path / "lora" / WEIGHTS).stat().st_size
    inputs = torch.randint(0, 257, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        converted = model(inputs).logits
        dt.set_adapter(model, "default")
        adapted = model(inputs).logits
        with dt.disabled(model):
            base = model(inputs).logits
    kept = 1 - (converted - adapted).square().sum() / (adapted - base).square().sum()
    assert found["logits"]["kept"] == pytest.approx(float(kept), abs=1e-5)
    assert found["logits"]["difference"] == pytest.approx(float((converted - adapted).abs().max()), rel=1e-4)


def test_the_table(adapter, tmp_path, capsys):
    assert convert(adapter, tmp_path / "lora", "--rank", 16) == 0
    said = capsys.readouterr().out
    for part in ("at rank 16", "q_proj", "all weights", "14", "100.00%", "logits of the model", "shares of squares"):
        assert part in said
    assert f"written to {tmp_path / 'lora'}\n" in said
    assert "LoRA adapter of rank 16 (0.0 MB, was 0.0)" in said


def test_it_says_when_the_whole_model_is_not_compared(adapter, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("doratune.cli.convert.random_inputs", lambda model: {})
    assert convert(adapter, tmp_path / "lora") == 0
    printed, status = capsys.readouterr()
    printed = " ".join(re.sub(r"\x1b\[[\d;]*m", "", printed).split())
    assert "the whole model was not compared" in printed
    assert "logits" not in printed
    for part in ("Loading", "Fitting", "Writing"):
        assert part in status


def test_it_writes_what_the_adapter_writes(adapter, tmp_path, capsys):
    chat_tokenizer().save_pretrained(adapter)
    assert convert(adapter, tmp_path / "lora", "--rank", 16) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "lora").chat_template == CHAT_TEMPLATE
    capsys.readouterr()
    written = []
    for folder in (adapter, tmp_path / "lora"):
        assert main(["generate", str(folder), "--chat", "--prompt", "hello", "--max-tokens", "6"]) == 0
        written.append(capsys.readouterr().out)
    assert written[0] == written[1]
    assert main(["inspect", str(tmp_path / "lora"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["method"] == "lora"


def test_a_run_of_images_predicts_the_same(tmp_path, capsys):
    base, photos = save_vision_model(tmp_path / "vit"), save_image_folder(tmp_path / "photos", 4)
    options = [
        "--task",
        "image-classification",
        "--steps",
        "3",
        "--rank",
        "2",
        "--batch-size",
        "2",
        "--save-every",
        "None",
    ]
    run = ["train", "--model", base, "--data", photos, "--output", tmp_path / "run", *options]
    assert main([str(word) for word in run]) == 0
    adapter = tmp_path / "run" / "adapter"
    assert convert(adapter, tmp_path / "lora", "--rank", 16) == 0
    for name in ("doratune.json", "preprocessor_config.json"):
        assert (tmp_path / "lora" / name).exists() == (adapter / name).exists()
    about = json.loads((tmp_path / "lora" / "doratune.json").read_text())
    assert about == {**json.loads((adapter / "doratune.json").read_text()), "method": "lora"}
    capsys.readouterr()
    found = []
    for folder in (adapter, tmp_path / "lora"):
        assert main(["predict", str(folder), str(photos), "--json"]) == 0
        found.append([json.loads(line)["probability"] for line in capsys.readouterr().out.splitlines()])
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_a_checkpoint_leaves_its_training_behind(tmp_path):
    base, text = save_model(tmp_path / "base"), write_text(tmp_path / "text.txt")
    fast = ["--max-length", 16, "--steps", 2, "--batch-size", 2, "--rank", 4, "--save-every", 1]
    run = ["train", "--model", base, "--data", text, "--output", tmp_path / "run", *fast]
    assert main([str(word) for word in run]) == 0
    assert convert(tmp_path / "run" / "checkpoints" / "checkpoint-2", tmp_path / "lora") == 0
    names = {path.name for path in (tmp_path / "lora").iterdir()}
    assert {"adapter_config.json", WEIGHTS} <= names
    assert not names & {"optimizer.pt", "trainer_state.json", "complete.json", "scheduler.pt", "rng_state.pth"}


# What cannot be


def test_what_others_could_not_read_is_refused(tmp_path, capsys, monkeypatch):
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 3, groups=2)

    torch.manual_seed(0)
    model = move(dt.attach(Grouped(), dt.AdapterConfig(rank=2, targets=["conv"])))
    dt.save_adapter(model, tmp_path / "adapter")
    monkeypatch.setattr("doratune.train.models.load_base", lambda *_: Grouped())
    assert convert(tmp_path / "adapter", tmp_path / "lora", "--base", "any") == 1
    said = capsys.readouterr().err
    assert "cannot be a LoRA adapter that others read: conv: PEFT's A for a grouped convolution" in said
    assert not (tmp_path / "lora").exists()


def test_a_rank_that_cannot_be(adapter, tmp_path, capsys):
    assert convert(adapter, tmp_path / "lora", "--rank", 17) == 1
    assert "error: rank must be a whole number from 1 to 16" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}, "nothing is left behind"


def test_an_output_that_is_there(adapter, tmp_path, capsys):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "mine").touch()
    assert convert(adapter, tmp_path / "lora", "--rank", 0) == 1
    said = capsys.readouterr().err
    assert f"output {tmp_path / 'lora'} exists and is not empty; name a new folder" in said
    assert "rank must be at least 1; found 0" in said
    assert [path.name for path in (tmp_path / "lora").iterdir()] == ["mine"]


def test_a_broken_adapter_is_found_before_a_model_is_loaded(adapter, tmp_path, capsys, monkeypatch):
    (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:100])
    monkeypatch.setattr("doratune.train.models.load_base", lambda *_: pytest.fail("loaded"))
    assert convert(adapter, tmp_path / "lora") == 1
    assert WEIGHTS in capsys.readouterr().err


@pytest.mark.parametrize("part", ["safetensors.torch.save_file", "shutil.copyfile"])
def test_a_full_disk_is_one_message(adapter, tmp_path, capsys, monkeypatch, part):
    (adapter / "preprocessor_config.json").write_text("{}")

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(part, fail)
    assert convert(adapter, tmp_path / "lora") == 1
    assert f"cannot write the adapter to {tmp_path / 'lora'}: No space left on device. Make" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}, "nothing is left behind"


def test_magnitudes_that_are_far_too_large(adapter, tmp_path, capsys):
    whole = load_file(adapter / WEIGHTS)
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector"
    save_file({**whole, name: whole[name] * 1e30}, adapter / WEIGHTS, {"format": "pt"})
    assert convert(adapter, tmp_path / "lora") == 1
    said = capsys.readouterr().err
    assert "adapter 'default' cannot be converted: model.layers.0.mlp.up_proj: its change is not finite" in said
    assert not (tmp_path / "lora").exists()


# To the formats of others


def same_logits(one, two, base):
    with torch.no_grad():
        found = [model(torch.arange(40).view(2, 20)).logits for model in (one, two, base)]
    moved = (found[1] - found[2]).abs().max()
    assert moved > 0.1
    assert (found[0] - found[1]).abs().max() < 1e-5 * moved


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_there_and_back(method, tmp_path, capsys):
    base = save_writer(tmp_path / "base")
    adapter = save_moved(tmp_path / "adapter", base, method=method)
    assert convert(adapter, tmp_path / "mlx", "--to", "mlx") == 0
    names = {"dora": "DoRA", "lora": "LoRA"}
    said = capsys.readouterr().out
    assert f"{names[method]} adapter of rank 4 on 14 layers (0.0 MB, was 0.0) written to {tmp_path / 'mlx'}" in said
    assert "in mlx-lm's format" in said
    assert {path.name for path in (tmp_path / "mlx").iterdir()} == {"adapter_config.json", "adapters.safetensors"}
    assert json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())["model"] == str(base)
    assert convert(tmp_path / "mlx", tmp_path / "peft", "--to", "peft", "--json") == 0
    about = json.loads(capsys.readouterr().out)
    size = (tmp_path / "peft" / WEIGHTS).stat().st_size
    assert about == {
        "output": str(tmp_path / "peft"),
        "to": "peft",
        "method": method,
        "rank": 4,
        "layers": 14,
        "bytes": size,
    }
    before, after = (load_file(folder / WEIGHTS) for folder in (adapter, tmp_path / "peft"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert main(["generate", str(tmp_path / "peft"), "--prompt", "hello", "--max-tokens", "2"]) == 0, (
        "it names its base"
    )


def test_what_mlx_wrote_as_plain_lora(adapter, tmp_path, capsys):
    assert convert(adapter, tmp_path / "mlx", "--to", "mlx") == 0
    for source in (adapter, tmp_path / "mlx"):
        assert convert(source, tmp_path / f"lora-{source.name}", "--rank", 2) == 0
    assert "LoRA adapter of rank 2 (0.0 MB, was 0.0) written to" in capsys.readouterr().out
    first, second = (dt.load_adapter(llama(), tmp_path / f"lora-{name}") for name in ("adapter", "mlx"))
    same_logits(first, second, llama())


def test_to_peft_what_lies_beside_goes_along(adapter, tmp_path):
    chat_tokenizer().save_pretrained(adapter)
    about = {"task": "text-generation", "base": str(tmp_path / "base"), "method": "dora"}
    (adapter / "doratune.json").write_text(json.dumps(about))
    assert convert(adapter, tmp_path / "peft", "--to", "peft") == 0
    assert json.loads((tmp_path / "peft" / "doratune.json").read_text())["method"] == "dora"
    assert AutoTokenizer.from_pretrained(tmp_path / "peft").chat_template == CHAT_TEMPLATE
    same_logits(dt.load_adapter(llama(), tmp_path / "peft"), dt.load_adapter(llama(), adapter), llama())


@pytest.mark.parametrize("to", ["peft", "mlx"])
def test_a_rank_cannot_be_chosen_for_the_same_adapter(to, adapter, tmp_path, capsys):
    assert convert(adapter, tmp_path / "out", "--to", to, "--rank", 4) == 1
    assert f"rank can be chosen with --to lora only: --to {to} writes the same adapter" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_base_of_mlx_is_named_beside_or_given(adapter, tmp_path, capsys):
    assert convert(adapter, tmp_path / "mlx", "--to", "mlx") == 0
    path = tmp_path / "mlx" / "adapter_config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "model": "../base"}))
    assert convert(tmp_path / "mlx", tmp_path / "one", "--to", "peft") == 0
    path.write_text(json.dumps({**raw, "model": None}))
    assert convert(tmp_path / "mlx", tmp_path / "two", "--to", "peft") == 1
    assert f"{tmp_path / 'mlx'} does not name its base model; give it with --base" in capsys.readouterr().err
    assert convert(tmp_path / "mlx", tmp_path / "two", "--to", "peft", "--base", tmp_path / "base") == 0
    path.write_text(json.dumps({**raw, "model": str(tmp_path / "gone")}))
    assert convert(tmp_path / "mlx", tmp_path / "three", "--to", "peft") == 1
    assert "another place can be given with --base" in capsys.readouterr().err


def test_a_broken_file_of_mlx_is_found_before_a_model_is_loaded(adapter, tmp_path, capsys, monkeypatch):
    assert convert(adapter, tmp_path / "mlx", "--to", "mlx") == 0
    path = tmp_path / "mlx" / "adapters.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    monkeypatch.setattr("doratune.train.models.load_model", lambda *_: pytest.fail("loaded"))
    assert convert(tmp_path / "mlx", tmp_path / "peft", "--to", "peft") == 1
    assert f"{path} cannot be read" in capsys.readouterr().err


def test_what_mlx_cannot_have_leaves_nothing_behind(tmp_path, capsys):
    model = dt.attach(llama(), dt.AdapterConfig(rank=2, targets=["lm_head"]))
    model.name_or_path = str(save_writer(tmp_path / "base"))
    dt.save_adapter(model, tmp_path / "adapter")
    assert convert(tmp_path / "adapter", tmp_path / "mlx", "--to", "mlx") == 1
    assert "lm_head: embedding and head share a weight" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


COMMANDS = {
    "generate": ["generate", "MLX", "--prompt", "hello"],
    "predict": ["predict", "MLX", "text.txt"],
    "evaluate": ["evaluate", "MLX", "--data", "text.txt"],
    "merge": ["merge", "MLX", "--output", "out"],
    "inspect": ["inspect", "MLX"],
    "inspect with its base": ["inspect", "MLX", "--base", "base"],
    "analyze": ["analyze", "base", "MLX", "--output", "out"],
    "bench": ["bench", "base", "--adapter", "MLX"],
    "train": ["train", "--model", "base", "--data", "text.txt", "--output", "out", "--start-from", "MLX"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_other_commands_say_what_it_is(command, adapter, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert convert(adapter, "MLX", "--to", "mlx") == 0
    write_text(tmp_path / "text.txt")
    capsys.readouterr()
    assert main(COMMANDS[command]) == 1
    said = capsys.readouterr().err
    assert said.count("MLX holds an adapter of Apple's mlx-lm; make it one of PEFT's with doratune convert MLX") == 1
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_a_quantised_base_is_fitted_on_it(tmp_path, capsys):
    """B is 0 and magnitudes are the 4-bit norms: nothing changes there, and every row would on the base as it is."""
    base = save_writer(tmp_path / "base")
    dtype = torch.float32
    model = load_model(str(base), dtype, options=quantized("nf4", dtype))
    model.name_or_path = str(base)
    dt.save_adapter(dt.attach(model, dt.AdapterConfig(rank=2)), tmp_path / "adapter")
    Information("text-generation", str(base), "dora", quantize="nf4", dtype="float32").save(tmp_path / "adapter")
    assert convert(tmp_path / "adapter", tmp_path / "lora", "--json") == 0
    said = capsys.readouterr()
    assert "the base is loaded as in training: --quantize nf4\n" in said.err
    assert max(layer["change"] for layer in json.loads(said.out)["layers"]) < 1e-8
    (tmp_path / "adapter" / "doratune.json").unlink()
    assert convert(tmp_path / "adapter", tmp_path / "other", "--json") == 0
    assert max(layer["change"] for layer in json.loads(capsys.readouterr().out)["layers"]) > 1e-4
