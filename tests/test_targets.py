import pytest
import torch
from torch import nn

import doratune as dt
from doratune.targets import adapted_layers, as_targets, plain_modules
from helpers import assert_same, ids, move, output, snapshot, tiny

LINEARS = {f"layers.{i}.{n}" for i in (0, 1) for n in ("q_proj", "v_proj", "up", "down")}


def paths(model):
    return set(adapted_layers(model))


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"a.q", "b.q"}, ["q"]),
        ({"a.q"}, ["a.q"]),
        ({"q"}, r"q"),
    ],
    ids=["last parts", "a path", "an expression"],
)
def test_paths_as_the_shortest_targets(chosen, expected):
    modules = ["", "a", "a.q", "b", "b.q", "b.v", "q"]
    modules = modules if "q" in chosen else modules[:-1]
    assert as_targets(sorted(chosen), modules) == expected


def test_paths_are_those_of_the_plain_model():
    model = tiny()
    plain = set(plain_modules(model))
    dt.attach(model, dt.AdapterConfig(rank=2, modules_to_save=["lm_head"], bias="all"))
    dt.attach(model, dt.AdapterConfig(rank=3, targets=["embed", "up"]), "second")
    assert set(plain_modules(model)) == plain


class NamedAsOurs(nn.Module):
    """A user's module whose parts have the names that stand-ins give theirs."""

    def __init__(self):
        super().__init__()
        self._projections = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.base_layer = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x):
        for layer in (*self._projections, self.base_layer):
            x = layer(x)
        return self.attention(x, x, x)[0]


def test_parts_of_the_users_may_have_the_names_that_ours_have(tmp_path):
    own = ["_projections.0", "_projections.1", "base_layer"]
    model = nn.Sequential(NamedAsOurs())
    before = snapshot(model)
    dt.attach(model, dt.AdapterConfig(rank=2))
    assert paths(model) == {f"0.{name}" for name in (*own, *(f"attention.{n}_proj" for n in ("q", "k", "v", "out")))}
    dt.detach(model)
    assert_same(snapshot(model), before)
    dt.attach(model, dt.AdapterConfig(rank=2, targets=own))
    move(model)
    dt.save_adapter(model, tmp_path / "adapter")
    x = torch.randn(3, 8)
    expected = model(x)
    dt.detach(model)
    dt.load_adapter(model, tmp_path / "adapter")
    assert torch.equal(model(x), expected)


def test_wrapped_blocks_keep_their_plain_paths():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = tiny()
    x = ids()
    before = output(model, x)
    model.layers[0] = checkpoint_wrapper(model.layers[0])
    model.layers[1] = torch.compile(model.layers[1], backend="eager")
    dt.attach(model, dt.AdapterConfig(rank=2, targets=["up", "layers.0.down"]))
    assert paths(model) == {"layers.0.up", "layers.1.up", "layers.0.down"}
    with torch.compiler.set_stance("force_eager"):
        assert torch.allclose(output(model, x), before)
        move(model)
        assert not torch.allclose(output(model, x), before)
    dt.detach(model)
    assert not paths(model)


class DeepSpeedEngine(nn.Module):
    """Of the same name and shape as DeepSpeed's."""

    def __init__(self, model):
        super().__init__()
        self.module = model


@pytest.mark.parametrize("wrapper", [nn.DataParallel, DeepSpeedEngine])
def test_what_runs_a_model_adds_nothing_to_its_files(wrapper, tmp_path):
    model = move(dt.attach(tiny(), dt.AdapterConfig(rank=2)))
    wrapped = wrapper(model)
    assert paths(wrapped) == LINEARS
    dt.save_adapter(wrapped, tmp_path)
    loaded = dt.load_adapter(tiny(), tmp_path)
    assert torch.equal(output(loaded, ids()), output(model, ids()))


def test_a_compiled_model_is_seen_through():
    model = tiny()
    compiled = torch.compile(model, backend="eager")
    assert dt.attach(compiled, dt.AdapterConfig(rank=2)) is compiled
    assert paths(model) == paths(compiled) == LINEARS
    assert dt.summary(compiled).trained == dt.summary(model).trained > 0
