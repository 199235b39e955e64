import dataclasses
import io
import json
import re
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import doratune as dt
from doratune.cli import main
from doratune.targets import adapted_layers
from doratune.train import AdapterOptions, TrainConfig, TrainResult, train
from doratune.train.information import Information
from doratune.train.recipe import load_recipe
from doratune.train.start import attach_start, resolved
from train.tiny import (
    llama,
    reviews,
    save_encoder,
    save_image_folder,
    save_model,
    save_rows,
    save_vision_model,
    write_text,
)

LORA = dt.AdapterConfig(method="lora", rank=4, alpha=8, dropout=0.05, targets=("q_proj", "up_proj"))


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assets")
    return save_model(folder / "model"), write_text(folder / "text.txt")


@pytest.fixture(scope="module")
def classified(tmp_path_factory):
    """A model, texts in three classes, and the run of a classifier of them."""
    folder = tmp_path_factory.mktemp("classes")
    rows = [*reviews(24), *({"review": f"a tale of wolves {i}", "label": "so-so"} for i in range(12))]
    assets = save_model(folder / "model"), save_rows(folder / "rows.jsonl", rows)
    train(config(assets, folder / "run", task="text-classification"))
    return *assets, folder / "run"


def config(assets, output, **values):
    options = {"max_length": 16, "steps": 4, "batch_size": 2, "learning_rate": 1e-2, "save_every": None}
    return TrainConfig(model=str(assets[0]), data=(str(assets[1]),), output=output, **{**options, **values})


def moved(folder, adapter=LORA):
    """The folder of an adapter that has been trained."""
    model = dt.attach(llama(), adapter)
    with torch.no_grad():
        for parameter in dt.trainable_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    dt.save_adapter(model, folder)
    return str(folder)


def told(options):
    screen = io.StringIO()
    return train(options, Console(file=screen, width=300)), screen.getvalue()


@pytest.mark.parametrize("method", ["dora", "lora", "magnitude"])
def test_a_run_goes_on_where_another_ended(assets, tmp_path, method):
    first = train(config(assets, tmp_path / "one", method=method, adapter=AdapterOptions(rank=4, targets=("q_proj",))))
    options = config(assets, tmp_path / "two", method=method, start_from=first.adapter, learning_rate=2e-2)
    second, screen = told(options)
    assert second.loss_before == pytest.approx(first.loss_after, rel=1e-6)
    assert second.loss_after < second.loss_before < first.loss_before
    assert (second.rank, second.trained) == (first.rank, first.trained)
    assert f"start_from {first.adapter}: {method} " in screen
    assert " on 2 layers\n" in screen
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == other.keys()
    assert Information.load(second.adapter) == Information.load(first.adapter)


def test_a_plain_lora_becomes_dora_and_computes_the_same(assets, tmp_path):
    first = train(config(assets, tmp_path / "one", method="lora", adapter=AdapterOptions(rank=4, alpha=8)))
    second, screen = told(config(assets, tmp_path / "two", start_from=first.adapter))
    assert second.loss_before == pytest.approx(first.loss_after, rel=1e-6)
    assert second.loss_after < second.loss_before
    assert second.magnitude > 0 == first.magnitude
    assert "lora of rank 4 and alpha 8 on 14 layers; made DoRA, with magnitudes that change nothing" in screen
    assert json.loads((tmp_path / "two" / "adapter" / "adapter_config.json").read_text())["use_dora"]
    about = Information.load(second.adapter)
    assert (about.method, about.base) == ("dora", str(assets[0]))


def test_what_is_written_repeats_the_run(assets, tmp_path):
    start = moved(tmp_path / "start", dataclasses.replace(LORA, rank_pattern={"up_proj": 2}))
    first = train(config(assets, tmp_path / "one", start_from=start))
    written = load_recipe(tmp_path / "one" / "recipe.toml")
    assert (written["start_from"], written["adapter"].rank, written["adapter"].alpha) == (start, 4, 8)
    assert (written["adapter"].targets, written["adapter"].rank_pattern) == (("q_proj", "up_proj"), {"up_proj": 2})
    again, screen = told(TrainConfig(**{**written, "output": tmp_path / "two"}))
    assert again.loss_after == first.loss_after
    assert f"as in {start}, not" not in screen


def test_layers_by_number_are_written_by_name(tmp_path):
    from peft import LoraConfig, get_peft_model

    options = LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[1], task_type="CAUSAL_LM")
    get_peft_model(llama(), options).save_pretrained(tmp_path / "theirs")
    found = resolved(TrainConfig("m", ("d",), start_from=str(tmp_path / "theirs")))
    assert found.adapter.targets == ("model.layers.1.self_attn.q_proj",)
    attach_start(model := llama(), found, [])
    assert list(adapted_layers(model)) == ["model.layers.1.self_attn.q_proj"]


WRONG = {
    "nothing there": ("absent", {}, "does not exist; name a folder with adapter_config.json"),
    "a run": ("run", {}, r"is not an adapter's folder \(did you mean .*run/adapter\?\)"),
    "a model": ("model", {}, "is not an adapter's folder, but a whole model's"),
    "options": ("broken", {}, r"start_from .*broken: r: expected .*\n.*start_from .*broken: lora_alpha: expected"),
    "no weights": ("options alone", {}, "has no adapter_model.safetensors"),
    "weights cut short": ("cut", {}, "may be truncated"),
    "weights of a model": ("empty", {}, "holds no adapter"),
    "metadata": ("metadata", {}, "metadata 'doratune'"),
    "magnitudes lost": ("dora", {"method": "lora"}, "is a dora adapter, which method lora .* lost; use method dora"),
    "low rank lost": ("lora", {"method": "magnitude"}, "is a lora adapter, which .* A and B .*use method dora or lora"),
    "low rank absent": ("magnitude", {}, "is a magnitude adapter, which method dora .*; use method magnitude"),
    "no adapter": ("lora", {"method": "full"}, "method full trains no adapter; use dora, lora or magnitude"),
    "a head": ("classifier", {}, "is for text-classification, and has its head; the task here is text-generation"),
    "a head of PEFT's": ("head", {}, "is for classification, and has its head; the task here is text-generation"),
    "bias": ("bias", {"fsdp": True}, "fsdp serves adapters on language models without modules_to_save and bias"),
}


@pytest.fixture(scope="module")
def starts(assets, tmp_path_factory):
    """Folders that a run can, or cannot, begin with."""
    folder = tmp_path_factory.mktemp("starts")
    shutil.copytree(assets[0], folder / "model")
    moved(folder / "lora")
    moved(folder / "dora", dt.AdapterConfig(rank=2))
    moved(folder / "magnitude", dt.AdapterConfig(rank=0))
    moved(folder / "run" / "adapter")
    moved(folder / "bias", dataclasses.replace(LORA, bias="lora_only"))
    Information("text-classification", "m", "lora", ("a", "b")).save(folder / moved(folder / "classifier"))
    for name in ("head", "broken", "options alone", "cut", "empty", "metadata"):
        shutil.copytree(folder / "lora", folder / name)
    weights = "adapter_model.safetensors"
    raw = json.loads((folder / "lora" / "adapter_config.json").read_text())
    (folder / "broken" / "adapter_config.json").write_text(json.dumps({**raw, "r": 0, "lora_alpha": "x"}))
    (folder / "options alone" / weights).unlink()
    (folder / "cut" / weights).write_bytes((folder / "lora" / weights).read_bytes()[:-10])
    head = {"base_model.model.score.weight": torch.zeros(2, 16)}
    save_file({**load_file(folder / "lora" / weights), **head}, folder / "head" / weights)
    save_file({"lm_head.weight": torch.zeros(2, 2)}, folder / "empty" / weights)
    save_file(load_file(folder / "lora" / weights), folder / "metadata" / weights, {"doratune": "{"})
    return folder


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_go_on_is_told_with_all_else_before_a_model_is_loaded(assets, starts, tmp_path, name, monkeypatch):
    folder, options, message = WRONG[name]
    monkeypatch.setattr("doratune.train.assemble.load_model", lambda *_: pytest.fail("a model was loaded"))
    wrong = config(assets, tmp_path / "run", start_from=str(starts / folder), batch_size=0, **options)
    with pytest.raises(dt.AdapterError, match=message) as caught:
        train(wrong)
    assert "batch_size must be above 0" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_how_it_trains_is_for_the_run_to_say(assets, starts):
    options = AdapterOptions(dropout=0.2, norm_refresh="step", eight_bit_outputs=("q_proj",))
    found = resolved(config(assets, "run", start_from=str(starts / "lora"), adapter=options))
    attach_start(model := llama(), found, [])
    adapter = model.model.layers[0].self_attn.q_proj.adapters["default"]
    assert (adapter.config.dropout, adapter.config.norm_refresh, adapter.eight_bit) == (0.2, "step", True)
    assert (adapter.config.method, adapter.rank, adapter.config.alpha) == ("dora", 4, 8)
    wrong = dataclasses.replace(found, adapter=dataclasses.replace(found.adapter, eight_bit_outputs=("k_proj",)))
    with pytest.raises(dt.AdapterError, match="eight_bit_outputs 'k_proj' matches no module that is adapted"):
        attach_start(llama(), wrong, [])


def test_options_that_the_file_decides_are_not_passed_over_in_silence(assets, starts, tmp_path, capsys):
    start = str(starts / "lora")
    with pytest.raises(dt.AdapterError, match=rf"rank is 4 as in {start}, not 8"):
        train(config(assets, tmp_path / "run", start_from=start, adapter=AdapterOptions(rank=8)))
    flags = ["--model", str(assets[0]), "--data", str(assets[1]), "--output", str(tmp_path / "run"), "--steps", "1"]
    flags += ["--max-length", "16", "--start-from", start]
    assert main(["train", *flags, "--rank", "4", "--targets", "q_proj", "--dropout", "0.1"]) == 1
    assert "rank, targets: without effect, because the adapter of start_from has its own" in capsys.readouterr().err
    recipe = tmp_path / "r.toml"
    recipe.write_text('rank = 8\nalpha = 8\ntargets = ["up_proj", "q_proj"]\nexclude = ["k_proj"]\n')
    assert main(["train", "--recipe", str(recipe), *flags]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"rank is 4 as in {start}, not 8 exclude is none as in {start}, not k_proj" in said
    assert f"dropout is 0.0 in this run, was 0.05 in {start}" in said
    assert "targets is" not in said
    assert "alpha is" not in said
    assert main(["train", "--recipe", str(recipe), *flags, "--print-recipe"]) == 0
    lines = dict(re.split(r"\s+# ", line) for line in capsys.readouterr().out.splitlines())
    assert {key: value for key, value in lines.items() if key.startswith(("rank =", "dropout"))} == {
        "rank = 4": "start_from",
        "dropout = 0.0": "default",
    }


def test_of_magnitudes_only_what_has_an_effect_is_told(assets, starts, tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('rank = 8\ndropout = 0.1\nbias = "all"\n')
    values = {**load_recipe(recipe), "recipe": str(recipe), "method": "magnitude", "steps": 1}
    start = str(starts / "magnitude")
    result, screen = told(config(assets, tmp_path / "run", start_from=start, **values))
    assert screen.startswith(f"start_from {start}: magnitude on 14 layers\nbias is none as in {start}, not all\n")
    assert "dropout" not in screen
    assert (result.rank, load_recipe(tmp_path / "run" / "recipe.toml")["adapter"].rank) == (0, 8)


def test_another_base_is_said(assets, starts, tmp_path):
    start = shutil.copytree(starts / "lora", tmp_path / "start")
    file = start / "adapter_config.json"
    for base, said in ((str(assets[0] / ".." / "model"), False), ("other/model", True)):
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": base}))
        _, screen = told(config(assets, tmp_path / f"run {said}", start_from=str(start), steps=1))
        assert ("was trained on other/model, here the base is" in screen) == said


def test_a_model_of_other_layers_is_refused(starts, tmp_path):
    data = save_rows(tmp_path / "rows.jsonl", reviews(12))
    options = config((save_encoder(tmp_path / "bert"), data), tmp_path / "run", task="text-classification")
    with pytest.raises(dt.AdapterError, match="the model has no such module; is the file of another model"):
        train(dataclasses.replace(options, start_from=str(starts / "lora")))


@pytest.mark.parametrize("kind", ["text", "encoder", "images"])
def test_a_classifier_goes_on_with_its_head(tmp_path, kind):
    if kind == "images":
        task, assets = "image-classification", (save_vision_model(tmp_path / "m"), save_image_folder(tmp_path / "data"))
    else:
        model = save_model(tmp_path / "m") if kind == "text" else save_encoder(tmp_path / "m")
        task, assets = "text-classification", (model, save_rows(tmp_path / "rows.jsonl", reviews(24)))
    first = train(config(assets, tmp_path / "one", task=task))
    second = train(config(assets, tmp_path / "two", task=task, start_from=first.adapter, seed=1))
    assert second.loss_before == pytest.approx(first.loss_after, rel=1e-6)
    assert second.accuracy_before == first.accuracy_after
    assert (second.trained, second.labels) == (first.trained, first.labels)
    assert Information.load(second.adapter) == Information.load(first.adapter)
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == other.keys()


def test_classes_are_numbered_as_the_adapter_s(classified, tmp_path):
    model, _, run = classified
    rows = [{"review": f"a good tale {i}", "label": ("so-so", "good")[i % 2]} for i in range(20)]
    assets = model, save_rows(tmp_path / "fewer.jsonl", rows)
    options = config(assets, tmp_path / "run", task="text-classification", start_from=str(run / "adapter"))
    assert train(options).labels == Information.load(tmp_path / "run" / "adapter").labels == ("bad", "good", "so-so")
    assets = model, save_rows(tmp_path / "others.jsonl", [*rows, *({"review": "x", "label": "none"} for _ in range(4))])
    with pytest.raises(dt.AdapterError, match="classes bad, good, so-so; the data have good, none, so-so; train on"):
        train(dataclasses.replace(options, data=(str(assets[1]),), output=tmp_path / "other"))


def test_of_an_adapter_that_names_no_classes_the_number_has_to_fit(classified, tmp_path):
    model, data, run = classified
    start = shutil.copytree(run / "adapter", tmp_path / "start")
    (start / "doratune.json").unlink()
    options = config((model, data), tmp_path / "run", task="text-classification", start_from=str(start))
    result, screen = told(options)
    assert result.loss_before == pytest.approx(TrainResult.load(run).loss_after, rel=1e-6)
    assert "does not name its classes, which are taken to be, in this order: bad, good, so-so" in screen
    two = (str(save_rows(tmp_path / "two.jsonl", reviews(12))),)
    with pytest.raises(dt.AdapterError, match="has a head of 3 classes; the data have 2: bad, good; train on its"):
        train(dataclasses.replace(options, data=two, output=tmp_path / "other"))


@pytest.mark.parametrize("method", ["dora", "magnitude"])
def test_a_resumed_classifier_of_fewer_classes_whose_start_is_gone(classified, tmp_path, method):
    model, data, _ = classified
    begun = config((model, data), tmp_path / "begun", task="text-classification", method=method)
    start = train(begun).adapter
    rows = [{"review": f"a good tale {i}", "label": ("so-so", "good")[i % 2]} for i in range(20)]
    assets = model, save_rows(tmp_path / "fewer.jsonl", rows)
    options = {"task": "text-classification", "method": method, "start_from": start, "save_every": 2}
    options = config(assets, tmp_path / "run", **options)
    whole = train(options)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-4")
    (tmp_path / "run" / "results.json").unlink()
    shutil.rmtree(tmp_path / "begun")
    options = dataclasses.replace(options, resume=True)
    with pytest.raises(dt.AdapterError, match="go on without it") as caught:
        train(options)
    last = re.search(r"--start-from (.*)\)", str(caught.value))[1]
    resumed = train(dataclasses.replace(options, start_from=last))
    assert (resumed.labels, resumed.loss_after) == (("bad", "good", "so-so"), whole.loss_after)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_checkpoint_notes_what_the_result_does(assets, tmp_path, method):
    result = train(config(assets, tmp_path / "run", method=method, save_every=4))
    about = Information.load(tmp_path / "run" / "checkpoints" / "checkpoint-4")
    assert about is not None
    assert about == Information.load(result.adapter)


def test_a_classifier_may_begin_with_an_adapter_of_text_generation(assets, classified, tmp_path):
    first = train(config(assets, tmp_path / "one"))
    options = config(classified, tmp_path / "two", task="text-classification", start_from=first.adapter)
    result, screen = told(options)
    assert "was trained for text-generation: the head is new" in screen
    tensors = load_file(tmp_path / "two" / "adapter" / "adapter_model.safetensors")
    assert tensors["base_model.model.score.weight"].shape == (3, 16)
    assert result.loss_after < result.loss_before


def test_an_adapter_inside_the_base_s_own_head_stays_there(tmp_path):
    from transformers import RobertaConfig, RobertaForSequenceClassification

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = RobertaForSequenceClassification(RobertaConfig(vocab_size=257, **sizes))
    dt.save_adapter(dt.attach(model, dt.AdapterConfig(rank=2, targets=("dense",))), tmp_path / "adapter")
    dt.detach(model)
    options = config(("m", "d"), "run", task="text-classification", start_from=str(tmp_path / "adapter"))
    attach_start(model, resolved(options), ["classifier"])
    assert "classifier.dense" in adapted_layers(model)


def test_an_adapter_on_the_base_s_own_head_stays_there(tmp_path):
    from transformers import AutoModelForSequenceClassification

    from doratune.train.models import load_classifier

    model = AutoModelForSequenceClassification.from_pretrained(save_model(tmp_path / "lm"), num_labels=2)
    model.save_pretrained(tmp_path / "classifier")
    dt.save_adapter(dt.attach(model, dt.AdapterConfig(rank=2, targets=("q_proj", "score"))), tmp_path / "adapter")
    options = config(("m", "d"), "run", task="text-classification", start_from=str(tmp_path / "adapter"))
    task = ("text-classification", ["bad", "good"])
    model, head = load_classifier(str(tmp_path / "classifier"), torch.float32, *task)
    attach_start(model, resolved(options), head)
    assert head == ["score"]
    assert "score" in adapted_layers(model)


def test_a_resumed_run_goes_on_with_its_own_values(assets, starts, tmp_path):
    start = str(shutil.copytree(starts / "lora", tmp_path / "start"))
    options = config(assets, tmp_path / "a", start_from=start, save_every=2)
    whole = train(options)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for run in ("a", "b"):
        shutil.rmtree(tmp_path / run / "checkpoints" / "checkpoint-4")
        (tmp_path / run / "results.json").unlink()
    resumed, screen = told(dataclasses.replace(options, resume=True))
    assert (resumed.loss_before, resumed.loss_after) == (whole.loss_before, whole.loss_after)
    assert "other than when the run began" not in screen
    later = dataclasses.replace(options, resume=True, output=tmp_path / "b")
    with pytest.raises(dt.AdapterError, match=rf"start_from was {start} when the run began, is none: "):
        train(dataclasses.replace(later, start_from=None))
    shutil.rmtree(start)
    last = tmp_path / "b" / "checkpoints" / "checkpoint-2"
    with pytest.raises(dt.AdapterError, match=rf"does not exist.*go on without it, .*: --start-from {last}\)"):
        train(later)
    assert train(dataclasses.replace(later, start_from=str(last))).loss_after == whole.loss_after


def test_a_run_that_began_afresh_is_not_resumed_from_an_adapter(assets, starts, tmp_path):
    options = config(assets, tmp_path / "a", save_every=2)
    train(options)
    with pytest.raises(dt.AdapterError, match=r"start_from was none when the run began, is .*lora"):
        train(dataclasses.replace(options, resume=True, steps=8, start_from=str(starts / "lora")))


def test_quantised_bases_serve(assets, starts, tmp_path):
    start = str(starts / "lora")
    kept, made = (
        train(config(assets, tmp_path / method, method=method, quantize="nf4", start_from=start, steps=1))
        for method in ("lora", "dora")
    )
    assert made.loss_before == pytest.approx(kept.loss_before, rel=1e-6)
    for kind, said in (("nf4", False), (None, True)):
        options = config(assets, tmp_path / f"next {said}", quantize=kind, start_from=made.adapter, steps=1)
        assert ("was trained with --quantize nf4, here it is none" in told(options)[1]) == said
