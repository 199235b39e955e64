"""Convolutions: every option of the layer, files both ways with PEFT where PEFT is right."""

import itertools

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import doratune as dt
from doratune.ops import reference
from helpers import elementwise_error, error, move

CONVS = {"1d": nn.Conv1d, "2d": nn.Conv2d, "3d": nn.Conv3d}
OPTIONS = {
    "plain": {},
    "no-bias": {"bias": False},
    "stride": {"stride": 2},
    "padding": {"padding": 1},
    "same": {"padding": "same"},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 1, "padding_mode": "replicate"},
    "dilation": {"dilation": 2},
    "grouped": {"groups": 2},
    "depthwise": {"groups": 4, "bias": False},
    "everything": {"groups": 2, "padding": 2, "stride": 2, "dilation": 2, "padding_mode": "circular"},
}
every_conv = pytest.mark.parametrize("conv", CONVS.values(), ids=CONVS)
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
METHODS = {"dora": {}, "lora": {"method": "lora"}, "magnitude": {"rank": 0}, "exact": {"norm_gradient": "exact"}}
every_method = pytest.mark.parametrize("method", METHODS)


def model_of(conv, relu=True, **options):
    torch.manual_seed(0)
    layer = conv(4, 8, 3, **options)
    return nn.Sequential(layer, nn.ReLU(inplace=True)) if relu else nn.Sequential(layer)


def images(conv):
    dimensions = 1 + list(CONVS.values()).index(conv)
    return torch.randn(2, 4, *[7] * dimensions, generator=torch.Generator().manual_seed(0))


@every_method
@every_option
@every_conv
def test_output_gradients_and_merge_are_the_references(conv, options, method):
    model = model_of(conv, **options)
    x = images(conv).requires_grad_()
    base = model(x)
    dt.attach(model, dt.AdapterConfig(**{"rank": 3, "targets": ["0"]} | METHODS[method]))
    assert torch.equal(model(x), base)
    move(model)
    layer = model[0]
    W = layer.base_layer.weight
    parts = {
        p: getattr(layer, p)["default"] for p in ("lora_A", "lora_B", "magnitude") if "default" in getattr(layer, p)
    }
    leaves = {part: p.detach().double().requires_grad_() for part, p in parts.items()}
    flat = W.detach().double().flatten(1)
    A = leaves.get("lora_A", torch.zeros(1, flat.shape[1]).double())
    B = leaves.get("lora_B", torch.zeros(8, 1).double())
    adapter = layer.adapters["default"]
    if "magnitude" in leaves:
        wide = reference.dora_weight(flat, A, B, leaves["magnitude"], adapter.scale, adapter.config.norm_gradient)
        g = reference.dora_scale(flat, A, B, leaves["magnitude"], adapter.scale)
        assert elementwise_error(layer.row_scale("default"), g) < 2e-6
    else:
        wide = reference.lora_weight(flat, A, B, adapter.scale)
    wide_x = x.detach().double().requires_grad_()
    bias = None if layer.bias is None else layer.bias.detach().double()
    expected = torch.relu(layer.base_layer._conv_forward(wide_x, wide.view(W.shape), bias))
    y = model(x)
    assert error(y, expected) < 1e-5
    x.grad = None
    y.square().sum().backward()
    expected.square().sum().backward()
    assert error(x.grad, wide_x.grad) < 1e-5
    for part, leaf in leaves.items():
        assert error(parts[part].grad, leaf.grad) < 1e-5, part
    with torch.no_grad():
        assert error(model(x[0]), y[0]) < 1e-5
        model.eval()
        assert error(model(x), y) < 1e-5
        dt.merge(model, verify=True)
        assert type(model[0]) is conv
        assert error(model(x), y) < 1e-5


EXCHANGED = {k: v for k, v in OPTIONS.items() if "groups" not in v and "dilation" not in v and "padding_mode" not in v}


@pytest.mark.parametrize("use_dora", [True, False])
@pytest.mark.parametrize("options", EXCHANGED.values(), ids=EXCHANGED)
@every_conv
def test_files_go_both_ways_with_peft(conv, options, use_dora, tmp_path):
    theirs = get_peft_model(
        model_of(conv, **options), LoraConfig(r=3, lora_alpha=6, target_modules=["0"], use_dora=use_dora)
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.2, generator=generator)
            elif "magnitude" in name:
                p.mul_(1 + 0.3 * torch.rand(p.shape, generator=generator))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = dt.load_adapter(model_of(conv, **options), tmp_path / "theirs", trainable=True)
    x = images(conv)
    y = theirs(x)
    assert error(ours(x), y) < 1e-5
    y.square().sum().backward()
    ours(x).square().sum().backward()
    grads = {
        n.split(".")[-3] if "weight" in n else n: p.grad for n, p in theirs.named_parameters() if p.grad is not None
    }
    layer = ours[0]
    assert error(layer.lora_A["default"].grad, grads["lora_A"].flatten(1)) < 1e-5
    assert error(layer.lora_B["default"].grad, grads["lora_B"].flatten(1)) < 1e-5
    if use_dora:
        assert error(layer.magnitude["default"].grad, grads["lora_magnitude_vector"].flatten()) < 1e-5
    dt.save_adapter(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(model_of(conv, **options), tmp_path / "ours")
    assert error(again(x), y) < 1e-5


@every_conv
def test_magnitudes_alone_come_back(conv, tmp_path):
    model = move(dt.attach(model_of(conv), dt.AdapterConfig(rank=0, targets=["0"])))
    dt.save_adapter(model, tmp_path)
    again = dt.load_adapter(model_of(conv), tmp_path)
    assert again[0].adapters["default"].rank == 0
    y = model(images(conv))
    assert torch.equal(again(images(conv)), y)
    assert error(PeftModel.from_pretrained(model_of(conv), tmp_path)(images(conv)), y) < 1e-5


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_a_grouped_file_of_peft_is_refused_with_the_reason(tmp_path):
    theirs = get_peft_model(model_of(nn.Conv2d, groups=2), LoraConfig(r=4, target_modules=["0"], use_dora=True))
    theirs.save_pretrained(tmp_path)
    model = model_of(nn.Conv2d, groups=2)
    with pytest.raises(dt.AdapterError, match="grouped convolution"):
        dt.load_adapter(model, tmp_path)
    assert type(model[0]) is nn.Conv2d


@pytest.mark.parametrize("hooks", [None, "identity", "cpu"])
@every_conv
def test_an_output_overwritten_in_place(conv, hooks):
    model = model_of(conv, relu=False)
    dt.attach(model, dt.AdapterConfig(rank=3, targets=["0"]))
    move(model)
    contexts = {
        None: torch.enable_grad(),
        "identity": torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
        "cpu": torch.autograd.graph.save_on_cpu(),
    }
    found = []
    for overwrite in (True, False):
        model.zero_grad()
        with contexts[hooks]:
            y = model(images(conv))
            y = y.mul_(3).sin_() if overwrite else (y * 3).sin()
        y.sum().backward()
        found.append([p.grad.clone() for p in dt.trainable_parameters(model).values()])
    for a, b in itertools.zip_longest(*found):
        assert error(a, b) < 1e-5


class Standardised(nn.Conv2d):
    """As timm's: convolves with another weight than it keeps."""

    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


def test_a_convolution_with_a_forward_of_its_own_is_refused():
    with pytest.raises(dt.AdapterError, match="Standardised has a forward of its own"):
        dt.attach(model_of(Standardised), dt.AdapterConfig(targets=["0"]))


def test_channels_last_stays_channels_last():
    model = model_of(nn.Conv2d, padding=1).to(memory_format=torch.channels_last)
    x = images(nn.Conv2d).contiguous(memory_format=torch.channels_last)
    dt.attach(model, dt.AdapterConfig(rank=3, targets=["0"]))
    move(model)
    x.requires_grad_(True)
    y = model(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert error(y, model(x.contiguous())) < 1e-5
    y.square().sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo, of any Function
def test_compile_and_autocast():
    model = model_of(nn.Conv2d)
    dt.attach(model, dt.AdapterConfig(rank=3, targets=["0"]))
    move(model)
    x = images(nn.Conv2d)
    y = model(x)
    assert error(torch.compile(model, fullgraph=True)(x), y) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert error(model(x), y) < 5e-2
