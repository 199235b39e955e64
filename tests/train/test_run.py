import dataclasses
import io
import json
import logging
import re
import shlex
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import doratune as dt
from doratune.train import AdapterOptions, TrainConfig, TrainResult, train
from doratune.train.checkpoints import checkpoints
from doratune.train.curves import draw_curves
from doratune.train.results import read_metrics
from doratune.train.tokens import IGNORED, completion
from train.tiny import llama, save_model, save_rows, tokenizer, write_text


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assets")
    return save_model(folder / "model", layers=1), write_text(folder / "text.txt")


def config(assets, output, **values):
    options = {
        "max_length": 16,
        "steps": 6,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "log_every": 1,
        "save_every": 2,
        "adapter": AdapterOptions(rank=4),
    }
    values = {"data": (str(assets[1]),), **values}
    return TrainConfig(model=str(assets[0]), output=output, **{**options, **values})


def test_a_run_learns_and_leaves_what_it_promises(assets, tmp_path, monkeypatch):
    monkeypatch.setattr("doratune.train.run.draw_curves", draw_curves)
    screen = io.StringIO()
    result = train(config(assets, tmp_path / "run", prompt="once", sample_tokens=4), Console(file=screen, width=200))
    folder = tmp_path / "run"
    assert result.loss_after < result.loss_before
    assert TrainResult.load(folder) == result
    assert {p.name for p in folder.iterdir()} == {
        "adapter",
        "checkpoints",
        "curves.png",
        "metrics.jsonl",
        "recipe.toml",
        "results.json",
    }
    assert {p.name for p in (folder / "adapter").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "doratune.json",
    }
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    records = read_metrics(folder / "metrics.jsonl")
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if "eval_loss" in r] == [0, 6]
    assert records[-1]["eval_loss"] == result.loss_after
    assert records[-1]["tokens"] == 6 * 2 * 16
    assert "step 6/6" in screen.getvalue()
    assert "tokens/s" in screen.getvalue()
    assert result.sample_before is not None
    model = dt.load_adapter(llama(layers=1), folder / "adapter")
    about = dt.summary(model)
    assert (about.direction, about.magnitude, about.base) == (result.direction, result.magnitude, result.base)
    assert result.steps == 6


@pytest.mark.parametrize("method", ["lora", "magnitude"])
def test_other_methods(assets, tmp_path, method):
    result = train(config(assets, tmp_path / "run", method=method))
    assert result.loss_after < result.loss_before
    assert (result.magnitude > 0) == (method == "magnitude")
    dt.load_adapter(llama(layers=1), tmp_path / "run" / "adapter")


def test_full_fine_tuning_writes_a_model(assets, tmp_path, caplog):
    from doratune.train.models import load_model

    result = train(config(assets, tmp_path / "run", method="full"))
    assert "has no adapter" not in caplog.text  # as was asked for
    assert result.trained == result.base
    assert result.loss_after < result.loss_before
    for again in (load_model(result.adapter), *loaded(result.next_steps())):
        up, base = (model.model.layers[0].mlp.up_proj.weight for model in (again, llama(layers=1)))
        assert not torch.equal(up, base)


def test_two_runs_are_equal_and_a_resumed_one_too(assets, tmp_path):
    first = train(config(assets, tmp_path / "a"))
    second = train(config(assets, tmp_path / "b"))
    assert first.loss_after == second.loss_after
    # Killed while checkpoint-6 was written, metrics ahead of the checkpoint, one line cut.
    (tmp_path / "b" / "checkpoints" / "checkpoint-6" / "complete.json").unlink()
    shutil.rmtree(tmp_path / "b" / "adapter")
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    resumed = train(config(assets, tmp_path / "b", resume=True))
    assert resumed.loss_after == first.loss_after
    assert resumed.loss_before == first.loss_before
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in "ab")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    metrics = [
        [(r["step"], r.get("loss"), r.get("eval_loss")) for r in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in "ab"
    ]
    assert metrics[0] == metrics[1]


def begun(assets, output, **values):
    """A run that ended at its fourth step of six."""
    train(config(assets, output, **values))
    shutil.rmtree(output / "checkpoints" / "checkpoint-6")
    (output / "results.json").unlink()


def rates(output):
    return {r["step"]: r["learning_rate"] for r in read_metrics(output / "metrics.jsonl") if "loss" in r}


@pytest.mark.parametrize("method", ["dora", "full"])
def test_a_resumed_run_has_the_rates_that_are_asked_for_now(assets, tmp_path, method):
    options = {"method": method, "schedule": "cosine", "warmup": 0}
    begun(assets, tmp_path / "a", **options)
    train(config(assets, tmp_path / "a", resume=True, **{**options, "learning_rate": 1e-3}))
    train(config(assets, tmp_path / "b", **options))
    asked = {step: rate * (0.1 if step > 4 else 1) for step, rate in rates(tmp_path / "b").items()}
    assert rates(tmp_path / "a") == pytest.approx(asked)


@pytest.mark.parametrize("ratio", [4.0, 1.0])
def test_every_group_has_the_options_that_are_asked_for_now(assets, tmp_path, ratio, monkeypatch):
    from doratune.train.trainer import AdapterTrainerMixin

    groups = []

    def note(self, **kwargs):
        groups.extend({k: g[k] for k in ("name", "lr", "weight_decay")} for g in self.optimizer.param_groups)
        return original(self, **kwargs)

    original = AdapterTrainerMixin._run_epoch
    options = {"schedule": "constant", "warmup": 0}
    begun(assets, tmp_path / "a", lora_plus_ratio=4.0 if ratio == 4 else 1.0, weight_decay=0.5, **options)
    monkeypatch.setattr(AdapterTrainerMixin, "_run_epoch", note)
    asked = {"magnitude_learning_rate": 2e-3, "weight_decay": 0.25, "magnitude_weight_decay": 0.125}
    ratio = 8.0 if ratio == 4 else 1.0
    train(config(assets, tmp_path / "a", resume=True, lora_plus_ratio=ratio, **options, **asked))
    found = {g["name"]: (g["lr"], g["weight_decay"]) for g in groups}
    expected = {"weights": (1e-2, 0.25), "B": (8e-2, 0.25), "magnitudes": (2e-3, 0.125)}
    if ratio == 1:
        del expected["B"]
    assert found == expected


def test_another_optimizer_than_the_checkpoint_s_is_refused(assets, tmp_path):
    begun(assets, tmp_path / "a")
    with pytest.raises(dt.AdapterError, match=r"optimizer was adamw when the run began, is sgd: .* in another output"):
        train(config(assets, tmp_path / "a", resume=True, optimizer="sgd"))


@pytest.mark.parametrize(("was", "now"), [("dora", "full"), ("full", "dora"), ("dora", "lora")])
def test_another_method_than_the_checkpoint_s_is_refused(assets, tmp_path, was, now):
    begun(assets, tmp_path / "a", method=was)
    with pytest.raises(dt.AdapterError, match=rf"method was {was} when the run began, is {now}: .* in another output"):
        train(config(assets, tmp_path / "a", method=now, resume=True))


def test_a_resumed_run_has_the_intervals_that_are_asked_for_now(assets, tmp_path):
    begun(assets, tmp_path / "a", eval_every=4)
    asked = {"log_every": 3, "eval_every": 5, "save_every": 1, "keep": 9}
    train(config(assets, tmp_path / "a", resume=True, steps=8, **asked))
    records = [r for r in read_metrics(tmp_path / "a" / "metrics.jsonl") if r["step"] > 4]
    assert [r["step"] for r in records if "loss" in r] == [6]
    assert [r["step"] for r in records if "eval_loss" in r] == [5, 8]
    found = {p.name for p in checkpoints(tmp_path / "a" / "checkpoints")}
    assert found >= {"checkpoint-5", "checkpoint-6", "checkpoint-7", "checkpoint-8"}


def test_checkpoints_are_limited(assets, tmp_path):
    train(config(assets, tmp_path / "a", save_every=1, keep=2))
    assert [p.name for p in checkpoints(tmp_path / "a" / "checkpoints")] == ["checkpoint-5", "checkpoint-6"]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"steps": 1}, [1e-2]),
        ({"steps": None, "epochs": 0.01}, [1e-2]),
        ({"steps": 2, "warmup": 0.9}, [0, 1e-2]),
        ({"steps": 2}, [0, 1e-2]),
    ],
    ids=str,
)
def test_warm_up_leaves_a_step_to_learn_in(assets, tmp_path, asked, expected):
    train(config(assets, tmp_path / "a", schedule="constant", **asked))
    assert list(rates(tmp_path / "a").values()) == pytest.approx(expected)


def test_epochs_count_where_steps_are_absent(assets, tmp_path):
    result = train(config(assets, tmp_path / "a", steps=None, epochs=0.25, save_every=None))
    assert result.steps == pytest.approx(result.examples / 2 / 4, abs=1)
    assert not checkpoints(tmp_path / "a" / "checkpoints")


def test_wrong_input_is_listed_before_a_model_is_loaded(assets, tmp_path, monkeypatch):
    monkeypatch.setattr("doratune.train.assemble.load_model", lambda *_: pytest.fail("a model was loaded"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    wrong = config(assets, tmp_path / "full", steps=-1, batch_size=0)
    wrong.model, wrong.data = str(tmp_path / "no model"), ("no.txt",)
    with pytest.raises(dt.AdapterError) as caught:
        train(wrong)
    for part in ("5 problems", "steps", "batch_size", "no.txt: no such file", "no such folder", "is not empty"):
        assert part in str(caught.value)


def test_resume_without_checkpoints_is_refused(assets, tmp_path):
    with pytest.raises(dt.AdapterError, match="no checkpoint to resume from"):
        train(config(assets, tmp_path / "absent", resume=True))


def test_targets_that_match_nothing_are_refused(assets, tmp_path):
    with pytest.raises(dt.AdapterError, match="matches no module"):
        train(config(assets, tmp_path / "a", adapter=AdapterOptions(targets=("nothing",))))
    assert not (tmp_path / "a").exists()


def test_a_loss_that_is_not_finite_stops_the_run(assets, tmp_path):
    with pytest.raises(dt.AdapterError, match=r"the loss is .* at step"):
        train(config(assets, tmp_path / "a", learning_rate=1e30, max_grad_norm=0, method="full", save_every=None))


def loaded(commands):
    """The models that each of the printed pieces of Python loads, by itself."""
    pieces = re.split(r"^#.*\n", commands, flags=re.MULTILINE)
    for piece in pieces:
        if "import" in piece:
            names = {}
            exec(piece, names)
            yield names["model"]


def test_the_table_and_the_commands(assets, tmp_path):
    result = train(config(assets, tmp_path / 'a "king"', steps=2, warmup=0, save_every=None))
    screen = io.StringIO()
    Console(file=screen, width=160).print(result.table())
    for part in ("trained parameters", "held-out perplexity", "peak memory", "tokens/s"):
        assert part in screen.getvalue()
    commands = result.next_steps()
    assert "doratune merge" in commands
    models = [model.eval() for model in loaded(commands)]
    assert len(models) == 2
    ids = torch.arange(12).view(2, 6)
    ours, theirs = (model(ids).logits for model in models)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, llama(layers=1).eval()(ids).logits, atol=1e-5)
    assert json.loads((tmp_path / 'a "king"' / "results.json").read_text())["peak_memory"] > 2**20
    use, measure = dataclasses.replace(result, prompt='a "king"').next_steps().splitlines()[1:3]
    assert shlex.split(measure) == ["doratune", "evaluate", result.adapter, "--data", "more.jsonl"]
    assert shlex.split(use) == ["doratune", "generate", result.adapter, "--prompt", 'a "king"']
    assert " --chat\n" in dataclasses.replace(result, chat=True).next_steps()


def test_what_peft_cannot_read_is_not_said_to_be_for_peft(assets, tmp_path, monkeypatch):
    monkeypatch.setattr("doratune.train.run.inexpressible", lambda model, name: {"PEFT lacks it": "model.layers.0"})
    result = train(config(assets, tmp_path / "run", steps=1, save_every=None))
    assert not result.peft
    assert not TrainResult.load(tmp_path / "run").peft
    assert "PeftModel" not in result.next_steps()
    assert "PeftModel" not in (tmp_path / "run" / "adapter" / "README.md").read_text()


def test_a_terminal_gets_a_bar_with_everything(assets, tmp_path):
    screen = io.StringIO()
    train(config(assets, tmp_path / "a", eval_every=2), Console(file=screen, force_terminal=True, width=160))
    for part in ("step 6/6", "loss", "held-out", "tokens/s", "GiB", "left"):
        assert part in screen.getvalue()


def test_what_is_sent_elsewhere_is_handed_to_the_trainer(assets, tmp_path, monkeypatch):
    import transformers

    asked = []
    original = transformers.TrainingArguments

    def note(*args, **kwargs):
        asked.append(kwargs["report_to"])
        return original(*args, **{**kwargs, "report_to": "none"})

    monkeypatch.setattr(transformers, "TrainingArguments", note)
    monkeypatch.setattr("doratune.train.checks.installed", lambda _: True)
    train(config(assets, tmp_path / "a", steps=1, report_to=("wandb", "trackio")))
    assert asked == [["wandb", "trackio"]]


def test_classifiers_are_inspected_and_merged_like_others(tmp_path, capsys):
    from transformers import AutoModelForImageClassification

    from doratune.cli import main
    from train.tiny import save_image_folder, save_vision_model

    model, images = save_vision_model(tmp_path / "vit"), save_image_folder(tmp_path / "images")
    options = config((model, images), tmp_path / "run", task="image-classification", eval_every=2)
    result = train(options)
    commands = [
        line for line in result.next_steps().splitlines() if line.startswith(("doratune inspect", "doratune merge"))
    ]
    for command in commands:
        assert main(command.split()[1:]) == 0, command
    assert [model.num_labels for model in loaded(result.next_steps())] == [2, 2]
    capsys.readouterr()
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "merged")
    assert merged.config.id2label == {0: "blue", 1: "red"}


def test_metrics_go_to_tensorboard_too(assets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(config(assets, tmp_path / "run", report_to=("tensorboard",), eval_every=3))
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    found.Reload()
    assert {"train/loss", "train/learning_rate", "eval/loss"} <= set(found.Tags()["scalars"])
    assert [point.step for point in found.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [point.step for point in found.Scalars("eval/loss")] == [0, 3, 6]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    losses = [record["loss"] for record in records if "loss" in record]
    assert [point.value for point in found.Scalars("train/loss")] == pytest.approx(losses)


def test_one_process_trains_on_one_of_several_gpus(assets, tmp_path, monkeypatch):
    from transformers import TrainingArguments

    def with_four(self):
        prepare(self)
        _ = self.device
        self._n_gpu = 4

    prepare = TrainingArguments.__post_init__
    monkeypatch.setattr(TrainingArguments, "__post_init__", with_four)
    monkeypatch.setattr(torch.nn.DataParallel, "__init__", None)  # what Trainer would run the model with
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    screen = io.StringIO()
    train(config(assets, tmp_path / "run"), Console(file=screen, width=200))
    assert "one of 4 GPUs (all of them: torchrun --nproc-per-node 4 -m doratune train ...)" in screen.getvalue()


def test_a_run_that_is_over_is_not_begun_again(assets, tmp_path):
    result = train(config(assets, tmp_path / "run"))
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()}
    for steps in (6, 4):
        with pytest.raises(dt.AdapterError, match=r"nothing is left to train: .* holds the results of 6 steps"):
            train(config(assets, tmp_path / "run", resume=True, steps=steps))
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()} == before
    assert train(config(assets, tmp_path / "run", resume=True, steps=8)).steps == 8 > result.steps
    train(config(assets, tmp_path / "without", save_every=None))
    before = (tmp_path / "without" / "results.json").read_text()
    for asked in ({}, {"steps": 8}, {"steps": None, "epochs": 0.05}):
        with pytest.raises(dt.AdapterError, match=r"left to train: .* 6 steps, and no checkpoint to go on from"):
            train(config(assets, tmp_path / "without", save_every=None, resume=True, **asked))
    assert (tmp_path / "without" / "results.json").read_text() == before


@pytest.mark.parametrize("asked", [{"steps": 3}, {"steps": None, "epochs": 0.1}], ids=["steps", "epochs"])
def test_fewer_steps_than_the_checkpoint_has_are_refused(assets, tmp_path, asked):
    begun(assets, tmp_path / "run")
    before = (tmp_path / "run" / "recipe.toml").read_text()
    said = r"nothing is left to train: the last checkpoint is at step 4, and [23] steps are asked for; ask for more"
    with pytest.raises(dt.AdapterError, match=said):
        train(config(assets, tmp_path / "run", resume=True, **asked))
    assert (tmp_path / "run" / "recipe.toml").read_text() == before
    assert train(config(assets, tmp_path / "run", resume=True, steps=4)).steps == 4


def test_results_of_an_earlier_end_do_not_keep_a_run_from_its_own(assets, tmp_path):
    train(config(assets, tmp_path / "run"))
    earlier = (tmp_path / "run" / "results.json").read_text()
    train(config(assets, tmp_path / "run", resume=True, steps=8))
    for text in (earlier, "{", None):  # killed after its last checkpoint
        (tmp_path / "run" / "results.json").unlink()
        if text is not None:
            (tmp_path / "run" / "results.json").write_text(text)
        assert train(config(assets, tmp_path / "run", resume=True, steps=8)).steps == 8


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "complete.json"])
def test_a_damaged_checkpoint_is_passed_over_and_said_once(assets, tmp_path, name, caplog):
    expected = train(config(assets, tmp_path / "run", steps=4)).loss_after
    file = tmp_path / "run" / "checkpoints" / "checkpoint-4" / name
    file.write_bytes(b"\0" * file.stat().st_size)
    (tmp_path / "run" / "results.json").unlink()
    screen = io.StringIO()
    with caplog.at_level(logging.WARNING, "doratune"):
        found = train(config(assets, tmp_path / "run", steps=4, resume=True), Console(file=screen))
    assert (screen.getvalue() + caplog.text).count(str(file.parent)) == 1
    assert ("cut short" if name == "complete.json" else f"is damaged, {name} cannot be read") in screen.getvalue()
    assert found.loss_after == expected


def test_options_of_a_resume_that_is_refused_are_not_kept(assets, tmp_path):
    train(config(assets, tmp_path / "run"))
    (tmp_path / "run" / "results.json").unlink()
    before = (tmp_path / "run" / "recipe.toml").read_text()
    with pytest.raises(dt.AdapterError, match="nothing is left to train: the last checkpoint is at step 6"):
        train(config(assets, tmp_path / "run", resume=True, steps=None, epochs=0.01))
    assert (tmp_path / "run" / "recipe.toml").read_text() == before
    train(config(assets, tmp_path / "run", resume=True, steps=8))
    assert "steps = 8" in (tmp_path / "run" / "recipe.toml").read_text()


def test_paths_may_be_text(assets, tmp_path):
    from doratune.train.information import Information
    from doratune.train.models import load_base

    result = train(TrainConfig(str(assets[0]), str(assets[1]), str(tmp_path / "run"), max_length=16, steps=1))
    assert (tmp_path / "run" / "adapter").is_dir()
    assert Information.load(result.adapter).task == "text-generation"
    assert load_base(result.adapter).config.model_type == "llama"


@pytest.mark.parametrize("packing", [False, True])
def test_held_out_loss_is_a_mean_over_tokens_whatever_shares_a_batch(assets, tmp_path, packing):
    rows = [{"prompt": "a", "completion": "bcd " * length} for length in (1, 6, 1, 2, 9, 1, 1)]
    data = (str(save_rows(tmp_path / "rows.jsonl", rows)),)
    losses = []
    for size in (1, 2, 4):
        options = {"packing": packing, "batch_size": size, "steps": 1, "max_length": 64}
        result = train(config(assets, tmp_path / str(size), data=data, eval_data=data, **options))
        losses.append(result.loss_before)
    total, count = torch.zeros(()), 0
    for row in rows:
        example = completion(row["prompt"], row["completion"], tokenizer(), learn_prompt=False)
        labels = torch.tensor(example.labels.tolist())
        with torch.no_grad():
            logits = llama(layers=1)(torch.tensor([example.ids.tolist()])).logits[0]
        total += torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum")
        count += int((labels[1:] != IGNORED).sum())
    assert losses == pytest.approx([float(total) / count] * 3, rel=1e-6)
