"""mlx-lm's adapters: what is written here is the same function there, and the other way round; what does not fit."""

import json
import shutil

import mlx.core as mx
import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import doratune as dt
from doratune.files import CONFIG, MLX_WEIGHTS, WEIGHTS
from doratune.interop.mlx.files import AdapterFiles
from doratune.targets import adapted_layers
from file_helpers import IDS, assert_unchanged, move, options, rewrite_options, state

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
}
FAMILIES = {
    "llama": ("LlamaConfig", {"attention_bias": True, "tie_word_embeddings": False}),
    "tied llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", {"query_pre_attn_scalar": 8}),
    "phi3": ("Phi3Config", {"pad_token_id": 0}),
}
SAME = 1e-5
"""Of what an adapter does to the logits, in float32."""


def build(family="llama", seed=0):
    """A small random model of transformers whose attention is not flat and whose biases are not 0."""
    import transformers

    name, more = FAMILIES[family]
    config = getattr(transformers, name)(**{**SIZES, "rope_theta": 10000.0, **more})
    # Gemma 2's scores are capped by eager attention only, and transformers 5.20 (Python 3.10) takes SDPA by default.
    return varied(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"), seed)


@torch.no_grad()
def varied(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 2:
            parameter.copy_(0.1 * noise)
        elif name.endswith("bias"):
            parameter.copy_(0.5 * noise)
    return model.float().eval()


def saved(model, folder):
    """A folder that mlx-lm can load; transformers 5 wrote rope_theta one level down."""
    model.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "rope_theta": 10000.0}))
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    found = {}

    def base(family="llama"):
        if family not in found:
            found[family] = saved(build(family), tmp_path_factory.mktemp("base"))
        return found[family]

    return base


def mlx_model(base, adapter=None):
    """mlx-lm's own model, with an adapter as its ``--adapter-path`` applies it."""
    from mlx_lm.utils import load_adapters, load_model

    model, _ = load_model(base)
    return load_adapters(model, str(adapter)) if adapter else model


@torch.no_grad()
def output(model):
    return model(IDS).logits


def logits(model):
    return torch.tensor(model(mx.array(IDS.numpy())).astype(mx.float32).tolist())


def assert_same(found, expected, base):
    """Two logits differ by less than this share of what the adapter changes."""
    moved = float((expected - base).abs().max())
    assert moved > 0.05
    assert float((found - expected).abs().max()) < SAME * moved


# Written here, read by mlx-lm


@pytest.mark.parametrize("method", ["dora", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_mlx_computes_the_same(family, method, bases, tmp_path):
    model = build(family)
    base = output(model)
    torch.testing.assert_close(logits(mlx_model(bases(family))), base, atol=1e-5, rtol=1e-4)
    move(dt.attach(model, dt.AdapterConfig(method=method, rank=4)))
    dt.mlx.save_adapter(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {MLX_WEIGHTS, CONFIG}
    assert_same(logits(mlx_model(bases(family), tmp_path)), output(model), base)


UNEVEN = {
    "ranks": dt.AdapterConfig(rank=4, rank_pattern={"q_proj": 1, "layers.1.mlp.up_proj": 7}),
    "alphas": dt.AdapterConfig(rank=4, alpha_pattern={"v_proj": 1, "layers.2.mlp.down_proj": 40}),
    "rank-stabilised": dt.AdapterConfig(rank=4, rank_pattern={"o_proj": 2}, rank_stabilized=True),
    "plain LoRA": dt.AdapterConfig(method="lora", rank=4, rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 3}),
    "magnitudes": dt.AdapterConfig(rank=0),
    "some magnitudes": dt.AdapterConfig(rank=3, rank_pattern={"mlp.*": 0}),
    "the last block": dt.AdapterConfig(rank=4, targets=r".*layers\.2\..*_proj"),
    "holes": dt.AdapterConfig(rank=4, targets=r".*(layers\.0\.mlp|layers\.2\.self_attn)\..*_proj"),
    "the head": dt.AdapterConfig(rank=4, targets=["q_proj", "lm_head"]),
    "nothing but the head": dt.AdapterConfig(rank=4, targets=["lm_head"]),
    "the embedding": dt.AdapterConfig(method="lora", rank=4, targets=["embed_tokens", "up_proj"]),
}


@pytest.mark.parametrize("case", UNEVEN)
def test_what_differs_between_layers(case, bases, tmp_path):
    model = build()
    base = output(model)
    move(dt.attach(model, UNEVEN[case]))
    dt.mlx.save_adapter(model, tmp_path)
    theirs = mlx_model(bases(), tmp_path)
    assert_same(logits(theirs), output(model), base)
    adapted = {name for name, module in theirs.named_modules() if "lora_a" in module}
    assert adapted == set(adapted_layers(model)), "no layer is adapted in vain"
    again = build()
    dt.mlx.load_adapter(again, tmp_path)
    assert_same(output(again), output(model), base)


def test_names_in_the_blocks_where_they_say_all(tmp_path):
    model = dt.attach(build(), dt.AdapterConfig(rank=4, alpha=6, dropout=0.1, targets=r".*layers\.[12]\..*(q|up)_proj"))
    model.name_or_path = "my/base"
    dt.mlx.save_adapter(model, tmp_path)
    assert options(tmp_path) == {
        "fine_tune_type": "dora",
        "lora_parameters": {"dropout": 0.1, "keys": ["mlp.up_proj", "self_attn.q_proj"], "rank": 4, "scale": 1.5},
        "model": "my/base",
        "num_layers": 2,
    }
    stored = load_file(tmp_path / MLX_WEIGHTS)
    assert {tuple(tensor.shape) for name, tensor in stored.items() if ".1.mlp." in name} == {(32, 4), (4, 48), (48,)}


@torch.no_grad()
@pytest.mark.parametrize("rank", [4, 0])
def test_zero_rows(rank, tmp_path):
    model = build()
    model.model.layers[1].mlp.up_proj.weight[[3, 5]] = 0
    model.model.layers[2].self_attn.q_proj.weight[7] = 0
    folder = saved(model, tmp_path / "base")
    base = output(model)
    move(dt.attach(model, dt.AdapterConfig(rank=3, rank_pattern={"mlp.up_proj": rank}, alpha_pattern={"q_proj": 1})))
    if rank:
        adapted_layers(model)["model.layers.1.mlp.up_proj"].lora_B["default"][5] = 0  # a row of zeros stays one
    dt.mlx.save_adapter(model, tmp_path / "adapter")
    assert_same(logits(mlx_model(folder, tmp_path / "adapter")), output(model), base)


def test_a_model_that_sees_as_well(tmp_path):
    import transformers

    text = transformers.MistralConfig(**{**SIZES, "tie_word_embeddings": False})
    vision = transformers.PixtralVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=False)
    model = varied(transformers.Mistral3ForConditionalGeneration(config))
    model.save_pretrained(tmp_path / "base")
    raw = json.loads((tmp_path / "base" / "config.json").read_text())
    raw["text_config"] |= {"rope_theta": 10000.0, "tie_word_embeddings": False}
    (tmp_path / "base" / "config.json").write_text(json.dumps(raw))
    base = output(model)
    targets = r".*language_model\.layers\.[12]\..*_proj|lm_head"
    move(dt.attach(model, dt.AdapterConfig(rank=4, targets=targets)))
    dt.mlx.save_adapter(model, tmp_path / "adapter")
    assert options(tmp_path / "adapter")["lora_parameters"]["keys"][-1] == "language_model.lm_head"
    assert_same(logits(mlx_model(tmp_path / "base", tmp_path / "adapter")), output(model), base)
    expected = output(model)
    dt.mlx.load_adapter(dt.detach(model), tmp_path / "adapter")
    assert_same(output(model), expected, base)
    dt.attach(dt.detach(model), dt.AdapterConfig(rank=2, targets=r".*vision_tower.*q_proj"))
    with pytest.raises(dt.AdapterError, match=r"vision_tower.*q_proj: mlx-lm has no such module: it knows model\.lang"):
        dt.mlx.save_adapter(model, tmp_path / "other")


class Attending(nn.Module):
    """Stands for a language model in which mlx-lm's paths lead to layers that it does not know."""

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        block = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "conv": nn.Conv1d(8, 8, 3)})
        self.model.layers = nn.ModuleList([block])
        self.other = nn.Linear(8, 8)


def test_what_mlx_cannot_have_is_one_error(tmp_path):
    def said(model, config):
        move(dt.attach(model, config))
        with pytest.raises(dt.AdapterError) as error:
            dt.mlx.save_adapter(model, tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()
        return str(error.value)

    targets = ["q_proj", "embed_tokens"]
    found = said(build(), dt.AdapterConfig(rank=2, targets=targets, bias="lora_only", modules_to_save=["lm_head"]))
    assert "adapter 'default' cannot be mlx-lm's (3 problems):" in found
    assert "model.embed_tokens: mlx-lm has a magnitude for each token of an embedding, doratune and PEFT one" in found
    assert "model.layers.0.self_attn.q_proj (and 2 more): its bias is trained, too" in found
    assert "lm_head: it is trained whole" in found
    found = said(Attending(), dt.AdapterConfig(rank=2, targets=["q_proj", "out_proj", "conv", "other"]))
    assert (
        "model.layers.0.attention.q_proj (and 1 more): mlx-lm adapts linear layers and embeddings, and no attention"
        in found
    )
    assert "model.layers.0.conv: mlx-lm adapts linear layers and embeddings, and no convolution" in found
    assert "other: mlx-lm has no such module: it knows model.layers, model.embed_tokens and lm_head" in found
    for target in ("lm_head", "embed_tokens"):
        found = said(build("tied llama"), dt.AdapterConfig(method="lora", rank=2, targets=[target, "v_proj"]))
        assert f"{target}: embedding and head share a weight" in found
        assert "v_proj" not in found


def test_weights_that_mlx_multiplies(tmp_path):
    model = dt.attach(build(), dt.AdapterConfig(rank=2, targets=["q_proj"]))
    model.config.model_type = "falcon_h1"
    with pytest.raises(dt.AdapterError, match="mlx-lm multiplies the weights of a falcon_h1 by constants"):
        dt.mlx.save_adapter(model, tmp_path / "adapter")


def test_values_that_are_not_finite_and_names_that_are_not_there(tmp_path):
    model = dt.attach(build(), dt.AdapterConfig(rank=2, targets=["q_proj"]))
    with pytest.raises(dt.AdapterError, match="the model has no adapter 'other' to save"):
        dt.mlx.save_adapter(model, tmp_path / "adapter", "other")
    with torch.no_grad():
        adapted_layers(model)["model.layers.1.self_attn.q_proj"].magnitude["default"][0] = float("inf")
    with pytest.raises(dt.AdapterError, match=r"layers\.1\.self_attn\.q_proj\.lora_magnitude_vector: not finite"):
        dt.mlx.save_adapter(model, tmp_path / "adapter")


def test_the_other_format_is_not_overwritten_by_half(tmp_path):
    model = dt.attach(build(), dt.AdapterConfig(rank=2, targets=["q_proj"]))
    for save, other, theirs in (
        (dt.mlx.save_adapter, dt.save_adapter, WEIGHTS),
        (dt.save_adapter, dt.mlx.save_adapter, MLX_WEIGHTS),
    ):
        folder = tmp_path / theirs
        other(model, folder)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(dt.AdapterError, match=f"it holds {theirs} of another format; name a new folder"):
            save(model, folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        other(model, folder)  # its own kind is replaced


# Written by mlx-lm, read here


def trained_by_mlx(base, folder, method, count, parameters):
    """An adapter of mlx-lm that has moved, written as its trainer does."""
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import save_config

    mx.random.seed(0)
    model = mlx_model(base)
    model.freeze()
    linear_to_lora_layers(model, count, parameters, use_dora=method == "dora")
    own = dict(tree_flatten(model.trainable_parameters()))
    assert own
    moved = {name: value * (1 + 0.2 * mx.random.normal(value.shape)) for name, value in own.items()}
    moved |= {n: v + 0.02 * mx.random.normal(v.shape) for n, v in moved.items() if n.endswith(("lora_a", "lora_b"))}
    model.update(tree_unflatten(list(moved.items())))
    folder.mkdir()
    mx.save_safetensors(str(folder / MLX_WEIGHTS), dict(tree_flatten(model.trainable_parameters())))
    arguments = {"fine_tune_type": method, "num_layers": count, "lora_parameters": parameters, "model": str(base)}
    save_config({**arguments, "seed": 0, "train": True, "batch_size": 4}, folder / CONFIG)
    return model.eval()


TRAINED = {
    "default": ("dora", 2, {"rank": 8, "dropout": 0.0, "scale": 20.0}),
    "all": ("dora", -1, {"rank": 3, "dropout": 0.1, "scale": 7.3}),
    "more than there are": ("lora", 16, {"rank": 8, "dropout": 0.0, "scale": 20.0}),
    "keys": ("dora", 1, {"rank": 2, "dropout": 0.0, "scale": 10, "keys": ["self_attn.v_proj", "mlp.up_proj"]}),
    "whole names": (
        "lora",
        1,
        {"rank": 2, "dropout": 0.0, "scale": 9.0, "keys": ["lm_head", "model.embed_tokens", "self_attn.o_proj"]},
    ),
}


@pytest.mark.parametrize("case", TRAINED)
def test_what_mlx_trained_is_the_same_here(case, bases, tmp_path):
    method, count, parameters = TRAINED[case]
    theirs = trained_by_mlx(bases(), tmp_path / "adapter", method, count, parameters)
    model = build()
    base = output(model)
    assert dt.mlx.load_adapter(model, tmp_path / "adapter", "theirs", trainable=True) is model
    assert_same(output(model), logits(theirs), base)
    assert dt.active_adapter(model) == "theirs"
    adapter = next(iter(adapted_layers(model).values())).adapters["theirs"]
    assert adapter.config.method == method
    assert adapter.rank == parameters["rank"]
    assert adapter.config.dropout == parameters["dropout"]
    assert adapter.scale == pytest.approx(parameters["scale"], rel=1e-12)
    dt.mlx.save_adapter(model, tmp_path / "again", "theirs")
    first, second = (load_file(tmp_path / name / MLX_WEIGHTS) for name in ("adapter", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradients_of_what_is_read(bases, tmp_path):
    trained_by_mlx(bases(), tmp_path / "adapter", *TRAINED["default"])
    model = dt.mlx.load_adapter(build(), tmp_path / "adapter")
    assert not dt.trainable_parameters(model), "frozen unless asked"
    model = dt.mlx.load_adapter(build(), tmp_path / "adapter", trainable=True)
    model(IDS).logits.square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in dt.trainable_parameters(model).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_number_formats(dtype, bases, tmp_path):
    trained_by_mlx(bases(), tmp_path / "adapter", *TRAINED["default"])
    stored = {name: t.to(dtype) for name, t in load_file(tmp_path / "adapter" / MLX_WEIGHTS).items()}
    save_file(stored, tmp_path / "adapter" / MLX_WEIGHTS)
    model = dt.mlx.load_adapter(build(), tmp_path / "adapter")
    layer = adapted_layers(model)["model.layers.2.mlp.up_proj"]
    assert torch.equal(layer.lora_A["default"], stored["model.layers.2.mlp.up_proj.lora_a"].T.float())
    assert torch.equal(layer.magnitude["default"], stored["model.layers.2.mlp.up_proj.m"].float())


def test_peft_reads_what_mlx_trained(bases, tmp_path):
    theirs = trained_by_mlx(bases(), tmp_path / "adapter", *TRAINED["all"])
    dt.save_adapter(dt.mlx.load_adapter(build(), tmp_path / "adapter"), tmp_path / "peft")
    model = build()
    base = output(model)
    assert_same(output(peft.PeftModel.from_pretrained(model, tmp_path / "peft").eval()), logits(theirs), base)


# Files that do not fit


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("valid")
    dt.mlx.save_adapter(move(dt.attach(build(), dt.AdapterConfig(rank=4, targets=["q_proj"]))), folder)
    return folder


@pytest.fixture
def folder(valid, tmp_path):
    return shutil.copytree(valid, tmp_path / "adapter")


@pytest.fixture(scope="module")
def model():
    return move(dt.attach(build(), dt.AdapterConfig(rank=1, targets=["up_proj"]), "mine"))


def refused(model, folder):
    before = state(model)
    with pytest.raises(dt.AdapterError) as error:
        dt.mlx.load_adapter(model, folder)
    assert_unchanged(model, before)
    assert dt.adapter_names(model) == ["mine"]
    return str(error.value)


FIRST = "model.layers.0.self_attn.q_proj"
GOOD = {"rank": 4, "scale": 1.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
OPTIONS = {
    "full": ({"fine_tune_type": "full", "lora_parameters": None}, "'full': it holds weights of the model, and no ada"),
    "another type": ({"fine_tune_type": "loha"}, "fine_tune_type: expected 'lora' or 'dora', found 'loha'"),
    "a list": ({"fine_tune_type": ["dora"]}, "fine_tune_type: expected 'lora' or 'dora', found ['dora']"),
    "no parameters": ({"lora_parameters": None}, "lora_parameters: expected rank, scale, dropout and keys, found None"),
    "no rank": ({"lora_parameters": {"scale": 1.0, "dropout": 0.0}}, "rank: expected a whole number from 1 to"),
    "alpha": ({"lora_parameters": {"rank": 4, "alpha": 8}}, "scale: expected a finite number above 0, found None"),
    "negative scale": ({"lora_parameters": {**GOOD, "scale": -1}}, "scale: expected a finite number above 0, found -1"),
    "scale nan": ({"lora_parameters": {**GOOD, "scale": float("nan")}}, "scale: expected a finite number above 0"),
    "huge rank": ({"lora_parameters": {**GOOD, "rank": 10**9}}, "rank: expected a whole number from 1 to 1048576"),
    "dropout": ({"lora_parameters": {**GOOD, "dropout": 1.0}}, "dropout: expected at least 0 and below 1, found 1.0"),
    "keys": ({"lora_parameters": {**GOOD, "keys": "q_proj"}}, "keys: expected names of modules, found 'q_proj'"),
    "layers": ({"num_layers": "16"}, "num_layers: expected a whole number, found '16'"),
    "fewer layers": ({"num_layers": 2}, f"{FIRST}: the file has tensors for it, but by num_layers and keys in adap"),
    "other keys": ({"lora_parameters": {**GOOD, "keys": ["q_proj"]}}, "2.self_attn.q_proj: the file has tensors for"),
    "another rank": (
        {"lora_parameters": {**GOOD, "rank": 5}},
        f"{FIRST}.lora_b: expected shape (5, 32), found (4, 32)",
    ),
    "lora": ({"fine_tune_type": "lora"}, f"{FIRST}.m: not a tensor of a LoRA adapter of mlx-lm"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_do_not_fit(case, folder, model):
    change, expected = OPTIONS[case]
    assert expected in refused(model, rewrite_options(folder, **change))


TENSORS = {
    "rank": ({f"{FIRST}.lora_a": torch.zeros(32, 3)}, [f"{FIRST}.lora_a: expected shape (32, 4), found (32, 3)"]),
    "turned": ({f"{FIRST}.lora_b": torch.zeros(32, 4)}, [f"{FIRST}.lora_b: expected shape (4, 32), found (32, 4)"]),
    "magnitudes": ({f"{FIRST}.m": torch.ones(31)}, [f"{FIRST}.m: expected shape (32,), found (31,)"]),
    "experts": (
        {f"{FIRST}.lora_a": torch.zeros(2, 4, 32)},
        [f"{FIRST}.lora_a: expected shape (32, 4), found (2, 4, 32)"],
    ),
    "scalar": ({f"{FIRST}.m": torch.tensor(1.0)}, [f"{FIRST}.m: expected shape (32,), found ()"]),
    "no m": ({f"{FIRST}.m": None}, [f"{FIRST}.m: missing"]),
    "only m": ({f"{FIRST}.lora_a": None, f"{FIRST}.lora_b": None}, [f"{FIRST}.lora_a: missing", "lora_b: missing"]),
    "nan": ({f"{FIRST}.m": torch.full((32,), float("nan"))}, [f"{FIRST}.m: holds NaN or infinite values"]),
    "integers": ({f"{FIRST}.m": torch.ones(32, dtype=torch.int32)}, [f"{FIRST}.m: expected float64", "found int32"]),
    "quantised": (
        {
            f"{FIRST}.linear.scales": torch.ones(32, 1),
            f"{FIRST}.linear.weight": torch.ones(32, 4, dtype=torch.uint32),
        },
        [f"{FIRST}.linear.scales: not a tensor of a DoRA adapter", f"{FIRST}.linear.weight: not a tensor of a DoRA"],
    ),
    "bare": ({"lora_a": torch.ones(2, 2)}, ["lora_a: not a tensor of a DoRA adapter of mlx-lm"]),
    "another model": (
        {"transformer.h.0.q.lora_a": torch.ones(2, 2)},
        ["transformer.h.0.q: the model has no such module; is the file of another model?"],
    ),
    "several": (
        {f"{FIRST}.lora_a": torch.zeros(32, 3), f"{FIRST}.m": None, "x.weight": torch.ones(1)},
        ["(3 problems)", f"{FIRST}.lora_a: expected", f"{FIRST}.m: missing", "x.weight: not a tensor"],
    ),
    "a norm": (
        {f"model.norm.{part}": torch.ones(4, 4) for part in ("lora_a", "lora_b")},
        ["model.norm: mlx-lm adapts linear layers and embeddings, and no LlamaRMSNorm"],
    ),
}


def rewritten(folder, change):
    stored = {**load_file(folder / MLX_WEIGHTS), **change}
    save_file({name: t for name, t in stored.items() if t is not None}, folder / MLX_WEIGHTS)
    return folder


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit(case, folder, model):
    change, expected = TENSORS[case]
    said = refused(model, rewritten(folder, change))
    for part in expected:
        assert part in said
    assert "base_model" not in said, "named as the file names it"


def test_dora_on_an_embedding_of_mlx(bases, tmp_path, model):
    keys = ["model.embed_tokens", "self_attn.q_proj"]
    parameters = {"rank": 2, "dropout": 0.0, "scale": 1.0, "keys": keys}
    trained_by_mlx(bases(), tmp_path / "adapter", "dora", 1, parameters)
    assert "model.embed_tokens: mlx-lm has a magnitude for each token" in refused(model, tmp_path / "adapter")


def test_folders_that_hold_no_adapter_of_mlx(folder, model, tmp_path):
    assert f"{tmp_path / 'nowhere'} does not exist" in refused(model, tmp_path / "nowhere")
    dt.save_adapter(dt.attach(build(), dt.AdapterConfig(targets=["q_proj"])), tmp_path / "peft")
    assert "is not mlx-lm's: it has neither fine_tune_type nor lora_parameters" in refused(model, tmp_path / "peft")
    (folder / MLX_WEIGHTS).unlink()
    assert f"{folder} has no {MLX_WEIGHTS}" in refused(model, folder)
    torch.save({"x": torch.ones(1)}, folder / MLX_WEIGHTS)
    assert "it may be truncated or no safetensors file" in refused(model, folder)
    save_file({}, folder / MLX_WEIGHTS)
    assert "does not fit: it holds no adapted layer" in refused(model, folder)
    (folder / CONFIG).write_text("{")
    assert "is not JSON" in refused(model, folder)


@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_at_any_place(share, valid, model, tmp_path_factory):
    folder = shutil.copytree(valid, tmp_path_factory.mktemp("cut") / "adapter")
    whole = (folder / MLX_WEIGHTS).read_bytes()
    (folder / MLX_WEIGHTS).write_bytes(whole[: int(share * len(whole))])
    assert str(folder / MLX_WEIGHTS) in refused(model, folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@given(
    field=st.sampled_from(["fine_tune_type", "num_layers", "lora_parameters", "rank", "scale", "dropout", "keys"]),
    value=JSON,
)
def test_any_value_of_an_option_is_read_or_refused(field, value, valid, tmp_path_factory):
    folder = shutil.copytree(valid, tmp_path_factory.mktemp("any") / "adapter")
    inner = {"lora_parameters": {**GOOD, field: value}}
    rewrite_options(
        folder, **({field: value} if field in ("fine_tune_type", "num_layers", "lora_parameters") else inner)
    )
    try:
        found = AdapterFiles.read(folder)
    except dt.AdapterError:
        return
    assert found.rank >= 1
    assert found.scale > 0


@pytest.mark.parametrize("read", [dt.load_adapter, lambda model, folder: dt.load_adapter(model, folder, as_dora=True)])
def test_the_reader_of_pefts_files_says_whose_it_is(read, folder, model):
    before = state(model)
    with pytest.raises(dt.AdapterError, match=r"an adapter of Apple's mlx-lm.*--to peft.*doratune\.mlx\.load_adapter"):
        read(model, folder)
    assert_unchanged(model, before)
