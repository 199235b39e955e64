"""A part that is measured once, after training, and is neither trained on nor chosen by."""

import pytest
import torch
from rich.console import Console

import doratune as dt
from doratune.train import AdapterOptions, TrainConfig, train
from doratune.train.gather import set_aside
from doratune.train.models import load_base
from doratune.train.tasks import task_of
from train.tiny import (
    reviews,
    save_encoder,
    save_image_folder,
    save_model,
    save_rows,
    save_vision_model,
    write_text,
)


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assets")
    save_encoder(folder / "encoder")
    save_model(folder / "llama")
    save_vision_model(folder / "vit")
    save_image_folder(folder / "images", 40)
    save_rows(folder / "reviews.jsonl", reviews(40))
    save_rows(folder / "pairs.jsonl", [{"prompt": f"ask {i} ", "completion": "tell"} for i in range(40)])
    write_text(folder / "text.txt")
    return folder


KINDS = {
    "images": ("image-classification", "vit"),
    "reviews.jsonl": ("text-classification", "encoder"),
    "pairs.jsonl": ("text-generation", "llama"),
    "text.txt": ("text-generation", "llama"),
}


def config(assets, name, **values):
    task, model = KINDS[name]
    return TrainConfig(str(assets / model), (str(assets / name),), task=task, max_length=16, **values)


def contents(part):
    return [str({key: torch.as_tensor(value).tolist() for key, value in row.items()}) for row in part]


@pytest.mark.parametrize("name", KINDS)
def test_a_share_is_set_aside_whatever_the_seed(assets, name):
    said = []
    options = {"test_fraction": 0.25, "eval_fraction": 0.2}
    found = task_of(KINDS[name][0]).prepare(config(assets, name, **options), said.append)
    whole = task_of(KINDS[name][0]).prepare(config(assets, name), lambda _: None)
    count = len(whole.train) + len(whole.held_out)
    assert len(found.test) == pytest.approx(count / 4, abs=1)
    assert len(found.held_out) == pytest.approx((count - len(found.test)) / 5, abs=1)
    parts = [contents(part) for part in (found.train, found.held_out, found.test)]
    everything = [row for part in parts for row in part]
    assert sorted(everything) == sorted(contents(whole.train) + contents(whole.held_out)), "every row once"
    other = task_of(KINDS[name][0]).prepare(config(assets, name, seed=9, **options), lambda _: None)
    assert contents(other.test) == parts[2]
    assert f"{len(found.test)} to test on" in "\n".join(said)
    assert whole.test is None


@pytest.mark.parametrize("name", KINDS)
def test_test_data_are_taken_as_they_are(assets, name):
    data = (str(assets / name),)
    found = task_of(KINDS[name][0]).prepare(
        config(assets, name, test_data=data, eval_data=data, test_fraction=0.5), lambda _: None
    )
    assert len(found.train) == len(found.held_out) == len(found.test)


@pytest.mark.parametrize("name", ["images", "text.txt"])
def test_it_is_measured_with_the_trained_model(assets, tmp_path, name):
    options = {"steps": 4, "adapter": AdapterOptions(rank=2), "learning_rate": 1e-2, "output": tmp_path / "run"}
    made = config(assets, name, test_fraction=0.25, **options)
    result = train(made, Console(quiet=True))
    prepared = task_of(made.task).prepare(made, lambda _: None)
    model = dt.load_adapter(load_base(tmp_path / "run" / "adapter"), tmp_path / "run" / "adapter").eval()
    with torch.no_grad():
        outputs = [model(**prepared.collate([row])) for row in prepared.test]
    assert result.test_examples == len(prepared.test)
    assert result.test_loss == pytest.approx(float(sum(o.loss for o in outputs)) / len(outputs), abs=1e-3)
    if name == "images":
        right = [int(o.logits.argmax()) == row["labels"] for o, row in zip(outputs, prepared.test, strict=True)]
        assert result.test_accuracy == pytest.approx(sum(right) / len(right))
    else:
        assert result.test_accuracy is None
    console = Console(width=120, record=True, quiet=False)
    with console.capture() as captured:
        console.print(result.table())
    assert "test loss" in captured.get()


def test_classes_of_test_data_have_to_be_known(assets, tmp_path):
    other = str(save_rows(tmp_path / "other.jsonl", [{"review": "x", "label": "ugly"}]))
    with pytest.raises(dt.AdapterError, match="test_data has classes that the data to train on lack: ugly"):
        task_of("text-classification").prepare(config(assets, "reviews.jsonl", test_data=(other,)), lambda _: None)


def test_nothing_is_set_aside_for_nothing():
    assert set_aside([1, 2, 3], 0.0) == ([1, 2, 3], [])
    kept, held = set_aside(list(range(10)), 0.3)
    assert (len(kept), len(held)) == (7, 3)


def test_a_wrong_share_and_a_stream_are_refused():
    wrong = TrainConfig("m", ("d",), test_fraction=1.0, streaming=True, steps=1)
    found = list(wrong.problems())
    assert "test_fraction must be at least 0 and below 1; found 1.0" in found
    assert "streaming cannot set a test_fraction aside; name test_data" in found
