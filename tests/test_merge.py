import contextlib
import copy
import logging
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import doratune as dt
from doratune.targets import adapted_layers, holders
from helpers import DORA, LORA, assert_same, error, ids, move, output, snapshot, tiny, tiny_llama


def moved(config=DORA, model=None, amount=0.2):
    return move(dt.attach(tiny() if model is None else model, config), amount)


@pytest.mark.parametrize("config", [DORA, LORA, dt.AdapterConfig(rank=0)], ids=["dora", "lora", "magnitude"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 5e-3)], ids=str
)
def test_merged_is_unmerged_and_plain(dtype, tolerance, config):
    model = moved(config, tiny().to(dtype))
    x = ids()
    expected, base = output(model, x), output(tiny().to(dtype), x)
    assert dt.merge(model) is model
    assert not holders(model)
    assert set(model.state_dict()) == set(tiny().state_dict())
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert error(output(model, x), expected) < tolerance
    assert error(output(model, x), base) > 2 * tolerance
    assert dt.adapter_names(model) == []


@pytest.mark.parametrize("config", [DORA, LORA, dt.AdapterConfig(rank=0)], ids=["dora", "lora", "magnitude"])
def test_float64_keeps_its_digits(config):
    model = tiny().double()
    with torch.no_grad():
        for p in model.parameters():
            p.div_(3)  # no float32 number
    dt.attach(model, config)
    before = {path: layer.base_layer.weight.clone() for path, layer in adapted_layers(model).items()}
    dt.merge(model, verify=True)
    for path, weight in before.items():
        assert torch.equal(model.get_submodule(path).weight, weight)
    model = moved(config, tiny().double())
    expected = output(model, ids())
    dt.merge(model, verify=True)
    assert error(output(model, ids()), expected) < 1e-5


def test_verify_reports_each_layer_and_leaves_the_model(caplog):
    model = moved()
    before = snapshot(model)
    checks = dt.verify_merge(model)
    assert_same(before, snapshot(model))
    assert [c.path for c in checks] == list(adapted_layers(model))
    assert all(c.holds and c.difference < c.tolerance < 1e-5 for c in checks)
    with caplog.at_level(logging.INFO, "doratune"):
        dt.merge(model, verify=True)
    assert len(caplog.messages) == len(checks)
    assert all("difference" in m for m in caplog.messages)


def test_verify_refuses_a_merge_that_is_not_the_same(monkeypatch):
    module = sys.modules["doratune.merge"]  # the package's own ``merge`` is the function
    model = moved()
    before = snapshot(model)
    original = module.merged_weight
    monkeypatch.setattr(module, "merged_weight", lambda layer, name: original(layer, name) * 1.01)
    assert not any(c.holds for c in dt.verify_merge(model))
    with pytest.raises(dt.AdapterError, match=r"layers\.0\.q_proj: merged and unmerged outputs differ"):
        dt.merge(model, verify=True)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "magnitude", "adapter_bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_name_and_nothing_is_merged(value, part):
    model = moved(dt.AdapterConfig(rank=2, bias="lora_only"))
    with torch.no_grad():
        getattr(model.layers[1].up, part)["default"].view(-1)[0] = value
    before = snapshot(model)
    before["values"].pop(f"layers.1.up.{part}.default")  # NaN is not equal to itself
    with pytest.raises(dt.AdapterError, match=r"layers\.1\.up.*not finite") as caught:
        dt.merge(model)
    assert "layers.0" not in str(caught.value)
    after = snapshot(model)
    after["values"].pop(f"layers.1.up.{part}.default")
    assert_same(before, after)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.up = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x):
        return self.up(self.attention(x, x, x)[0])


@pytest.mark.parametrize("finished", range(5))
def test_an_interrupted_merge_changes_no_output_and_can_go_on(finished, monkeypatch):
    torch.manual_seed(0)
    model, x = dt.attach(Attending(), dt.AdapterConfig(rank=2, bias="lora_only")), torch.randn(2, 3, 8)
    move(model)
    expected = output(model, x)
    calls = []

    def interrupted(layer, name, weight):
        calls.append(layer)
        if len(calls) > finished:
            raise KeyboardInterrupt
        return merged_layer(layer, name, weight)

    module = sys.modules["doratune.merge"]
    merged_layer = module.merged_layer
    with monkeypatch.context() as patch:
        patch.setattr(module, "merged_layer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            dt.merge(model)
    assert error(output(model, x), expected) < 1e-5
    assert error(output(dt.merge(model), x), expected) < 1e-5


def test_a_weight_too_large_for_its_dtype_is_refused():
    model = moved(model=tiny().half())
    with torch.no_grad():
        model.layers[0].q_proj.magnitude["default"].mul_(1e7)
    with pytest.raises(dt.AdapterError, match=r"layers\.0\.q_proj"):
        dt.merge(model)
    assert dt.adapter_names(model) == ["default"]


def test_without_an_active_adapter_there_is_nothing_to_merge():
    with pytest.raises(dt.AdapterError, match="no adapter is active"):
        dt.merge(tiny())
    model = moved()
    dt.attach(model, LORA, "second")
    dt.delete_adapter(model, "second")
    with pytest.raises(dt.AdapterError, match="set_adapter"):
        dt.merge(model)


def test_the_active_adapter_is_merged_and_the_others_are_gone():
    model = moved(dt.AdapterConfig(rank=2, targets=["up", "q_proj"]))
    dt.attach(model, dt.AdapterConfig(rank=2, targets=["down", "up"], method="lora"), "second")
    move(model, seed=5)
    for name in ("default", "second"):
        twin = copy.deepcopy(model)
        dt.set_adapter(twin, name)
        expected = output(twin, ids())
        dt.merge(twin)
        assert error(output(twin, ids()), expected) < 1e-5
        assert not holders(twin)


def test_merging_is_done_in_float32_and_rounded_once():
    model = moved(model=tiny().bfloat16())
    layer = model.layers[0].up
    W = layer.base_layer.weight.double()
    V = W + layer.adapters["default"].scale * (layer.lora_B["default"].double() @ layer.lora_A["default"].double())
    expected = (layer.magnitude["default"].double() / V.norm(dim=1))[:, None] * V
    dt.merge(model)
    found = model.layers[0].up.weight.double()
    assert ((found - expected).abs() <= 0.5 * torch.finfo(torch.bfloat16).eps * expected.abs() * 1.001).all()


def test_a_merged_model_trains_where_the_plain_one_did():
    model = tiny()
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    flags["layers.0.up.weight"] = False
    model.layers[0].up.weight.requires_grad_(False)
    dt.merge(moved(model=model))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


@pytest.mark.parametrize("rows", [[0], [0, 3, 5]], ids=str)
@pytest.mark.parametrize("B_moved", [False, True])
def test_zero_rows(rows, B_moved):
    model = tiny()
    with torch.no_grad():
        model.layers[0].up.weight[rows] = 0
    dt.attach(model, DORA)
    if B_moved:
        move(model)
        with torch.no_grad():
            model.layers[0].up.magnitude["default"][rows] = 0
    x = ids()
    expected = output(model, x)
    dt.merge(model, verify=True)
    assert error(output(model, x), expected) < 1e-5
    assert bool(model.layers[0].up.weight[rows].any()) == B_moved


def test_near_cancellation_is_merged_from_the_dense_form():
    base = nn.Linear(6, 6)
    model = nn.Sequential(base)
    dt.attach(model, dt.AdapterConfig(rank=6, alpha=6))
    layer = model[0]
    with torch.no_grad():
        nn.init.orthogonal_(layer.lora_A["default"])
        A = layer.lora_A["default"].double()
        layer.lora_B["default"].copy_(-(base.weight.double() @ A.inverse()) * (1 - 1e-3))
    V = base.weight.double() + layer.lora_B["default"].double() @ A
    expected = (layer.magnitude["default"].double() / V.norm(dim=1))[:, None] * V
    dt.merge(model)
    assert error(model[0].weight, expected) < 1e-3


def test_a_forward_replaced_on_the_instance_runs_the_merged_weight():
    """As accelerate's hooks replace it."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = tiny()
    add_hook_to_module(model.layers[0].up, ModelHook())
    x = ids()
    before = output(model, x)
    moved(dt.AdapterConfig(rank=2, targets=["up"]), model)
    expected = output(model, x)
    assert error(before, expected) > 1e-3
    dt.merge(model)
    assert error(output(model, x), expected) < 1e-5


def test_parametrised_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)))
    dt.attach(model, dt.AdapterConfig(rank=2))
    move(model)
    x = torch.randn(3, 6)
    expected = model(x).detach()
    with contextlib.suppress(dt.AdapterError):  # merged or refused, but never another function
        dt.merge(model)
    assert error(model(x), expected) < 1e-5


# Models of transformers


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], "all-linear"], ids=str)
def test_a_merged_model_is_saved_and_read_by_transformers(tmp_path, targets):
    from transformers import AutoModelForCausalLM

    model = moved(dt.AdapterConfig(rank=2, targets=targets), tiny_llama(tie_word_embeddings=True))
    x = ids(vocabulary=32)
    with torch.no_grad():
        expected = model(x).logits
        dt.merge(model)
        untied = targets != "all-linear"
        assert model.config.tie_word_embeddings == (not untied)
        model.tie_weights()
        assert error(model(x).logits, expected) < 1e-5
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert error(again(x).logits, expected) < 1e-5
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == (not untied)


def test_a_head_trained_whole_is_untied_from_the_embedding(tmp_path):
    """Its copy replaces the head; tying it again would throw the training away."""
    from transformers import AutoModelForCausalLM

    model = dt.attach(tiny_llama(tie_word_embeddings=True), dt.AdapterConfig(rank=2, modules_to_save=["lm_head"]))
    move(model)
    x = ids(vocabulary=32)
    with torch.no_grad():
        for p in dt.trainable_parameters(model).values():
            p.add_(0.05)
        expected = model(x).logits
        dt.merge(model)
        assert error(model(x).logits, expected) < 1e-5
        assert not model.config.tie_word_embeddings
        model.tie_weights()
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert error(again(x).logits, expected) < 1e-5


def encoder_decoder(kind):
    from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    if kind == "t5":
        config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        return T5ForConditionalGeneration(config).eval()
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 16))}
    config = BartConfig(vocab_size=32, d_model=16, max_position_embeddings=32, **sizes)
    return BartForConditionalGeneration(config).eval()


@pytest.mark.parametrize("kind", ["bart", "t5"])
@pytest.mark.parametrize("adapted", ["lm_head", "shared", "embed_tokens", "saved"])
def test_one_of_several_tied_weights_is_merged_and_all_are_saved(tmp_path, kind, adapted):
    inner = {"targets": [{"bart": "fc1", "t5": "wi"}[kind]], "modules_to_save": ["lm_head"]}
    options = inner if adapted == "saved" else {"targets": [adapted]}
    model = moved(dt.AdapterConfig(rank=2, **options), encoder_decoder(kind))
    x = ids(vocabulary=32)
    with torch.no_grad():
        for p in dt.trainable_parameters(model).values():
            p.add_(0.05)
        expected = model(input_ids=x, decoder_input_ids=x).logits
        dt.merge(model).save_pretrained(tmp_path)
        again, loading = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert not loading["missing_keys"]
        assert error(again.eval()(input_ids=x, decoder_input_ids=x).logits, expected) < 1e-5


def test_merging_unties_a_language_model_inside_another(tmp_path):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = LlamaConfig(vocab_size=32, tie_word_embeddings=True, **sizes)
    vision = CLIPVisionConfig(image_size=8, patch_size=4, **sizes)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, tie_word_embeddings=True))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    moved(dt.AdapterConfig(rank=2, targets=["lm_head"]), model.eval())
    x = ids(vocabulary=31)
    with torch.no_grad():
        expected = model(input_ids=x).logits
        dt.merge(model).save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path).eval()
        assert error(again(input_ids=x).logits, expected) < 1e-5
    assert not model.config.tie_word_embeddings
    assert not again.config.get_text_config().tie_word_embeddings


def test_generation_is_the_same_before_and_after():
    model = moved(model=tiny_llama(), amount=0.5)
    x = ids(vocabulary=32)
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(x)}
    expected = model.generate(x, **settings)
    with dt.disabled(model):
        assert not torch.equal(model.generate(x, **settings), expected)
    with dt.frozen_scales(model):
        assert torch.equal(model.generate(x, **settings), expected)
    assert torch.equal(dt.merge(model).generate(x, **settings), expected)


@pytest.mark.parametrize("allowed", ["high", "medium"])
def test_verification_does_not_take_coarser_products_for_a_wrong_merge(allowed):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 256))
    dt.attach(model, dt.AdapterConfig(rank=4, targets=["0"]))
    move(model)
    try:
        torch.set_float32_matmul_precision(allowed)
        dt.merge(model, verify=True)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("change", ["weight_norm", "prune"])
@pytest.mark.parametrize("verify", [False, True])
def test_a_weight_made_by_a_hook_is_refused_before_anything_changes(change, verify):
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    if change == "prune":
        prune.l1_unstructured(model[1], "weight", amount=0.5)
    else:
        nn.utils.weight_norm(model[1])
    move(dt.attach(model, DORA))
    x = torch.randn(3, 4)
    before, expected = snapshot(model), model(x)
    with pytest.raises(dt.AdapterError, match=r"1: its weight .*prune\.remove"):
        dt.merge(model, verify=verify)
    assert_same(before, snapshot(model))
    assert torch.equal(model(x), expected)


def test_a_loop_that_led_to_near_cancellation_is_merged():
    """Nothing but the adapter's values tells that the factored norm has lost its digits meanwhile."""
    torch.manual_seed(0)
    model = dt.attach(nn.Sequential(nn.Linear(8, 16)), dt.AdapterConfig(rank=8, alpha=8))
    layer = model[0]
    with torch.no_grad():
        layer.lora_A["default"].copy_(torch.eye(8))
        layer.lora_B["default"].copy_(-0.999 * layer.base_layer.weight)
    assert not layer.adapters["default"].dense_norm
    dt.merge(model, verify=True)
