"""Quantised bases: the library's own forward, the norm from transient numbers, full precision after merging."""

import copy
import logging
import weakref

import bitsandbytes as bnb
import pytest
import torch
from bench.peak import peak_bytes
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerGroup

import doratune as dt
from doratune.layers import quantised
from doratune.ops import reference, row_norm
from doratune.study.footprint import saved_bytes
from doratune.targets import adapted_layers
from helpers import error, tiny_llama

IN, OUT = 128, 64


def linear(bias=True):
    torch.manual_seed(0)
    return nn.Linear(IN, OUT, bias=bias)


def bnb_4bit(kind="nf4", nested=True, dtype=torch.float32):
    def make():
        plain = linear()
        layer = bnb.nn.Linear4bit(IN, OUT, quant_type=kind, compress_statistics=nested, compute_dtype=dtype)
        layer.weight = bnb.nn.Params4bit(
            plain.weight.data.clone(), requires_grad=False, quant_type=kind, compress_statistics=nested
        )
        layer.bias = plain.bias
        return layer.to("cpu")

    return make


def bnb_8bit():
    plain = linear()
    layer = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(plain.weight.data.clone(), requires_grad=False)
    layer.bias = plain.bias
    return layer.to("cpu")


def torchao(config):
    def make():
        model = nn.Sequential(linear())
        quantize_(model, config)
        return model[0]

    return make


def hqq():
    settings = BaseQuantizeConfig(nbits=4, group_size=64)
    return HQQLinear(linear(), settings, compute_dtype=torch.float32, device="cpu")


LAYERS = {
    "nf4": bnb_4bit(),
    "nf4-single": bnb_4bit(nested=False),
    "fp4": bnb_4bit("fp4"),
    "bnb-int8": bnb_8bit,
    "torchao-int8": torchao(Int8WeightOnlyConfig()),
    "torchao-int4": torchao(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))),
    "hqq": hqq,
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
METHODS = {"dora": {}, "lora": {"method": "lora"}, "magnitude": {"rank": 0}, "exact": {"norm_gradient": "exact"}}
every_method = pytest.mark.parametrize("method", METHODS)
# bitsandbytes says once that 8-bit inputs become float16 inside.
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")


def made(make, method="dora", moved=True, **options):
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.ReLU(inplace=True))
    dt.attach(model, dt.AdapterConfig(**{"rank": 4} | METHODS[method] | options))
    if moved:
        move(model)
    return model


@torch.no_grad()
def move(model):
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.normal_(std=0.1)
        elif "magnitude" in name:
            p.mul_(1 + 0.3 * torch.rand_like(p))
    return model


def numbers(layer):
    return numbers_of(layer.base_layer)


def numbers_of(base):
    (tile,) = [tile for _, tile in quantised.quantised_rows(base).tiles()]
    return tile.double()


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_weights_are_counted_and_not_the_bytes_they_are_packed_into(make):
    model = nn.Sequential(make())
    size = OUT * IN + (OUT if make is not hqq else 0)  # whose bias is a tensor that is no parameter
    assert dt.summary(model).base == size
    dt.attach(model, dt.AdapterConfig(rank=2, targets=["0"]))
    assert dt.summary(model).base == size


@pytest.mark.parametrize("make", [m for n, m in LAYERS.items() if n != "hqq"], ids=[n for n in LAYERS if n != "hqq"])
def test_tiles_of_any_size_make_up_the_weight(make, monkeypatch):
    base = made(make)[0].base_layer
    library = quantised.library_of(base)
    whole = numbers_of(base)
    for rows in (1, 7, 20):
        monkeypatch.setitem(row_norm.TILE_BYTES, "cpu", 4 * IN * rows)
        tiles = list(quantised.quantised_rows(base).tiles())
        assert len(tiles) == -(-OUT // rows), library
        assert torch.equal(torch.cat([tile for _, tile in tiles]).double(), whole)
        assert [r.start for r, _ in tiles] == list(range(0, OUT, rows))


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("columns", [32, 96, 160])
def test_where_rows_share_a_scale_the_weight_is_what_the_forward_uses(columns, nested, monkeypatch):
    base = bnb.nn.Linear4bit(columns, OUT, bias=False, quant_type="nf4", compress_statistics=nested)
    base.weight = bnb.nn.Params4bit(torch.randn(OUT, columns), quant_type="nf4", compress_statistics=nested)
    base.to("cpu")
    monkeypatch.setitem(row_norm.TILE_BYTES, "cpu", 4 * columns * 3)
    W = torch.cat([tile for _, tile in quantised.quantised_rows(base).tiles()])
    assert error(base(torch.eye(columns)).T, W) < 1e-6


def leaves_of(layer):
    """A, B and m in float64, zeros where the adapter has none."""
    found = {}
    for part in ("lora_A", "lora_B", "magnitude"):
        group = getattr(layer, part)
        if "default" in group:
            found[part] = group["default"].detach().double().requires_grad_()
    return found


def reference_output(layer, x, leaves):
    adapter = layer.adapters["default"]
    A = leaves.get("lora_A", torch.zeros(1, IN).double())
    B = leaves.get("lora_B", torch.zeros(OUT, 1).double())
    bias = layer.base_layer.bias.detach().double()
    if "magnitude" not in leaves:
        return x.double() @ reference.lora_weight(numbers(layer), A, B, adapter.scale).T + bias
    gradient = adapter.config.norm_gradient
    return reference.dora_linear(x.double(), numbers(layer), bias, A, B, leaves["magnitude"], adapter.scale, gradient)


@every_method
@pytest.mark.parametrize("name", [*LAYERS, "nf4 in bfloat16"])
def test_output_and_gradients_are_the_references(name, method):
    half = name == "nf4 in bfloat16"
    model = made(bnb_4bit(dtype=torch.bfloat16) if half else LAYERS[name], method, moved=False)
    layer = model[0]
    x = torch.randn(6, IN, dtype=torch.bfloat16 if half else torch.float32)
    assert torch.equal(model(x), layer.base_layer(x).relu())
    move(model)
    leaves = leaves_of(layer)
    expected = reference_output(layer, x, leaves).relu()
    y = model(x)
    assert y.dtype == x.dtype
    # An 8-bit bitsandbytes layer rounds its input, too; its base's output stands for W x.
    coarse = 1e-2 if half or isinstance(layer.base_layer, bnb.nn.Linear8bitLt) else 1e-5
    assert error(y, expected) < coarse
    y.square().sum().backward()
    expected.square().sum().backward()
    for part, leaf in leaves.items():
        assert error(getattr(layer, part)["default"].grad, leaf.grad) < 3 * coarse, part
    assert all(p.grad is None for p in layer.base_layer.parameters())


@every_method
@every_layer
def test_merging_gives_a_plain_layer_of_full_precision(make, method, caplog):
    model = made(make, method)
    x = torch.randn(6, IN)
    model.eval()
    with torch.no_grad():
        y = model(x)
        (check,) = dt.verify_merge(model)
        dt.merge(model, verify=True)
        assert type(model[0]) is nn.Linear
        assert model[0].weight.dtype == torch.float32
        assert error(model(x), y) < (2e-2 if make is bnb_8bit else 1e-5)
    assert check.holds
    assert f"would change their weights by {100 * check.requantisation:.1f} %" in caplog.text
    assert check.requantisation < 0.2
    if method != "magnitude":  # a scaled row falls on the same grid, scaled
        assert check.requantisation > 1e-4


@every_layer
def test_adapters_act_in_every_mode(make):
    model = made(make)
    x = torch.randn(6, IN)
    with dt.disabled(model):
        base = model(x)
    expected = model(x)
    assert error(expected, base) > 1e-2
    for training in (True, False):
        model.train(training)
        assert error(model(x), expected) < 1e-2
        with torch.no_grad():
            assert error(model(x), expected) < 1e-2
        with torch.inference_mode():
            assert error(model(x), expected) < 1e-2
    leaves = leaves_of(model[0])
    reference_output(model[0], x, leaves).relu().square().sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert error(y, expected) < 5e-2
    y.float().square().sum().backward()
    for part, leaf in leaves.items():
        assert error(getattr(model[0], part)["default"].grad, leaf.grad) < 8e-2, part


@every_layer
def test_training_still_works_after_an_evaluation(make):
    """bitsandbytes would repack a 4-bit weight for good in its first evaluation forward on some processors."""
    model = made(make)
    x = torch.randn(6, IN)
    before = numbers(model[0])
    model.eval()
    with torch.no_grad():
        model(x)
    model.train()
    x.requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert x.grad.abs().sum() > 0
    assert torch.equal(numbers(model[0]), before)


@every_layer
def test_nothing_dequantised_is_kept_for_backward(make):
    model = made(make, bias="none")
    tokens = 3
    kept = []

    def pack(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(torch.randn(tokens, IN))
    floats = [t for t in kept if type(t) is torch.Tensor and t.is_floating_point() and t.numel() >= OUT * IN]
    assert floats == []


@every_layer
def test_no_two_dequantised_weights_live_at_once_and_none_after_the_forward(make, monkeypatch):
    """The peak of memory: one transient matrix, gone before the backward pass begins."""
    model = nn.Sequential(made(make, norm_gradient="exact"), nn.Linear(OUT, IN), made(make, norm_gradient="exact"))
    alive = []

    def watched(dequantise):
        def run(base):
            for rows, tile in dequantise(base):
                assert all(reference() is None for reference in alive), "another dequantised tile is still there"
                alive.append(weakref.ref(tile))
                yield rows, tile
                del tile

        return run

    library = quantised.library_of(model[0][0].base_layer)
    monkeypatch.setitem(quantised.DEQUANTISE, library, watched(quantised.DEQUANTISE[library]))
    loss = model(torch.randn(3, IN)).sum()
    assert len(alive) >= 2
    assert all(reference() is None for reference in alive)
    loss.backward()
    assert all(reference() is None for reference in alive)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@every_layer
def test_compiled(make):
    """With breaks in the graph where the library's own forward needs them."""
    model = made(make).train()
    x = torch.randn(6, IN)
    y = model(x)
    compiled = torch.compile(model, backend="aot_eager")
    assert error(compiled(x), y) < 1e-5
    y.square().sum().backward()
    expected = [p.grad.clone() for p in dt.trainable_parameters(model).values()]
    model.zero_grad()
    compiled(x).square().sum().backward()
    for p, gradient in zip(dt.trainable_parameters(model).values(), expected, strict=True):
        assert error(p.grad, gradient) < 1e-5
    torch._dynamo.reset()


def test_dynamic_activations_and_repacked_weights_are_refused_by_name():
    layer = torchao(Int8DynamicActivationInt8WeightConfig())()
    with pytest.raises(dt.AdapterError, match=r"0: torchao quantises its activations dynamically"):
        dt.attach(nn.Sequential(layer), dt.AdapterConfig(targets=["0"]))
    packed = bnb_4bit()()
    packed.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(dt.AdapterError, match="repacked the weight"):
        dt.attach(nn.Sequential(packed), dt.AdapterConfig(targets=["0"]))


def test_detach_gives_the_quantised_layer_back():
    layer = bnb_4bit()()
    before = (layer.support_avx512bf16_for_cpu, layer.weight.data.clone())
    model = nn.Sequential(layer)
    dt.attach(model, dt.AdapterConfig(rank=2))
    assert not layer.support_avx512bf16_for_cpu
    dt.detach(model)
    assert model[0] is layer
    assert (layer.support_avx512bf16_for_cpu, True) == (before[0], torch.equal(layer.weight.data, before[1]))


def nf4_llama():
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=True,
    )

    def load(folder):
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.float32)

    return load


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    model = tiny_llama(hidden_size=64, intermediate_size=128, num_key_value_heads=2)
    model.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def _quiet_loading():
    logging.getLogger("transformers").setLevel(logging.ERROR)


@pytest.mark.parametrize("use_dora", [True, False])
def test_files_of_an_nf4_model_go_both_ways_with_peft(folder, tmp_path, use_dora):
    load = nf4_llama()
    ids = torch.arange(12)[None] % 32
    theirs = get_peft_model(
        load(folder), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], use_dora=use_dora)
    )
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
            elif "magnitude" in name:
                p.mul_(1 + 0.3 * torch.rand_like(p))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = dt.load_adapter(load(folder), tmp_path / "theirs", trainable=True)
    theirs.train()
    ours.train()
    y = theirs(ids).logits
    assert error(ours(ids).logits, y) < 1e-5
    theirs(ids, labels=ids).loss.backward()
    ours(ids, labels=ids).loss.backward()
    their_gradients = {
        n.replace("base_model.model.", ""): p.grad for n, p in theirs.named_parameters() if p.grad is not None
    }
    for name, p in dt.trainable_parameters(ours).items():
        wanted = name.replace("lora_A.default", "lora_A.default.weight").replace(
            "lora_B.default", "lora_B.default.weight"
        )
        wanted = wanted.replace("magnitude.default", "lora_magnitude_vector.default.weight")
        assert error(p.grad, their_gradients[wanted]) < 1e-4, name
    dt.save_adapter(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(load(folder), tmp_path / "ours").train()
    assert error(again(ids).logits, y) < 1e-5


def test_a_quantised_model_of_transformers_trains_with_trainer_and_merges(folder, tmp_path):
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    from doratune.train import AdapterTrainerMixin

    class AdapterTrainer(AdapterTrainerMixin, Trainer):
        pass

    model = nf4_llama()(folder)
    dt.attach(model, dt.AdapterConfig(rank=4, norm_gradient="exact"))
    rows = [{"input_ids": list(range(8)), "labels": list(range(8))}] * 8
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    trainer = AdapterTrainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    ids = torch.arange(8)[None]
    model.eval()
    with torch.no_grad():
        y = model(ids).logits
        dt.merge(model, verify=True)
        assert error(model(ids).logits, y) < 1e-4
    assert not any(quantised.library_of(m) for m in model.modules())
    model.save_pretrained(tmp_path / "merged")
    plain = type(model).from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert error(plain.eval()(ids).logits, y) < 1e-4


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8"])
def test_a_model_merged_in_part_is_saved_and_read_by_transformers(folder, tmp_path, kind):
    """Its options have to say which layers are not quantised any more, and which never were."""
    from transformers import AutoModelForCausalLM

    from doratune.cli import merge
    from doratune.train.placement import quantization

    ids = torch.arange(8)[None]
    settings = quantization(kind, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / "base")
    dt.attach(model, dt.AdapterConfig(rank=4, targets=["q_proj", "v_proj"]))
    move(model)
    dt.save_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        dt.merge(model).save_pretrained(tmp_path / "merged")
        y = model(ids).logits  # bitsandbytes saves other numbers once a forward on a CPU has repacked them
        merge.run(merge.Merge(tmp_path / "adapter", tmp_path / "by-command", str(tmp_path / "base")))
        for name in ("merged", "by-command"):
            again = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
            attention = again.model.layers[0].self_attn
            assert quantised.library_of(attention.q_proj) is None
            assert quantised.library_of(attention.k_proj) is not None
            assert quantised.library_of(again.lm_head) is None
            assert error(again(ids).logits, y) < 1e-5


def test_a_step_of_an_nf4_model_takes_no_more_than_loras_and_its_outputs(folder):
    """Bytes kept for backward, and the peak: above LoRA's the layers' outputs, and while one is computed a weight."""
    load, ids = nf4_llama(), torch.arange(32)[None]
    kept, peak = {}, {}
    for method in ("lora", "dora"):
        model = dt.attach(load(folder), dt.AdapterConfig(rank=4, method=method)).train()
        move(model)
        model(ids, labels=ids).loss.backward()  # what is made once is there
        known = [*model.parameters(), *model.buffers(), ids]
        kept[method] = saved_bytes(lambda model=model: model(ids, labels=ids).loss, known)
        model.zero_grad()
        peak[method] = peak_bytes(lambda model=model: model(ids, labels=ids).loss.backward())
    bases = [layer.base_layer for layer in adapted_layers(model).values()]
    assert len(bases) == 14
    rows = sum(base.out_features for base in bases)
    more = 4 * ids.numel() * rows + 8 * rows  # outputs; g, and which rows have one
    largest = max(4 * base.in_features * base.out_features for base in bases)
    assert kept["dora"] <= kept["lora"] + more
    assert peak["dora"] <= peak["lora"] + more + largest


def test_copies_train_on_their_own():
    model = made(bnb_4bit())
    other = copy.deepcopy(model)
    x = torch.randn(4, IN)
    assert error(other(x), model(x)) < 1e-6
    with torch.no_grad():
        other[0].magnitude["default"].mul_(2)
    assert error(other(x), model(x)) > 1e-2


@every_method
@every_layer
def test_files_round_trip(make, method, tmp_path):
    model = made(make, method)
    dt.save_adapter(model, tmp_path)
    torch.manual_seed(0)
    again = dt.load_adapter(nn.Sequential(make(), nn.ReLU(inplace=True)), tmp_path)
    x = torch.randn(6, IN)
    assert error(again(x), model(x)) < 1e-6


def refused(layer, message):
    model = nn.Sequential(layer)
    with pytest.raises(dt.AdapterError, match=message):
        dt.attach(model, dt.AdapterConfig(rank=2, targets=["0"]))
    assert model[0] is layer


def test_weights_of_codes_that_nobody_serves_are_refused():
    layer = nn.Linear(IN, OUT).requires_grad_(False)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    refused(layer, "its weight holds float8_e4m3fn, .* load the model in 16 or 32 bits")
    layer = nn.Linear(IN, OUT)
    layer.quantization_scheme = object()
    refused(layer, r"compressed-tensors quantises it; load the model with CompressedTensorsConfig\(dequantize=True\)")
    del layer.weight  # as its packed layers have none
    refused(layer, "compressed-tensors quantises it")


def test_an_eight_bit_layer_that_is_not_quantised_yet_is_refused():
    refused(bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False), "not quantised yet; move the layer to its device")


def test_a_torchao_type_without_a_way_back_is_refused(monkeypatch):
    layer = torchao(Int8WeightOnlyConfig())()

    def dequantize(self):
        raise NotImplementedError

    monkeypatch.setattr(type(layer.weight), "dequantize", dequantize)
    refused(layer, "packs its weight .* for inference and has no way back to numbers")
