"""Options that change how a model is loaded and run, and not what it computes."""

import pytest
import torch

import doratune as dt
from doratune.train import AdapterOptions, TrainConfig
from doratune.train.assemble import make_model
from doratune.train.tasks.prepared import Prepared
from train.tiny import save_model


def made(folder, **values):
    config = TrainConfig(model=str(folder), data=("x",), adapter=AdapterOptions(rank=4), **values)
    return make_model(config, Prepared(None, None, len, None, "tokens", ""), torch.float32)[0]


def test_attention(tmp_path):
    folder = save_model(tmp_path / "model")
    assert made(folder).config._attn_implementation == "sdpa"
    assert made(folder, attention="eager").config._attn_implementation == "eager"
    with pytest.raises(dt.AdapterError, match=r"could not be loaded: .*bogus.* \(attention: choose another, or none\)"):
        made(folder, attention="bogus")


def test_compile(tmp_path, monkeypatch):
    compiled = []

    def backend(graph, examples):
        compiled.append(graph)
        return graph

    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: original(*a, **{**k, "backend": backend}))
    folder = save_model(tmp_path / "model", layers=1)
    ids = torch.arange(16).view(2, 8)
    plain = made(folder)(input_ids=ids, labels=ids).loss
    model = made(folder, compile=True)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert len(compiled) == 1, "the model is compiled as a whole"
    torch.testing.assert_close(loss, plain)
    assert all(p.grad is not None for p in dt.trainable_parameters(model).values())
