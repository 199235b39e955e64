import json
import math
import shutil
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import doratune as dt
from doratune.study import analysis
from doratune.study.analysis import OVERALL, analyze
from doratune.study.decompose import decompose, moved
from doratune.study.matrix import Matrix
from doratune.study.names import align, layer_of, short_kinds
from study.checkpoints_on_disk import KINDS, LAYERS, base_weights, turned, write, write_shards
from train.tiny import llama

W = torch.randn(12, 10, generator=torch.Generator().manual_seed(3))


def change(before, after):
    return moved(Matrix.of(before), Matrix.of(after))


# Constructed changes


@given(st.floats(1e-6, 3.1), st.floats(0.01, 100))
def test_a_turn_changes_direction_alone_by_one_minus_its_cosine(angle, scale):
    found = change(scale * W.double(), scale * turned(W, angle))
    assert found.direction == pytest.approx(1 - math.cos(angle), rel=1e-6, abs=1e-14)
    assert found.relative_magnitude == pytest.approx(0, abs=1e-12)
    assert found.magnitude_share == pytest.approx(0, abs=1e-9)
    assert found.relative_size == pytest.approx(2 * math.sin(angle / 2), rel=1e-6)


@given(st.floats(0.01, 10).filter(lambda factor: abs(factor - 1) > 1e-3))
def test_a_stretch_changes_magnitude_alone(factor):
    found = change(W, factor * W.double())
    assert found.relative_magnitude == pytest.approx(abs(factor - 1), rel=1e-6)
    assert found.direction == pytest.approx(0, abs=1e-12)
    assert found.magnitude_share == pytest.approx(1, abs=1e-9)


@given(st.floats(0.5, 2), st.floats(0.01, 1.5))
def test_the_split_leaves_nothing_over(factor, angle):
    after = factor * turned(W, angle)
    found = change(W, after)
    lengths, w = W.double().norm(dim=1), W.double()
    assert found.size**2 == pytest.approx(float((after - w).square().sum()), rel=1e-9)
    by_magnitude = ((factor - 1) * lengths).square().sum()
    by_direction = (2 * factor * lengths.square() * (1 - math.cos(angle))).sum()
    share = float(by_magnitude / (by_magnitude + by_direction))
    assert found.magnitude_share == pytest.approx(share, rel=1e-6, abs=1e-9)


def series(tmp_path, stretch, turn, steps=4):
    """A run whose rows are stretched and turned as functions of layer and step say."""
    base = base_weights()
    write(tmp_path / "base", base)
    for step in range(1, steps + 1):
        weights = {}
        for key, w in base.items():
            layer = int(key.split(".")[2])
            weights[key] = turned(w, turn(layer, step)) * (1 + stretch(layer, step) / w.double().norm(dim=1)[:, None])
        write(tmp_path / "run" / f"checkpoint-{step * 10}", weights)
    return analyze(tmp_path / "base", {"run": tmp_path / "run"}).runs[0]


def test_proportional_changes_correlate_fully(tmp_path):
    run = series(
        tmp_path, lambda layer, t: 0.01 * (layer + 1) * t, lambda layer, t: math.acos(1 - 0.002 * (layer + 1) * t)
    )
    assert run.checkpoints == ["step 10", "step 20", "step 30", "step 40"]
    for kind in ("q_proj", "up_proj"):
        c = run.correlations()[kind]
        assert c.value == pytest.approx(1, abs=1e-9)
        assert c.slope == pytest.approx(0.2, rel=1e-6)
        assert (c.sign, c.points, c.layers) == ("positive", 4 * LAYERS, LAYERS)
    assert run.correlations()[OVERALL].value == pytest.approx(1, abs=1e-9)
    for point in run.points:
        layer, step = int(point.layer.split(".")[-1]), 1 + point.checkpoint
        assert point.change.magnitude == pytest.approx(0.01 * (layer + 1) * step, rel=1e-9)
        assert point.change.direction == pytest.approx(0.002 * (layer + 1) * step, rel=1e-6)


def test_opposed_changes_correlate_negatively(tmp_path):
    run = series(
        tmp_path, lambda layer, t: 0.01 * (layer + 1), lambda layer, t: math.acos(1 - 0.002 * (LAYERS - layer))
    )
    assert run.correlation("q_proj").value == pytest.approx(-1, abs=1e-9)
    assert run.correlation("q_proj").sign == "negative"


def test_independent_changes_are_undecided(tmp_path):
    run = series(
        tmp_path, lambda layer, t: 0.01 * (1 + layer % 2), lambda layer, t: 0.01 * (1 + layer // 2 % 2 + t % 2)
    )
    c = run.correlation("q_proj")
    assert c.low < 0 < c.high
    assert c.sign == "undecided"


def test_kinds_of_different_size_do_not_correlate_by_that_alone(tmp_path):
    base = base_weights()
    base = {key: w * (100 if "up_proj" in key else 1) for key, w in base.items()}
    write(tmp_path / "base", base)
    generator = torch.Generator().manual_seed(2)
    after = {}
    for key, w in base.items():
        big = 10.0 if "up_proj" in key else 1.0
        stretch, angle = (
            1 + 0.01 * torch.rand(1, generator=generator),
            0.05 * big * (1 + torch.rand(1, generator=generator)),
        )
        after[key] = turned(w, angle) * stretch.double()
    write(tmp_path / "after", after)
    run = analyze(tmp_path / "base", {"x": tmp_path / "after"}).runs[0]
    x, y = ([getattr(p.change, name) for p in run.changed] for name in ("magnitude", "direction"))
    assert torch.corrcoef(torch.tensor([x, y]))[0, 1] > 0.7
    assert abs(run.correlation().value) < 0.6


# Files


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """A base, adapters of it, and their merged checkpoints."""
    folder = tmp_path_factory.mktemp("on-disk")
    llama().save_pretrained(folder / "base")
    for name, config in {
        "dora": dt.AdapterConfig(rank=4),
        "lora": dt.AdapterConfig(rank=4, method="lora", rank_stabilized=True, rank_pattern={"q_proj": 2}),
        "magnitude": dt.AdapterConfig(rank=0),
        "embedding": dt.AdapterConfig(rank=4, targets=["embed_tokens", "up_proj"]),
        "whole": dt.AdapterConfig(rank=4, targets=["v_proj"], modules_to_save=["o_proj"]),
        "vocabulary": dt.AdapterConfig(rank=4, targets=["v_proj"], modules_to_save=["embed_tokens"]),
    }.items():
        model = dt.attach(llama(), config)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in dt.trainable_parameters(model).values():
                parameter.add_(torch.randn(parameter.shape) * 0.05)
        dt.save_adapter(model, folder / name)
        dt.merge(model).save_pretrained(folder / f"{name}-merged")
    return folder


@pytest.mark.parametrize("name", ["dora", "lora", "magnitude", "embedding", "whole", "vocabulary"])
def test_an_adapter_and_its_merged_checkpoint_are_the_same(on_disk, name):
    tuned = {"adapter": on_disk / name, "merged": on_disk / f"{name}-merged"}
    adapter, merged = analyze(on_disk / "base", tuned).runs
    by_path = {point.path: point for point in merged.points if point.change.size > 0}
    assert {point.path for point in adapter.points} == by_path.keys()
    for point in adapter.points:
        one, other = point.change, by_path[point.path].change
        for field in ("magnitude", "direction", "size", "relative_size", "magnitude_share", "relative_magnitude"):
            assert getattr(one, field) == pytest.approx(getattr(other, field), rel=1e-4, abs=1e-6), (point.path, field)
        count = len(one.spectrum.values)
        assert one.spectrum.values == pytest.approx(other.spectrum.values[:count], rel=1e-4, abs=1e-5)
        assert one.spectrum.similarities == pytest.approx(other.spectrum.similarities, abs=1e-3)
        assert one.spectrum.effective_rank == pytest.approx(other.spectrum.effective_rank, rel=1e-2)
    for kind, c in adapter.correlations().items():
        assert merged.correlations()[kind].value == (None if c.value is None else pytest.approx(c.value, abs=1e-3))
    assert (adapter.method, merged.method) == ("lora" if name == "lora" else "dora", "full")


def test_the_copy_of_an_adapted_embedding_in_pefts_file_is_said_to_be_one(on_disk, tmp_path):
    shutil.copytree(on_disk / "embedding", tmp_path, dirs_exist_ok=True)
    file = tmp_path / "adapter_model.safetensors"
    copy = {"base_model.model.model.embed_tokens.base_layer.weight": llama().model.embed_tokens.weight.detach()}
    save_file(load_file(file) | copy, file)
    [run] = analyze(on_disk / "base", {"x": tmp_path}).runs
    assert "model.embed_tokens" in {point.path for point in run.points}
    assert run.left_out["model.embed_tokens.base_layer.weight"].startswith("a copy of the base's weight")
    assert run.troubling == set()


def test_files_and_models_in_memory_are_the_same(on_disk):
    model = dt.load_adapter(llama(), on_disk / "dora")
    in_memory = decompose(llama(), model, spectra=True)
    for point in analyze(on_disk / "base", {"x": on_disk / "dora"}).runs[0].points:
        other = in_memory[point.path]
        assert point.change.direction == pytest.approx(other.direction, rel=1e-6)
        assert point.change.spectrum.values == pytest.approx(other.spectrum.values, rel=1e-5)
    assert in_memory["model.embed_tokens"].spectrum is None, "unchanged"


def test_shards_are_read_one_weight_at_a_time(tmp_path):
    base = base_weights()
    after = {key: turned(w, 0.1).float() for key, w in base.items()}
    whole = analyze(write(tmp_path / "b", base), {"x": write(tmp_path / "a", after)})
    seen = []
    sharded = analyze(
        write_shards(tmp_path / "bs", base),
        {"x": write_shards(tmp_path / "as", after)},
        watch=lambda what, share: seen.append((what, share)),
    )
    for one, other in zip(sharded.runs[0].points, whole.runs[0].points, strict=True):
        assert one.path == other.path
        assert one.change.direction == pytest.approx(other.change.direction, rel=1e-9)
    assert seen[0][0] == f"model.layers.0.{KINDS[1]}"
    assert 0 < seen[0][1] < 1
    assert seen[-1] == ("", 1.0)
    assert [share for _, share in seen] == sorted(share for _, share in seen)


def test_weights_side_by_side_and_one_after_the_other_are_the_same(on_disk, monkeypatch):
    together = analyze(on_disk / "base", {"x": on_disk / "dora"}).as_json()
    threads = torch.get_num_threads()
    monkeypatch.setattr(analysis, "HELD", 300)  # large ones are not looked at side by side
    try:
        torch.set_num_threads(2)
        assert analyze(on_disk / "base", {"x": on_disk / "dora"}).as_json() == together
    finally:
        torch.set_num_threads(threads)


def test_only_the_last_checkpoint_has_spectra_unless_asked(tmp_path):
    base = base_weights()
    write(tmp_path / "base", base)
    for step in (1, 2):
        write(tmp_path / "run" / f"epoch_{step}", {key: turned(w, 0.1 * step) for key, w in base.items()})
    for spectra, expected in (("last", {1}), ("all", {0, 1}), ("none", set())):
        run = analyze(tmp_path / "base", {"x": tmp_path / "run"}, spectra).runs[0]
        assert {point.checkpoint for point in run.points if point.change.spectrum} == expected


def test_whatever_is_not_compared_is_named(tmp_path):
    base = base_weights()
    first, second, third = list(base)[:3]
    config = {"tie_word_embeddings": True}
    extra = {
        "model.embed_tokens.weight": torch.randn(7, 10),
        "lm_head.weight": torch.randn(7, 10),
        "model.norm.weight": torch.ones(10),
        "model.experts": torch.randn(2, 3, 4),
        "model.positions.weight": torch.ones(3, 4, dtype=torch.int64),
    }
    write(tmp_path / "base", {**base, **extra}, config)
    after = {key: turned(w, 0.1).float() for key, w in base.items()}
    after[first] = torch.randn(3, 10)
    after[second] = torch.zeros(60, 1, dtype=torch.uint8)
    after[f"{second}.absmax"] = torch.ones(4)
    del after[third]
    after["score.weight"] = torch.randn(2, 10)
    write(tmp_path / "after", after)
    run = analyze(tmp_path / "base", {"x": tmp_path / "after"}).runs[0]
    paths = {point.path + ".weight" for point in run.points}
    assert paths == base.keys() - {first, second, third}
    said = run.left_out
    assert said[first.removesuffix(".weight")] == "shapes differ: 12x10 in the base, 3x10 in after"
    assert said[second] == "quantised (U8): give a checkpoint in 16 or 32 bits"
    assert said[f"{second}.absmax"].startswith("quantised")
    assert said[third.removesuffix(".weight")] == "not in after"
    assert said["score"] == "not in the base"
    assert said["lm_head.weight"].startswith("tied to the input embedding")
    assert "vector" in said["model.norm.weight"]
    assert "bare 2x3x4 parameter" in said["model.experts"]
    assert "quantised (I64)" in said["model.positions.weight"]
    assert said["model.embed_tokens"] == "not in after"
    every = {**base, **extra, **after}
    named = paths | said.keys() | {name + ".weight" for name in said}
    assert every.keys() <= named, "a tensor was passed over in silence"
    assert json.loads(json.dumps(run.as_json()))["left_out"] == said


@pytest.mark.parametrize(
    ("kind", "there"),
    [("BertModel", False), ("XLMRobertaModel", False), ("GPT2LMHeadModel", True), ("BertForMaskedLM", True)],
)
def test_a_head_is_named_only_where_the_model_has_one(tmp_path, kind, there):
    write(tmp_path / "base", base_weights(), {"tie_word_embeddings": True, "architectures": [kind]})
    run = analyze(tmp_path / "base", {"x": tmp_path / "base"}).runs[0]
    assert ("(output head)" in run.left_out) == there


def test_a_head_left_out_of_the_file_is_named(tmp_path):
    write(tmp_path / "base", base_weights(), {"text_config": {"tie_word_embeddings": True}})
    run = analyze(tmp_path / "base", {"x": tmp_path / "base"}).runs[0]
    assert run.left_out["(output head)"].startswith("tied")
    assert run.changed == []
    assert run.correlations() == {}


def test_nothing_in_common_is_an_error(tmp_path):
    write(tmp_path / "base", base_weights())
    write(tmp_path / "other", {"encoder.0.weight": torch.ones(2, 2)})
    with pytest.raises(
        dt.AdapterError, match=r"other and .*base have no weight in common; the base has model.layers.0"
    ):
        analyze(tmp_path / "base", {"x": tmp_path / "other"})


def test_another_size_of_the_same_model_is_said_by_its_shapes(tmp_path):
    write(tmp_path / "base", base_weights())
    write(tmp_path / "other", base_weights(rows=8))
    with pytest.raises(dt.AdapterError, match=r"^shapes differ between .*base and .*other") as caught:
        analyze(tmp_path / "base", {"x": tmp_path / "other"})
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("(12 problems):")
    assert lines[1] == "  - model.layers.0.mlp.up_proj: 12x10 in the base, 8x10 in other"
    assert lines[6:] == ["  - and 7 more"]


def test_a_broken_adapter_is_refused_with_what_is_wrong(on_disk, tmp_path):
    for file in (on_disk / "dora").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(tmp_path / "adapter_model.safetensors")
    broken = [key for key in state if ".lora_" in key]
    for key in broken:
        state[key].view(-1)[0] = float("nan")
    save_file(state, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        dt.AdapterError, match=rf"\({len(broken)} problems\)(.*\n){{11}}  - and {len(broken) - 10} more$"
    ):
        analyze(on_disk / "base", {"x": tmp_path})


# Names


def test_an_adapter_names_modules_where_the_files_keep_names_of_old(tmp_path):
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=28)
    model = ViTModel(config, add_pooling_layer=False)
    model.save_pretrained(tmp_path / "base")
    dt.attach(model, dt.AdapterConfig(rank=2))
    with torch.no_grad():
        for parameter in dt.trainable_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    dt.save_adapter(model, tmp_path / "adapter")
    dt.merge(model).save_pretrained(tmp_path / "merged")
    tuned = {"adapter": tmp_path / "adapter", "merged": tmp_path / "merged"}
    adapter, merged = analyze(tmp_path / "base", tuned, "none").runs
    changed = {point.path: point.change for point in merged.points if point.change.size > 0}
    assert len(adapter.points) == len(changed) == 12
    for point in adapter.points:
        assert point.change.direction == pytest.approx(changed[point.path].direction, rel=1e-3)


def test_a_head_puts_the_base_behind_a_name():
    base = ["encoder.layer.0.query", "encoder.layer.1.query"]
    behind = [f"bert.{path}" for path in base] + ["classifier"]
    assert align(base, behind) == {path: f"bert.{path}" for path in base}
    assert align(behind, base) == {f"bert.{path}": path for path in base}
    assert align(base, base) == {path: path for path in base}


def test_threads_that_begin_later_compute_as_before(tmp_path):
    write(tmp_path / "base", weights := base_weights())
    write(tmp_path / "tuned", {key: 1.1 * W for key, W in weights.items()})
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        analyze(tmp_path / "base", {"run": tmp_path / "tuned"})
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
    finally:
        torch.set_num_threads(before)
    assert seen == [2]


def test_of_several_names_that_fit_it_is_always_the_first():
    towers = [f"tower_{number}.layer.0.query" for number in range(50)]
    assert align(["layer.0.query"], towers) == {"layer.0.query": towers[0]}
    assert align(towers, ["layer.0.query"]) == {towers[0]: "layer.0.query"}


def test_layers_and_kinds():
    assert layer_of("model.layers.3.self_attn.q_proj") == ("model.layers.3", "self_attn.q_proj")
    assert layer_of("model.layers.3.mlp.experts.7.w1") == ("model.layers.3", "mlp.experts.*.w1")
    assert layer_of("lm_head") == (None, "lm_head")
    bert = ["attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"]
    kinds = short_kinds(f"layer.{i}.{name}" for i in range(2) for name in bert)
    assert [kinds[f"layer.0.{name}"] for name in bert] == [
        "query",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ]


def test_weights_that_hold_nan_are_named_and_not_compared(tmp_path):
    weights = base_weights()
    base = write(tmp_path / "base", weights)
    weights["model.layers.2.mlp.up_proj.weight"][3, 4] = math.nan
    for spectra in ("last", "none"):
        (run,) = analyze(base, {"x": write(tmp_path / spectra, weights)}, spectra).runs
        assert run.left_out == {"model.layers.2.mlp.up_proj": "holds NaN or infinity"}
        assert run.troubling
        assert len(run.points) == 2 * LAYERS - 1
        (run,) = analyze(tmp_path / spectra, {"x": base}, spectra).runs
        assert run.left_out == {"model.layers.2.mlp.up_proj": "holds NaN or infinity"}, "the base holds it"
