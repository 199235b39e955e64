import pytest
from rich.console import Console
from torch.utils.data import DataLoader

import doratune as dt
from doratune.train import AdapterOptions, TrainConfig, train
from doratune.train.tasks import stream
from doratune.train.tasks.text import prepare
from train.tiny import save_model, save_rows, words

PAIRS = [{"prompt": f"ask {i} ", "completion": "tell " * (i % 4 + 1)} for i in range(20)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp("model")))


def rows(tmp_path, model, values, **options):
    return TrainConfig(model=model, data=(str(save_rows(tmp_path / "rows.jsonl", values)),), streaming=True, **options)


@pytest.mark.parametrize("kind", ["documents", "pairs"])
def test_a_stream_is_trained_on(tmp_path, model, kind):
    values = [{"text": words(20, i)} for i in range(60)] if kind == "documents" else PAIRS * 20
    config = rows(tmp_path, model, values, steps=8, output=tmp_path / "run", learning_rate=1e-2)
    config.max_length, config.adapter = 32, AdapterOptions(rank=4)
    result = train(config, Console(quiet=True))
    assert result.examples is None
    assert result.held_out_examples == stream.HELD_OUT
    assert result.loss_after < result.loss_before


@pytest.mark.parametrize(("workers", "start"), [(0, None), (1, "spawn"), (2, None)])
def test_what_a_stream_holds_out_is_not_trained_on_whoever_reads_it(tmp_path, model, workers, start, monkeypatch):
    monkeypatch.setattr(stream, "HELD_OUT", 8)
    options = rows(tmp_path, model, PAIRS[:10], steps=1, max_length=64)
    options.data = (*options.data, str(save_rows(tmp_path / "more.jsonl", PAIRS[10:])))
    found = prepare(options, lambda _: None)
    read = [tuple(ids) for ids in found.held_out["input_ids"]]
    assert len(read) == 8
    loader = DataLoader(found.train, batch_size=None, num_workers=workers, multiprocessing_context=start)
    read += [tuple(row["input_ids"]) for row in loader]
    assert len(read) == len(set(read)) == len(PAIRS)


def test_a_bad_row_deep_in_a_stream_is_named_when_it_comes(tmp_path, model, monkeypatch):
    monkeypatch.setattr(stream, "CHECKED", 5)
    monkeypatch.setattr(stream, "HELD_OUT", 2)
    config = rows(tmp_path, model, [*PAIRS, {"prompt": "x"}], steps=1)
    found = prepare(config, lambda _: None)
    with pytest.raises(dt.AdapterError, match=r"rows.jsonl:21: has no column 'completion'.*--skip-bad"):
        list(found.train)
    config.skip_bad = True
    assert len(list(prepare(config, lambda _: None).train)) == 18
