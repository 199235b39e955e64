import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import doratune as dt
from doratune.train import AdapterOptions, TrainConfig, train
from doratune.train.images import Picture
from doratune.train.information import Information
from doratune.train.models import load_base, load_image_processor
from doratune.train.output import METRICS
from doratune.train.results import read_metrics
from doratune.train.tasks import image as module
from train.tiny import images, save_encoder, save_image_folder, save_rows, save_vision_model


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assets")
    for kind in ("vit", "dinov2", "swin", "swinv2", "beit"):
        save_vision_model(folder / kind, kind)
    save_image_folder(folder / "images")
    return folder


def config(assets, tmp_path, model="vit", data=None, **values):
    options = {"adapter": AdapterOptions(rank=4), "learning_rate": 2e-2, "steps": 16, "batch_size": 8}
    return TrainConfig(
        model=str(assets / model),
        data=(str(data or assets / "images"),),
        output=tmp_path / "run",
        task="image-classification",
        **{**options, **values},
    )


def prepare(config, said=None):
    return module.prepare(config, (said if said is not None else []).append)


@pytest.mark.parametrize("model", ["vit", "dinov2", "swin", "swinv2", "beit"])
def test_a_16_bit_base_learns(assets, tmp_path, model):
    options = config(assets, tmp_path, model, dtype="bfloat16", eval_fraction=0.25)
    assert prepare(options).collate([prepare(options).train[0]])["pixel_values"].dtype == torch.bfloat16
    result = train(options, Console(quiet=True))
    assert result.loss_after < result.loss_before


@pytest.mark.parametrize("model", ["vit", "dinov2", "swin", "swinv2", "beit"])
def test_accumulated_batches_are_one_batch(assets, tmp_path, model):
    found = []
    for name, sizes in (("one", {"batch_size": 6}), ("three", {"batch_size": 2, "gradient_accumulation": 3})):
        options = {"steps": 2, "eval_fraction": 0.25, "log_every": 1, "augment": (), "learning_rate": 1e-3}
        train(config(assets, tmp_path / name, model, **options, **sizes), Console(quiet=True))
        records = read_metrics(tmp_path / name / "run" / METRICS)
        found.append([(r["loss"], r["grad_norm"]) for r in records if "grad_norm" in r])
    assert found[0][0] == pytest.approx(found[1][0], rel=0.2), "but for what dropout takes out in swinv2 and beit"


@pytest.mark.parametrize("size", [None, 24])
@pytest.mark.parametrize("model", ["vit", "dinov2", "swin"])
def test_a_vision_model_learns_and_comes_back(assets, tmp_path, model, size):
    options = config(assets, tmp_path, model, image_size=size, eval_fraction=0.25)
    result = train(options, Console(quiet=True))
    assert result.loss_after < result.loss_before
    folder = tmp_path / "run" / "adapter"
    about = Information.load(folder)
    assert about.labels == ("blue", "red")
    assert about.image_size == ((size or 16),) * 2
    assert bool(about.forward) == (size is not None and model != "dinov2")
    again = dt.load_adapter(load_base(folder), folder).eval()
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder)
    held = prepare(options).held_out
    with torch.no_grad():
        right = 0
        for picture, expected in zip(held.found, held.classes, strict=True):
            pixels = processor(picture.open(), return_tensors="pt")
            right += int(again(**pixels, **about.forward).logits.argmax()) == expected
    assert right / len(held) == pytest.approx(result.accuracy_after)


@pytest.mark.parametrize("method", ["lora", "magnitude", "head", "full"])
def test_other_methods(assets, tmp_path, method):
    result = train(config(assets, tmp_path, method=method, steps=4), Console(quiet=True))
    assert result.labels == ("blue", "red")
    folder = tmp_path / "run" / ("adapter" if method in ("lora", "magnitude") else "model")
    assert (folder / "preprocessor_config.json").is_file()
    if method == "head":
        assert result.trained == 2 * 16 + 2
        before = load_base(folder).vit.encoder if hasattr(load_base(folder).vit, "encoder") else load_base(folder).vit
        from transformers import ViTModel

        original = dict(ViTModel.from_pretrained(assets / "vit").named_parameters())
        own = {n.removeprefix("vit."): p for n, p in load_base(folder).named_parameters() if n.startswith("vit.")}
        assert before is not None
        assert all(torch.equal(p, original[n]) for n, p in own.items())


@pytest.mark.parametrize("options", [{"quantize": "nf4"}, {"quantize": "int8"}, {"dtype": "bfloat16"}])
def test_small_bases_learn(assets, tmp_path, options):
    result = train(config(assets, tmp_path, **options), Console(quiet=True))
    assert result.loss_after < result.loss_before


def test_sources_of_images_agree(assets, tmp_path):
    pixels, labels = images(24)
    names = np.array(["blue", "red"])
    files = []
    for number, (one, label) in enumerate(zip(pixels, names[labels], strict=True)):
        Image.fromarray(one).save(tmp_path / f"{number}.png")
        files.append({"file": f"{number}.png", "label": label})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["blue", "red"])})
    made = datasets.Dataset.from_dict({"image": list(pixels), "label": labels.tolist()}, features=features)
    made.save_to_disk(tmp_path / "set")
    made.to_parquet(tmp_path / "set.parquet")
    np.savez(tmp_path / "a.npz", images=pixels, labels=labels, label_names=names)
    np.savez(tmp_path / "b.npz", x_train=pixels.transpose(0, 3, 1, 2) / 255.0, y_train=labels[:, None])
    sources = [save_rows(tmp_path / "t.jsonl", files), tmp_path / "set", tmp_path / "a.npz", tmp_path / "b.npz"]
    expected = None
    for source in [*sources, tmp_path / "set.parquet"]:
        found = prepare(config(assets, tmp_path, data=source))
        if source.name != "b.npz" and source.suffix != ".parquet":
            assert found.labels == ("blue", "red"), source
        stacked = torch.stack([found.train[i]["pixel_values"] for i in range(len(found.train))])
        expected = stacked if expected is None else expected
        assert torch.equal(stacked, expected), source


def test_an_archive_brings_its_own_test_images(assets, tmp_path):
    (train_pixels, train_labels), (test_pixels, test_labels) = images(8), images(6, 1)
    arrays = {"x_train": train_pixels, "y_train": train_labels, "x_test": test_pixels, "y_test": test_labels}
    np.savez(tmp_path / "all.npz", **arrays)
    said = []
    found = prepare(config(assets, tmp_path, data=tmp_path / "all.npz"), said)
    assert (len(found.train), len(found.held_out)) == (8, 6)
    assert "the archive brings its own images to measure on" in said


def test_gray_images_become_rgb():
    gray = np.full((4, 5), 128, np.uint8)
    for array in (gray, gray[..., None], gray[None].repeat(1, 0), gray / 255.0):
        opened = Picture("x", array, "a").open()
        assert (opened.mode, opened.size) == ("RGB", (5, 4))
        assert abs(opened.getpixel((0, 0))[0] - 128) <= 1


def test_augmentation_depends_on_seed_epoch_and_image_alone(assets, tmp_path):
    options = config(assets, tmp_path, augment=("crop", "flip", "rotate", "color"))
    first, second = prepare(options).train, prepare(options).train
    _ = second[3], second[1]  # in another order
    assert torch.equal(first[0]["pixel_values"], second[0]["pixel_values"])
    before = first[0]["pixel_values"]
    first.epoch = 1
    assert not torch.equal(first[0]["pixel_values"], before)
    options.augment = ()
    assert not torch.equal(prepare(options).train[0]["pixel_values"], before)
    held = prepare(config(assets, tmp_path, augment=("crop",))).held_out
    assert torch.equal(held[0]["pixel_values"], prepare(options).held_out[0]["pixel_values"])


def test_epochs_differ_and_a_resumed_run_sees_the_same_images(assets, tmp_path):
    """24 images, 21 to train on, batches of 8: a checkpoint in the middle of the second epoch."""
    options = config(assets, tmp_path, augment=("crop", "color"), steps=8, save_every=4, log_every=1)
    options.adapter = AdapterOptions(rank=4, dropout=0.1)
    whole = train(options, Console(quiet=True))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-8")
    options.resume = True
    again = train(options, Console(quiet=True))
    assert again.loss_after == whole.loss_after


def test_bad_images_are_listed_or_left_out(assets, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(assets / "images", folder)
    (folder / "blue" / "bad.png").write_bytes(b"no image")
    whole = (folder / "blue" / "0.png").read_bytes()
    (folder / "red" / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(dt.AdapterError) as caught:
        prepare(config(assets, tmp_path, data=folder))
    assert "2 of 26 rows cannot be used" in str(caught.value)
    for part in ("blue/bad.png: image cannot be read", "red/cut.png: image cannot be read"):
        assert part in str(caught.value)
    found = prepare(config(assets, tmp_path, data=folder, skip_bad=True))
    assert len(found.train) + len(found.held_out) == 24


def test_of_many_images_bad_ones_are_left_out_too(assets, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "OPENED", 10)
    folder = tmp_path / "images"
    shutil.copytree(assets / "images", folder)
    whole = (folder / "blue" / "0.png").read_bytes()
    (folder / "blue" / "0.png").write_bytes(whole[: len(whole) // 2])
    said = []
    found = prepare(config(assets, tmp_path, data=folder, skip_bad=True), said)
    assert len(found.train) + len(found.held_out) == 23
    assert said[:2] == ["10 of 24 images checked", "20 of 24 images checked"]
    found = prepare(config(assets, tmp_path, data=folder))
    with pytest.raises(dt.AdapterError, match=r"0\.png: image cannot be read.*only the beginnings.*--skip-bad checks"):
        list(map(found.train.__getitem__, range(len(found.train)))) + [found.held_out[i] for i in range(2)]


def test_images_named_in_a_table_have_to_be_there(assets, tmp_path):
    table = save_rows(tmp_path / "t.jsonl", [{"image": "none.png", "label": "a"}, {"image": None, "label": "a"}])
    with pytest.raises(dt.AdapterError, match=r"t.jsonl:1: no such image .*none.png\n  - .*t.jsonl:2: image is empty"):
        prepare(config(assets, tmp_path, data=table))


@pytest.mark.parametrize("absent", ["image", "label"])
def test_a_first_row_without_a_column_is_a_bad_row(assets, tmp_path, absent):
    files = sorted((assets / "images").rglob("*.png"))
    rows = [{"image": str(file), "label": file.parent.name} for file in files]
    del rows[0][absent]
    table = save_rows(tmp_path / "t.jsonl", rows)
    with pytest.raises(dt.AdapterError, match=rf"1 of 24 rows cannot be used.*\n.*t.jsonl:1: has no column '{absent}'"):
        prepare(config(assets, tmp_path, data=table))
    found = prepare(config(assets, tmp_path, data=table, skip_bad=True))
    assert len(found.train) + len(found.held_out) == 23


def test_an_image_that_vanished_while_training(assets, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(assets / "images", folder)
    found = prepare(config(assets, tmp_path, data=folder))
    shutil.rmtree(folder)
    with pytest.raises(dt.AdapterError, match=r"\.png: image cannot be read.*it was there when the run began"):
        _ = found.train[0]


def test_what_is_no_image_in_a_folder_of_classes_is_said(assets, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(assets / "images", folder)
    shutil.copytree(folder / "blue", folder / "blue" / ".ipynb_checkpoints")
    shutil.copy(folder / "blue" / "0.png", folder / "red" / ".hidden.png")
    for name in ("red/a.heic", "red/inner/b.jfif", "notes.png", ".DS_Store"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    said = []
    found = prepare(config(assets, tmp_path, data=folder), said)
    assert len(found.train) + len(found.held_out) == 24
    assert f"{folder}: 3 files are passed over (1 .png, 1 .heic, 1 .jfif), such as {folder / 'notes.png'}" in said[0]
    (folder / "green").mkdir()
    (folder / "green" / "c.avif").touch()
    with pytest.raises(dt.AdapterError, match=r"1 of 25 rows cannot be used.*\n.*green: holds no image \("):
        prepare(config(assets, tmp_path, data=folder))
    found = prepare(config(assets, tmp_path, data=folder, skip_bad=True), said)
    assert found.labels == ("blue", "red")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: (p / "x").mkdir(), r"x: holds no image \("),
        (lambda p: None, "has no subfolders; expected one for each class"),
        (
            lambda p: [(p / n).mkdir() for n in ("train", "test")],
            "has a subfolder for each split; name .*/train as data, and another as eval_data or test_data",
        ),
        (
            lambda p: (p / "metadata.csv").write_text(""),
            "one for each class.*; if a table says.*name it: .*metadata.csv",
        ),
        (lambda p: (p / "only").mkdir() or Image.new("RGB", (4, 4)).save(p / "only" / "x.png"), "at least two classes"),
    ],
)
def test_folders_that_are_none_of_images(assets, tmp_path, make, said):
    folder = tmp_path / "folder"
    folder.mkdir()
    make(folder)
    wrong = config(assets, tmp_path, data=folder)
    with pytest.raises(dt.AdapterError, match=said):
        train(wrong)


def test_archives_that_are_none_of_images(assets, tmp_path):
    np.savez(tmp_path / "a.npz", foo=np.zeros(3))
    with pytest.raises(dt.AdapterError, match="has the arrays foo; expected x_train and y_train"):
        prepare(config(assets, tmp_path, data=tmp_path / "a.npz"))
    np.savez(tmp_path / "a.npz", x=np.zeros((3, 4, 4)), y=np.zeros(2))
    with pytest.raises(dt.AdapterError, match=r"as many labels; found \[3, 4, 4\] and 2"):
        prepare(config(assets, tmp_path, data=tmp_path / "a.npz"))
    (tmp_path / "a.npz").write_bytes(b"nothing")
    with pytest.raises(dt.AdapterError, match="cannot be read as a NumPy archive"):
        prepare(config(assets, tmp_path, data=tmp_path / "a.npz"))
    with (tmp_path / "a.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(dt.AdapterError, match="cannot be read as a NumPy archive: it holds a single array"):
        prepare(config(assets, tmp_path, data=tmp_path / "a.npz"))
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 4, 4)), y=np.array([0, 2]), label_names=["cat", "dog"])
    with pytest.raises(dt.AdapterError, match=r"x\[1\]: label is 2, label_names has names for 0 to 1"):
        prepare(config(assets, tmp_path, data=tmp_path / "a.npz"))
    np.savez(tmp_path / "a.npz", x=np.full((2, 4, 4), -1.0), y=np.arange(2))
    with pytest.raises(dt.AdapterError, match=r"expected values from 0 to 255 or from 0 to 1, found -1.0"):
        prepare(config(assets, tmp_path, data=tmp_path / "a.npz"))


def test_of_several_classifiers_the_one_with_a_loss_is_taken(tmp_path):
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    options = DeiTConfig(image_size=16, patch_size=4, **sizes)
    DeiTForImageClassificationWithTeacher(options).save_pretrained(tmp_path / "deit")
    result = train(
        config(tmp_path, tmp_path, "deit", save_image_folder(tmp_path / "images", 8), steps=1), Console(quiet=True)
    )
    assert type(load_base(result.adapter)).__name__ == "DeiTForImageClassification"
    commands = result.next_steps()  # the Auto class would take the one that was distilled, as the base's config says
    assert "DeiTForImageClassification.from_pretrained(" in commands
    exec(commands[commands.index("import doratune") : commands.index("# or in PEFT")], {})
    assert "DeiTForImageClassification.from_pretrained(" in (Path(result.adapter) / "README.md").read_text()


def test_models_of_images_that_are_not_served_are_not_said_to_take_none(tmp_path):
    from transformers import ResNetConfig

    ResNetConfig().save_pretrained(tmp_path / "resnet")
    with pytest.raises(dt.AdapterError, match="a resnet is not among the image models served; name a ViT"):
        prepare(config(tmp_path, tmp_path, "resnet", save_image_folder(tmp_path / "images", 2)))


def test_a_language_model_takes_no_images(assets, tmp_path):
    save_encoder(tmp_path / "bert")
    with pytest.raises(dt.AdapterError, match="a bert takes no images; name a ViT, DINOv2 or Swin"):
        prepare(config(tmp_path, tmp_path, "bert", assets / "images"))


def test_processors_of_models_without_one(assets):
    assert load_image_processor(str(assets / "vit")).image_mean == (0.5, 0.5, 0.5)
    assert load_image_processor(str(assets / "dinov2")).image_mean[0] == pytest.approx(0.485)
    assert load_image_processor(str(assets / "vit"), 24).size["height"] == 24
