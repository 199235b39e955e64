import pytest
import torch
from safetensors.torch import save_file

import doratune as dt
from doratune.study.decompose import decompose, weights_of
from doratune.study.runs import labels_of, snapshots
from doratune.study.stored import StoredWeights
from study.checkpoints_on_disk import base_weights, write


def same(stored, model):
    """Every weight that adapters could take is read from the file as they would see it."""
    for path, weight in weights_of(model).items():
        if path in stored.shapes:
            assert stored.shapes[path] == weight.shape, path
            with stored.open(path) as read:
                assert torch.equal(read.dense(), weight.dense()), path
    return set(weights_of(model)) - stored.shapes.keys()


def test_conv1d_embeddings_and_heads_of_gpt2(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=64, n_positions=16))
    model.save_pretrained(tmp_path)
    assert same(StoredWeights(tmp_path), model) == {"lm_head"}, "tied"


def test_convolutions_embeddings_and_the_rest_of_a_vision_transformer(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=28)
    model = ViTForImageClassification(config)
    write(tmp_path, model.state_dict())  # save_pretrained would use names of old
    stored = StoredWeights(tmp_path)
    assert same(stored, model) == set()
    assert "bare 1x" in stored.left_out["vit.embeddings.cls_token"]


def test_packed_attention(tmp_path):
    model = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False
    )
    write(tmp_path, model.state_dict())
    assert same(StoredWeights(tmp_path), model) == set()


def test_an_adapter_on_packed_attention(tmp_path):
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    base = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    write(tmp_path / "base", base.state_dict())
    model = dt.attach(torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), dt.AdapterConfig(rank=2))
    model.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in dt.trainable_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    dt.save_adapter(model, tmp_path / "adapter")
    from doratune.study.analysis import analyze

    points = analyze(tmp_path / "base", {"x": tmp_path / "adapter"}, "none").runs[0].points
    with dt.disabled(model):
        before = {path: weight.dense() for path, weight in weights_of(model).items()}
    expected = decompose(before, {p: w.dense() for p, w in weights_of(model).items()})
    assert {point.path for point in points} >= {"layers.0.self_attn.q_proj", "layers.1.self_attn.out_proj"}
    for point in points:
        assert point.change.magnitude == pytest.approx(expected[point.path].magnitude, rel=1e-3)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(dt.AdapterError, match="holds no safetensors"):
        StoredWeights(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(dt.AdapterError, match=r"pickle file.*never read"):
        StoredWeights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(dt.AdapterError, match=r"cannot be read.*truncated"):
        StoredWeights(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "one", "b": "two"}}')
    with pytest.raises(dt.AdapterError, match=r"is incomplete \(2 problems\)"):
        StoredWeights(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(dt.AdapterError, match=r"index\.json cannot be read"):
        StoredWeights(tmp_path)
    with pytest.raises(dt.AdapterError, match="does not exist"):
        StoredWeights(tmp_path / "absent")


def test_float8_and_four_bits_are_called_quantised(tmp_path):
    weights = {
        "a.weight": torch.ones(4, 4).to(torch.float8_e4m3fn),
        "a.weight_scale": torch.ones(4, 1),
        "b.qweight": torch.ones(4, 4, dtype=torch.int32),
        "b.scales": torch.ones(2, 4),
        "c.weight": torch.ones(4, 4),
    }
    save_file(weights, tmp_path / "model.safetensors")
    stored = StoredWeights(tmp_path)
    assert list(stored.shapes) == ["c"]
    assert all(stored.left_out[key].startswith("quantised") for key in weights.keys() - {"c.weight"})


# Where checkpoints are


def names(path):
    return [(one.name, one.step) for one in snapshots(path)]


def test_one_checkpoint_or_several_in_order(tmp_path):
    weights = base_weights()
    for step in (5, 100, 20):
        write(tmp_path / "run" / f"checkpoint-{step}", weights)
    (tmp_path / "run" / "checkpoint-300").mkdir()  # cut short before anything was written
    (tmp_path / "run" / "logs").mkdir()
    assert names(tmp_path / "run") == [("step 5", 5), ("step 20", 20), ("step 100", 100)]
    assert names(tmp_path / "run" / "checkpoint-20") == [("checkpoint-20", 20)]
    file = tmp_path / "run" / "checkpoint-5" / "model.safetensors"
    assert names(file) == [("model.safetensors", None)]


def test_a_run_of_doratune_train(tmp_path):
    weights = base_weights()
    run = tmp_path / "run"
    write(run / "model", weights)
    assert names(run) == [("model", None)]
    for step in (20, 40):
        write(run / "checkpoints" / f"checkpoint-{step}", weights)
    assert names(run) == [("step 20", 20), ("step 40", 40)]
    (run / "results.json").write_text('{"steps": 40}')
    assert names(run) == [("step 20", 20), ("step 40", 40)], "the end is the last checkpoint"
    (run / "results.json").write_text('{"steps": 50}')
    assert names(run) == [("step 20", 20), ("step 40", 40), ("step 50", 50)]
    (run / "results.json").write_text('{"steps": 50, "best_step": 40}')
    assert names(run) == [("step 20", 20), ("step 40", 40)], "the end is what was kept"


def test_folders_without_weights(tmp_path):
    with pytest.raises(dt.AdapterError, match="does not exist"):
        snapshots(tmp_path / "absent")
    with pytest.raises(dt.AdapterError, match="neither weights"):
        snapshots(tmp_path)


def test_labels_tell_folders_apart(tmp_path):
    a, b = tmp_path / "a" / "run", tmp_path / "b" / "run"
    assert labels_of([a, tmp_path / "c"]) == ["run", "c"]
    assert labels_of([a, b]) == ["a/run", "b/run"]
    assert labels_of([a, a]) == ["run (1)", "run (2)"]
