"""Data to measure on alone: what a run makes of them as held-out data."""

import numpy as np
import pytest
import torch

import doratune as dt
from doratune.train import TrainConfig
from doratune.train.models import load_image_processor, load_tokenizer
from doratune.train.tasks import classification, image, task_of, text
from train.tiny import (
    images,
    reviews,
    save_chat_model,
    save_encoder,
    save_image_folder,
    save_rows,
    save_vision_model,
    write_text,
)


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assets")
    save_chat_model(folder / "llama")
    save_encoder(folder / "encoder")
    save_vision_model(folder / "vit")
    for part, count in (("train", 12), ("test", 7)):
        write_text(folder / f"text-{part}.txt", 20 * count)
        pairs = [{"prompt": f"ask {i} ", "completion": f"tell {i}"} for i in range(count)]
        save_rows(folder / f"pairs-{part}.jsonl", pairs)
        save_rows(folder / f"reviews-{part}.jsonl", reviews(count))
    save_image_folder(folder / "images-train")
    pixels, classes = images(7, seed=5)
    np.savez(folder / "images-test.npz", x_test=pixels, y_test=classes, label_names=np.array(["blue", "red"]))
    return folder


CASES = {
    "documents": ("text-generation", "llama", "text-{}.txt", {}),
    "documents apart": ("text-generation", "llama", "text-{}.txt", {"packing": False}),
    "pairs": ("text-generation", "llama", "pairs-{}.jsonl", {}),
    "all of the pairs": ("text-generation", "llama", "pairs-{}.jsonl", {"loss_on": "all", "as_chat": True}),
    "packed pairs": ("text-generation", "llama", "pairs-{}.jsonl", {"packing": True, "max_length": 64}),
    "texts": ("text-classification", "encoder", "reviews-{}.jsonl", {}),
    "images": ("image-classification", "vit", "images-{}", {"image_size": 24}),
}


def both(assets, case):
    """Options of a run that measures on the data, and of measuring alone."""
    task, model, name, options = CASES[case]
    train, test = (
        (str(assets / name.format(part)) + (".npz" if part == "test" and task[0] == "i" else ""),)
        for part in ("train", "test")
    )
    common = {"task": task, **{"max_length": 16, **options}}
    model = str(assets / model)
    return TrainConfig(model, train, eval_data=test, **common), TrainConfig(model, test, **common)


@pytest.mark.parametrize("case", CASES)
def test_it_is_what_the_run_holds_out(assets, case):
    config, alone = both(assets, case)
    expected = task_of(config.task).prepare(config, lambda _: None)
    said = []
    if case == "images":
        processor = load_image_processor(alone.model, 24)
        found = image.to_measure(alone, processor, expected.labels, expected.forward, said.append)
    elif case == "texts":
        found = classification.to_measure(alone, load_tokenizer(alone.model), expected.labels, said.append)
    else:
        found = text.to_measure(alone, load_tokenizer(alone.model), said.append)
    assert (found.train, found.test, found.examples) == (None, None, None)
    assert (found.example, found.unit, found.labels) == (expected.example, expected.unit, expected.labels)
    assert len(found.held_out) == len(expected.held_out)
    one, other = (part.collate([part.held_out[i] for i in range(len(part.held_out))]) for part in (found, expected))
    assert one.keys() == other.keys()
    for key in one:
        assert torch.as_tensor(one[key]).equal(torch.as_tensor(other[key])), key


def test_text_that_fills_no_block(assets):
    _, alone = both(assets, "documents")
    alone.max_length = 4096
    with pytest.raises(dt.AdapterError, match=r"it fills no block of 4096 tokens; .* a smaller max_length"):
        text.to_measure(alone, load_tokenizer(alone.model), lambda _: None)


def test_completions_beyond_what_is_read(assets):
    _, alone = both(assets, "pairs")
    alone.max_length = 4
    with pytest.raises(dt.AdapterError, match="no example is left to measure on"):
        text.to_measure(alone, load_tokenizer(alone.model), lambda _: None)


def test_unknown_classes_are_named(assets):
    _, alone = both(assets, "texts")
    with pytest.raises(dt.AdapterError, match=r"data has classes that the data to train on lack: bad; known are good"):
        classification.to_measure(alone, load_tokenizer(alone.model), ("good", "fine"), lambda _: None)
    _, alone = both(assets, "images")
    with pytest.raises(dt.AdapterError, match="data has classes that the data to train on lack: blue"):
        image.to_measure(alone, load_image_processor(alone.model), ("red", "green"), {}, lambda _: None)
