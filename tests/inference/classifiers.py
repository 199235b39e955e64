"""Tiny classifiers trained for a few steps, and what they are to classify."""

import numpy as np
from rich.console import Console

from doratune.train import AdapterOptions, TrainConfig, train
from train.tiny import (
    images,
    reviews,
    save_encoder,
    save_image_folder,
    save_model,
    save_model_with_other_ends,
    save_rows,
    save_vision_model,
)

MODELS = {"encoder": save_encoder, "decoder": save_model, "decoder with other ends": save_model_with_other_ends}


def train_on_images(folder, method="dora"):
    """A run on blue and red images at another size than the model's; held out are those of ``test.npz``."""
    save_image_folder(folder / "photos")
    pixels, classes = images(12, seed=5)
    names = np.array(["blue", "red"])
    np.savez(folder / "test.npz", x_test=pixels, y_test=classes, label_names=names)
    config = TrainConfig(
        model=str(save_vision_model(folder / "vit")),
        data=(str(folder / "photos"),),
        eval_data=(str(folder / "test.npz"),),
        output=folder / "run",
        task="image-classification",
        method=method,
        image_size=24,
        **common(),
    )
    return train(config, Console(quiet=True))


def train_on_texts(folder, method="dora", kind="encoder", max_length=24, **options):
    """A run on reviews; held out are those of ``test.jsonl``."""
    test = [{"review": row["review"] + " and so on", "label": row["label"]} for row in reviews(20)]
    config = TrainConfig(
        model=str(MODELS[kind](folder / "model")),
        data=(str(save_rows(folder / "train.jsonl", reviews(60))),),
        eval_data=(str(save_rows(folder / "test.jsonl", test)),),
        output=folder / "run",
        task="text-classification",
        method=method,
        max_length=max_length,
        **options,
        **common(),
    )
    return train(config, Console(quiet=True))


def common():
    return {"adapter": AdapterOptions(rank=4), "learning_rate": 2e-2, "steps": 16, "batch_size": 8, "save_every": None}
