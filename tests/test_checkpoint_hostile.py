"""Files that do not fit: one error with every problem, a model that is as it was, and no surprise in between."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import doratune as dt
from doratune.checkpoint import _fill_layer
from doratune.own_options import METADATA
from file_helpers import (
    assert_unchanged,
    build,
    load_peft,
    metadata,
    move,
    options,
    output,
    rewrite,
    rewrite_options,
    state,
    tensors,
)

BODY = "base_model.model.body"
HEAD = "base_model.model.head"
A, B, M = f"{BODY}.lora_A.weight", f"{BODY}.lora_B.weight", f"{BODY}.lora_magnitude_vector"


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """An adapter on two kinds of layers, with a saved module that has buffers."""
    folder = tmp_path_factory.mktemp("valid")
    config = dt.AdapterConfig(rank=2, targets=["body", "embed"], modules_to_save=["head"])
    dt.save_adapter(move(dt.attach(build("mlp"), config)), folder)
    return folder


@pytest.fixture
def folder(valid, tmp_path):
    return shutil.copytree(valid, tmp_path / "adapter")


@pytest.fixture(scope="module")
def model():
    """A model with a life of its own: part of it frozen, one adapter attached already."""
    model = build("mlp")
    model.layers[0].requires_grad_(False)
    return move(dt.attach(model, dt.AdapterConfig(rank=1, targets=["body"]), "mine"))


def refused(model, folder, **how) -> str:
    """The error's text, after making sure that nothing happened to the model or the folder."""
    before, files = state(model), sorted(path.name for path in folder.iterdir()) if folder.is_dir() else None
    random = torch.get_rng_state()
    with pytest.raises(dt.AdapterError) as error:
        dt.load_adapter(model, folder, **how)
    assert_unchanged(model, before)
    assert dt.adapter_names(model) == ["mine"]
    assert dt.active_adapter(model) == "mine"
    assert torch.equal(torch.get_rng_state(), random)
    assert files is None or sorted(path.name for path in folder.iterdir()) == files
    return str(error.value)


def test_the_valid_file_is_valid(folder, model):
    dt.load_adapter(model, folder)
    dt.delete_adapter(model, "default")
    dt.set_adapter(model, "mine")


TENSORS = {
    "wrong rank": ({A: torch.zeros(3, 8)}, [f"{A}: expected shape (2, 8), found (3, 8)"]),
    "another width": (
        {A: torch.zeros(2, 9), B: torch.zeros(7, 2), M: torch.ones(7)},
        [
            f"{A}: expected shape (2, 8), found (2, 9)",
            f"{B}: expected shape (6, 2), found (7, 2)",
            f"{M}: expected shape (6,), found (7,)",
        ],
    ),
    "transposed": ({A: torch.zeros(8, 2)}, [f"{A}: expected shape (2, 8), found (8, 2)"]),
    "scalar": ({A: torch.tensor(1.0)}, [f"{A}: expected shape (2, 8), found ()"]),
    "empty": ({A: torch.zeros(0, 8)}, [f"{A}: expected shape (2, 8), found (0, 8)"]),
    "integers": (
        {A: torch.zeros(2, 8, dtype=torch.int32)},
        [f"{A}: expected float64 or float32 or float16 or bfloat16, found int32"],
    ),
    "booleans": ({M: torch.ones(6, dtype=torch.bool)}, [f"{M}: expected", "found bool"]),
    "complex": ({M: torch.ones(6, dtype=torch.complex64)}, [f"{M}: expected", "found complex64"]),
    "8 bit": ({M: torch.ones(6).to(torch.float8_e4m3fn)}, [f"{M}: expected", "found float8_e4m3fn"]),
    "nan": ({B: torch.full((6, 2), float("nan"))}, [f"{B}: holds NaN or infinite values"]),
    "inf": ({M: torch.full((6,), float("-inf"))}, [f"{M}: holds NaN or infinite values"]),
    "no magnitude": ({M: None}, [f"{M}: missing"]),
    "no A": ({A: None}, [f"{A}: missing"]),
    "no layer": ({A: None, B: None, M: None}, ["body: the options target it, but the file has no tensors for it"]),
    "no saved tensor": ({f"{HEAD}.1.running_var": None}, [f"{HEAD}.1.running_var: missing"]),
    "saved shape": ({f"{HEAD}.0.weight": torch.zeros(5, 7)}, [f"{HEAD}.0.weight: expected shape (5, 6), found (5, 7)"]),
    "saved dtype": ({f"{HEAD}.1.num_batches_tracked": torch.tensor(1.0)}, ["expected int64, found float32"]),
    "saved nan": ({f"{HEAD}.0.bias": torch.full((5,), float("nan"))}, [f"{HEAD}.0.bias: holds NaN"]),
    "unknown in saved": ({f"{HEAD}.0.other": torch.zeros(1)}, [f"{HEAD}.0.other: unknown key"]),
    "unknown part": ({f"{BODY}.lora_C.weight": torch.zeros(1)}, [f"{BODY}.lora_C.weight: unknown key"]),
    "unknown prefix": ({"body.lora_A.weight": torch.zeros(2, 8)}, ["expected it to start with 'base_model.model.'"]),
    "empty key": ({"": torch.zeros(1)}, [": unknown key"]),
    "only the prefix": ({"base_model.model.": torch.zeros(1)}, ["base_model.model.: unknown key"]),
    "other layer": (
        {"base_model.model.layers.0.lin.lora_A.weight": torch.zeros(2, 8)},
        ["layers.0.lin: the file has tensors for it, but the options do not target it"],
    ),
    "other model": (
        {"base_model.model.encoder.q.lora_A.weight": torch.zeros(2, 8)},
        ["encoder.q: the model has no such module; is the file of another model?"],
    ),
    "other kind": ({f"{BODY}.lora_embedding_A": torch.zeros(2, 8)}, ["does not belong to a layer of this kind"]),
    "both magnitudes": ({f"{M}.weight": torch.ones(6)}, ["the file holds this tensor twice"]),
    "bias": ({f"{BODY}.base_layer.bias": torch.zeros(6)}, ["a bias, but bias is 'none' or the layer has none"]),
    "base weight of a layer": (
        {f"{BODY}.base_layer.weight": torch.zeros(6, 8)},
        [f"{BODY}.base_layer.weight: a weight of the base model that differs from the model's own"],
    ),
    "base weight of another shape": ({f"{BODY}.base_layer.weight": torch.zeros(1)}, ["differs from the model's own"]),
    "base weight elsewhere": (
        {"base_model.model.layers.1.norm.weight": torch.zeros(8)},
        ["layers.1.norm.weight: a weight of the base model that differs from the model's own"],
    ),
    "bias of the adapted module": ({f"{BODY}.bias": torch.zeros(6)}, ["differs from the model's own"]),
    "weight of the adapted module": ({f"{BODY}.weight": torch.zeros(6, 8)}, ["differs from the model's own"]),
    "original module": ({f"{HEAD}.original_module.0.bias": torch.zeros(5)}, ["original_module.0.bias: unknown key"]),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit(case, folder, model):
    change, expected = TENSORS[case]
    message = refused(model, rewrite(folder, change))
    assert "adapter_model.safetensors does not fit" in message
    for text in expected:
        assert text in message


def test_every_problem_is_listed_at_once(folder, model):
    cases = ("wrong rank", "nan", "no magnitude", "saved dtype", "unknown in saved", "other model", "unknown prefix")
    change = {key: t for case in cases for key, t in TENSORS[case][0].items()}
    message = refused(model, rewrite(folder, change))
    for case in cases:
        for text in TENSORS[case][1]:
            assert text in message
    assert f"({len(cases)} problems)" in message


OPTIONS = {
    "another rank": ({"r": 3}, [f"{A}: expected shape (3, 8), found (2, 8)"]),
    "a huge rank": ({"r": 2**20}, [f"{A}: expected shape (1048576, 8), found (2, 8)"]),
    "a rank pattern": ({"rank_pattern": {"body": 3}}, [f"{A}: expected shape (3, 8), found (2, 8)"]),
    "lora": ({"use_dora": False}, [f"{M}: a magnitude, but use_dora is not set"]),
    "fewer targets": ({"target_modules": ["body"]}, ["embed: the file has tensors for it"]),
    "more targets": (
        {"target_modules": ["body", "embed", "lin"]},
        ["layers.0.lin: the options target it"],
    ),
    "other targets": ({"target_modules": ["q_proj"]}, ["body: the file has tensors", "embed: the file has tensors"]),
    "a layer without a kind": ({"target_modules": ["body", "embed", "norm"]}, ["layers.0.norm: the options target it"]),
    "excluded": (
        {"exclude_modules": ["body"]},
        ["body: the file has tensors for it"],
    ),
    "not saved": ({"modules_to_save": None}, [f"{HEAD}.0.weight: a weight of the base model that differs"]),
    "more saved": ({"modules_to_save": ["head", "layers.1"]}, ["base_model.model.layers.1.lin.weight: missing"]),
    "saved and adapted": ({"modules_to_save": ["head", "body"]}, [f"{BODY}.weight: missing"]),
    "biases": ({"bias": "lora_only"}, [f"{BODY}.base_layer.bias: missing"]),
    "all biases": (
        {"bias": "all"},
        ["base_model.model.layers.1.norm.bias: missing", f"{BODY}.base_layer.bias: missing"],
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_do_not_fit_the_tensors(case, folder, model):
    change, expected = OPTIONS[case]
    message = refused(model, rewrite_options(folder, **change))
    for text in expected:
        assert text in message


def test_with_all_biases_an_adapted_layer_has_its_bias_under_one_key_only(folder, model):
    rewrite_options(rewrite(folder, {f"{BODY}.bias": torch.zeros(6)}), bias="all")
    assert f"{BODY}.bias: a weight of the base model that differs" in refused(model, folder)


def test_full_paths_are_targeted_whatever_the_layer_as_in_peft(folder):
    model = dt.load_adapter(build("mlp"), rewrite_options(folder, layers_to_transform=[7]))
    torch.testing.assert_close(output(model), output(load_peft(build("mlp"), folder)), rtol=1e-5, atol=1e-5)


METADATA_CASES = {
    "not json": "{",
    "a list": "[]",
    "deep": "[" * 100_000,
    "a number of paths": json.dumps({"magnitude_only": 5}),
    "numbers for paths": json.dumps({"magnitude_only": [5]}),
    "an unknown gradient": json.dumps({"norm_gradient": "other"}),
    "an unknown start": json.dumps({"init": ["x"]}),
    "magnitude only, but B moved": json.dumps({"magnitude_only": ["body"]}),
}


@pytest.mark.parametrize("case", METADATA_CASES)
def test_metadata_that_does_not_fit(case, folder, model):
    rewrite(folder, {}, {METADATA: METADATA_CASES[case]})
    if case == "magnitude only, but B moved":
        rewrite_options(folder, r=1)
        first = {
            k: t[:1] if "_A" in k else t[:, :1].contiguous()
            for k, t in tensors(folder).items()
            if "_A" in k or "_B" in k
        }
        rewrite(folder, first)
        assert f"{B}: the metadata says magnitude only, so expected 0" in refused(model, folder)
    else:
        assert f"metadata '{METADATA}'" in refused(model, folder)


def test_metadata_of_others_is_ignored(folder):
    model = build("mlp")
    rewrite(folder, {}, {"doratunes": "[", "": "x"})
    dt.load_adapter(model, folder)


def test_the_whole_way_for_files_that_cannot_be_read(folder, model):
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    good_config, good_weights = config.read_bytes(), weights.read_bytes()
    for bad in (b"", b"{", b"[]", b"[" * 10**5, b'{"peft_type": "IA3"}', b'{"peft_type": "LORA"}', b"{}"):
        config.write_bytes(bad)
        assert "adapter_config.json" in refused(model, folder)
    config.write_bytes(good_config)
    for bad in (b"", good_weights[:100], good_weights[:-1], b"\xff" * 1000):
        weights.write_bytes(bad)
        assert "adapter_model.safetensors cannot be read" in refused(model, folder)
    weights.rename(folder / "adapter_model.bin")
    assert "never read" in refused(model, folder)
    assert "is a file" in refused(model, config)
    assert "does not exist" in refused(model, folder / "none")
    config.unlink()
    assert "has no adapter_config.json" in refused(model, folder)


def test_names_that_cannot_be_given(folder, model):
    assert "already has an adapter 'mine'" in refused(model, folder, name="mine")
    assert "adapter name: expected letters" in refused(model, folder, name="a.b")


def test_a_model_of_another_shape_and_one_without_data(folder):
    other = build("llama")
    before = state(other)
    with pytest.raises(dt.AdapterError, match="is the file of another model"):
        dt.load_adapter(other, folder)
    assert_unchanged(other, before)
    with torch.device("meta"):
        empty = build("mlp")
    with pytest.raises(dt.AdapterError, match="body: the model holds no data yet"):
        dt.load_adapter(empty, folder)
    assert dt.adapter_names(empty) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interruption_while_tensors_are_copied(error, folder, model, monkeypatch):
    def interrupt(path, *args):
        if path == "embed":
            raise error
        _fill_layer(path, *args)

    monkeypatch.setattr("doratune.checkpoint._fill_layer", interrupt)
    before = state(model)
    with pytest.raises(error):
        dt.load_adapter(model, folder)
    assert_unchanged(model, before)
    assert dt.adapter_names(model) == ["mine"]
    assert dt.active_adapter(model) == "mine"


def test_a_tensor_that_finds_no_place_is_never_dropped_silently(folder, model, monkeypatch):
    monkeypatch.setattr("doratune.checkpoint.saved_modules", lambda root: {})
    before = state(model)
    with pytest.raises(dt.AdapterError, match="head: its parameters cannot be an adapter's here"):
        dt.load_adapter(model, folder)
    assert_unchanged(model, before)


def test_a_base_that_was_trainable_still_is_after_a_failure(folder):
    model = build("mlp")
    model.embed.requires_grad_(False)
    before = state(model)
    with pytest.raises(dt.AdapterError):
        dt.load_adapter(model, rewrite(folder, {A: None}))
    assert_unchanged(model, before)


# Anything at all


def load(model: nn.Module, folder) -> bool:
    """True if the adapter was loaded; it is removed again."""
    try:
        dt.load_adapter(model, folder)
    except dt.AdapterError:
        return False
    dt.delete_adapter(model, "default")
    dt.set_adapter(model, "mine")
    return True


@given(data=st.data())
def test_any_damage_to_the_weights_is_an_adapter_error(data, valid, model, tmp_path_factory):
    good = (valid / "adapter_model.safetensors").read_bytes()
    kind = data.draw(st.sampled_from(["cut", "overwrite", "insert", "random"]))
    at = data.draw(st.integers(0, len(good) - 1) | st.integers(0, 400))
    noise = data.draw(st.binary(min_size=1, max_size=16))
    bad = {
        "cut": good[:at],
        "overwrite": good[:at] + noise + good[at + len(noise) :],
        "insert": good[:at] + noise + good[at:],
        "random": noise,
    }[kind]
    folder = shutil.copytree(valid, tmp_path_factory.mktemp("damaged") / "adapter")
    (folder / "adapter_model.safetensors").write_bytes(bad)
    before = state(model)
    if load(model, folder):
        assert kind == "overwrite"  # other numbers in a tensor are another adapter, but nothing else is accepted
    assert_unchanged(model, before)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 40)
    | st.floats()
    | st.sampled_from(["body", "embed", "head", ".*", "all"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["body", "x"]), inner, max_size=2),
    max_leaves=4,
)


@given(data=st.data())
def test_any_change_of_options_is_an_adapter_error_or_what_it_says(data, valid, model, tmp_path_factory):
    folder = shutil.copytree(valid, tmp_path_factory.mktemp("changed") / "adapter")
    fields = data.draw(st.lists(st.sampled_from([*sorted(options(valid)), "lora_bias", "x"]), min_size=1, max_size=2))
    rewrite_options(folder, **{field: data.draw(values) for field in fields})
    before = state(model)
    load(model, folder)
    assert_unchanged(model, before)


@given(text=st.text(max_size=30) | st.binary(max_size=30))
def test_any_text_for_options_is_an_adapter_error(text, valid, model, tmp_path_factory):
    folder = shutil.copytree(valid, tmp_path_factory.mktemp("text") / "adapter")
    (folder / "adapter_config.json").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "replace"))
    assert not load(model, folder)


# Saving


def test_values_that_are_not_finite_are_not_saved(tmp_path):
    model = dt.attach(build("mlp"), dt.AdapterConfig(rank=2, targets=["body", "embed"]))
    dt.save_adapter(model, tmp_path)
    before = tensors(tmp_path)
    with torch.no_grad():
        model.body.lora_A["default"][0, 0] = float("nan")
        model.embed.magnitude["default"][1] = float("inf")
    with pytest.raises(dt.AdapterError) as error:
        dt.save_adapter(model, tmp_path)
    assert f"{A}: not finite" in str(error.value)
    assert "base_model.model.embed.lora_magnitude_vector: not finite" in str(error.value)
    assert all(torch.equal(before[key], tensor) for key, tensor in tensors(tmp_path).items())


def test_an_adapter_that_is_not_there_or_has_no_data_is_not_saved(tmp_path):
    with pytest.raises(dt.AdapterError, match="no adapter 'default' to save"):
        dt.save_adapter(build("mlp"), tmp_path / "a")
    with torch.device("meta"):
        model = build("mlp")
    dt.attach(model, dt.AdapterConfig(rank=2, targets=["body"]))
    with pytest.raises(dt.AdapterError, match="body: holds no data yet"):
        dt.save_adapter(model, tmp_path / "a")
    with pytest.raises(dt.AdapterError, match=r"no adapter 'other' to save; it has default$"):
        dt.save_adapter(model, tmp_path / "a", "other")
    assert not (tmp_path / "a").exists()


def test_saving_changes_nothing(tmp_path):
    model = move(dt.attach(build("mlp"), dt.AdapterConfig(rank=2, targets=["body", "embed"], modules_to_save=["head"])))
    before = state(model)
    dt.save_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_a_file_of_peft_s_on_a_path_with_odd_names(tmp_path):
    """Names with the format's own words and expressions' signs in them."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Linear(4, 4)
            self.add_module(
                "a+b", nn.ModuleDict({"lora_A": nn.Linear(4, 4), "(x)[": nn.Linear(4, 4), "weight": nn.Linear(4, 4)})
            )
            self.default = nn.Linear(4, 3)

        def forward(self, ids):
            x = ids[:, :4].float() / 60
            x = self.base_layer(x)
            for layer in self._modules["a+b"].values():
                x = layer(torch.tanh(x))
            return self.default(x)

    base = Odd().eval()
    for fields in (
        {"targets": ["(x)[", "a+b.weight"], "modules_to_save": ["a+b.lora_A"]},
        {"targets": ["base_layer", "a+b.weight"], "bias": "lora_only"},
        {"targets": "a.b.(lora_A|weight)", "rank_pattern": {r"a\+b\.lora_A": 3}},
        {"targets": ["(x)["], "bias": "all"},
    ):
        model = move(dt.attach(copy.deepcopy(base), dt.AdapterConfig(rank=2, **fields)))
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        dt.save_adapter(model, folder)
        theirs = load_peft(base, folder)
        torch.testing.assert_close(output(theirs), output(model), rtol=1e-5, atol=1e-5)
        assert torch.equal(output(dt.load_adapter(copy.deepcopy(base), folder)), output(model))
    assert metadata(folder)["format"] == "pt"
