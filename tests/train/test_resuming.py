"""Which options a resumed run may have, told before a model is loaded."""

import dataclasses
import shutil

import pytest

import doratune as dt
from doratune.cli import main
from doratune.train import AdapterOptions, TrainConfig, recipe, resuming, train
from train.tiny import save_model, write_text


@pytest.fixture(scope="module")
def began(tmp_path_factory):
    """Options of runs that were stopped at their first step of two, by method."""
    folder = tmp_path_factory.mktemp("began")
    model, text = save_model(folder / "model", layers=1), write_text(folder / "text.txt")
    adapter = AdapterOptions(rank=4, alpha=8, targets=("q_proj", "up_proj"), rank_pattern={"up_proj": 2})
    found = {}
    for method in ("dora", "magnitude", "full"):
        own = dataclasses.replace(adapter, rank_pattern={}) if method == "magnitude" else adapter
        options = TrainConfig(
            str(model), (str(text),), folder / method, method=method, adapter=own, max_length=16, steps=2, save_every=1
        )
        train(options)
        shutil.rmtree(options.output / "checkpoints" / "checkpoint-2")
        (options.output / "results.json").unlink()
        found[method] = dataclasses.replace(options, resume=True)
    return found


def changed(options, **adapter):
    return dataclasses.replace(options, adapter=dataclasses.replace(options.adapter, **adapter))


def test_what_the_checkpoint_s_adapter_is_stays(began, monkeypatch):
    monkeypatch.setattr("doratune.train.run.make_model", lambda *_: pytest.fail("a model was loaded"))
    options = {"alpha": 16, "rank": 8, "targets": ("q_proj",), "rank_pattern": {}, "bias": "all"}
    with pytest.raises(dt.AdapterError) as caught:
        train(changed(began["dora"], **options))
    assert [line.partition(":")[0] for line in caught.value.problems] == [
        "rank was 4 when the run began, is 8",
        "alpha was 8 when the run began, is 16",
        'rank_pattern was {"up_proj" = 2} when the run began, is {}',
        'targets was ["q_proj", "up_proj"] when the run began, is ["q_proj"]',
        "bias was none when the run began, is all",
    ]
    assert caught.value.problems[0].endswith("leave it as it was, or begin in another output")


@pytest.mark.parametrize("before", [1.0, 4.0])
def test_whether_b_is_faster_stays(began, tmp_path, before, monkeypatch):
    monkeypatch.setattr("doratune.train.run.make_model", lambda *_: pytest.fail("a model was loaded"))
    output = shutil.copytree(began["dora"].output, tmp_path / "run")
    saved = dataclasses.replace(began["dora"], output=output, lora_plus_ratio=before)
    recipe.save_recipe(output / "recipe.toml", saved)
    with pytest.raises(dt.AdapterError, match=rf"lora_plus_ratio was {before} when the run began, is {5 - before}: "):
        train(dataclasses.replace(saved, lora_plus_ratio=5 - before))
    assert list(resuming.problems(dataclasses.replace(saved, lora_plus_ratio=before * 1.0))) == []


@pytest.mark.parametrize(
    ("method", "adapter"),
    [
        ("dora", {"targets": ("up_proj", "q_proj"), "alpha": 8.0}),
        ("dora", {"dropout": 0.1, "norm_refresh": "step"}),
        ("magnitude", {"rank": 8, "alpha": 99}),
        ("full", {"rank": 8, "targets": "all-linear"}),
    ],
    ids=["the same otherwise", "how it is trained", "without effect", "no adapter"],
)
def test_what_changes_no_checkpoint_may_change(began, method, adapter):
    assert list(resuming.problems(changed(began[method], **adapter))) == []


def test_a_single_name_is_one_as_a_flag_too(began, tmp_path, capsys):
    options = began["dora"]
    flags = ["--model", options.model, "--data", *options.data, "--output", str(tmp_path / "run"), "--max-length", "16"]
    assert main(["train", *flags, "--steps", "1", "--save-every", "1", "--targets", "all-linear"]) == 0
    assert main(["train", *flags, "--steps", "2", "--resume"]) == 0
    assert "targets" not in capsys.readouterr().err


def test_a_run_that_began_goes_on(began, tmp_path):
    options = dataclasses.replace(began["dora"], output=tmp_path / "copy")
    shutil.copytree(began["dora"].output, options.output)
    assert train(options).steps == 2
    assert list(resuming.problems(options)) == [
        f"nothing is left to train: output {options.output} holds the results of 2 steps; ask for more"
    ]
