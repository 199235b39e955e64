"""An accelerated PEFT layer computes what PEFT computes: outputs, gradients, dtypes, and the same random numbers."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

import doratune as dt
from helpers import error
from interop.wrapped import assert_same_step, evaluated, one, step, the_layer, trained, twin

TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Distances relative to the norm: rounding of the dtype, whose last digit is 6e-8, 4e-3, 5e-4."""


class ScaledEmbedding(nn.Embedding):
    """As in Gemma."""

    embed_scale = 3.0

    def forward(self, x):
        return super().forward(x) * self.embed_scale


def tokens():
    return torch.randint(17, (3, 40))


KINDS = {
    "linear": (lambda: nn.Linear(24, 40), lambda: torch.randn(3, 20, 24)),
    "linear-no-bias": (lambda: nn.Linear(24, 40, bias=False), lambda: torch.randn(3, 20, 24)),
    "Conv1D": (lambda: Conv1D(40, 24), lambda: torch.randn(3, 20, 24)),
    "embedding": (lambda: nn.Embedding(17, 24, padding_idx=3), tokens),
    "scaled-embedding": (lambda: ScaledEmbedding(17, 24), tokens),
    "conv1d": (lambda: nn.Conv1d(6, 10, 3, padding=1, stride=2), lambda: torch.randn(2, 6, 19)),
    "conv2d": (lambda: nn.Conv2d(6, 10, 3, padding=1), lambda: torch.randn(2, 6, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(6, 10, (1, 3, 2), bias=False), lambda: torch.randn(2, 6, 4, 5, 4)),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def pair(kind, dtype=torch.float32, adapter_dtype=True, **options):
    """PEFT's model, its accelerated twin, and an input."""
    make, inputs = KINDS[kind]
    theirs = one(make(), dtype, adapter_dtype, fan_in_fan_out=kind == "Conv1D", **options)
    x = inputs()
    return theirs, twin(theirs), x.to(dtype) if x.is_floating_point() else x


@every_kind
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("adapter_dtype", [True, False], ids=["float32-adapters", "adapters-as-base"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_steps_are_pefts(kind, dtype, adapter_dtype, dropout):
    theirs, ours, x = pair(kind, dtype, adapter_dtype, lora_dropout=dropout)
    if "conv" in kind and dtype == torch.bfloat16 and adapter_dtype and dropout:
        with pytest.raises(RuntimeError, match="should be the same"):
            theirs(x)  # PEFT convolves a float32 input with a bfloat16 weight
        assert all(torch.isfinite(t).all() for t in step(ours, x).values())
        return
    # With adapters in bfloat16 PEFT takes the norm in bfloat16, too.
    assert_same_step(step(ours, x), step(theirs, x), TOLERANCES[dtype] * (1 if adapter_dtype else 2))


@every_kind
def test_layers_that_peft_cannot_drop_out_of_are_served(kind):
    _, ours, x = pair(kind, torch.bfloat16, lora_dropout=0.1)
    assert ours(x).dtype == torch.bfloat16


def test_float16():
    theirs, ours, x = pair("linear", torch.float16)
    assert_same_step(step(ours, x), step(theirs, x), TOLERANCES[torch.float16])


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_under_autocast(dropout):
    theirs, ours, x = pair("linear", lora_dropout=dropout)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_step(step(ours, x), step(theirs, x), TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(24,), (0, 24), (2, 0, 24), (1, 24)], ids=str)
def test_inputs_of_any_shape(shape, dropout):
    theirs, ours, _ = pair("linear", lora_dropout=dropout)
    x = torch.randn(shape)
    assert_same_step(step(ours, x), step(theirs, x), 1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_an_output_that_is_overwritten(dropout):
    theirs, ours, x = pair("linear", lora_dropout=dropout)
    for model in (theirs, ours):
        model.register_forward_hook(lambda module, args, y: torch.relu_(y) ** 2)
    assert_same_step(trained(ours, x), trained(theirs, x), 1e-5)


def test_dropout_of_the_adapter_only():
    theirs, _, x = pair("linear", lora_dropout=0.5)
    ours = twin(theirs, dropout="adapter")
    found = step(ours, x)
    assert error(found["y"], step(theirs, x)["y"]) > 0.05
    # The base's path is whole: what remains of an adapter without a direction is g times the base.
    layer = the_layer(ours)
    nn.init.zeros_(layer.lora_B["default"].weight)
    ours.train()
    assert error(ours(x), evaluated(ours, x)) < 1e-6


def test_the_mode_of_the_dropout_module_counts():
    theirs, ours, x = pair("linear", lora_dropout=0.5)
    for model in (theirs, ours):
        model.train()
        the_layer(model).lora_dropout["default"].eval()
    assert error(ours(x), theirs(x)) < 1e-6


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_bias_that_trains(bias, dropout):
    theirs, ours, x = pair("linear", bias=bias, lora_dropout=dropout)
    expected, found = step(theirs, x), step(ours, x)
    assert any("base_layer.bias" in name for name in expected)
    assert_same_step(found, expected, 1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_base_weight_that_trains(dropout):
    theirs, ours, x = pair("linear", lora_dropout=dropout)
    for model in (theirs, ours):
        the_layer(model).base_layer.weight.requires_grad_(True)
    assert_same_step(step(ours, x), step(theirs, x), 1e-6)


def test_rank_stabilised_scaling_and_changed_scales():
    theirs, ours, x = pair("linear", use_rslora=True)
    assert error(evaluated(ours, x), evaluated(theirs, x)) < 1e-6
    for scale in (0.3, 2.0):
        for model in (theirs, ours):
            the_layer(model).set_scale("default", scale)
        assert error(evaluated(ours, x), evaluated(theirs, x)) < 1e-6


@every_kind
def test_evaluation_remembers_the_scale_and_notices_changes(kind, monkeypatch):
    theirs, ours, x = pair(kind)
    evaluated(ours, x)
    calls = []
    from doratune.ops import row_norm

    plain = row_norm.row_scale
    monkeypatch.setattr(row_norm, "row_scale", lambda *args: calls.append(1) or plain(*args))
    evaluated(ours, x), evaluated(ours, x)
    assert not calls
    for part in [n for n, _ in theirs.named_parameters() if "lora_" in n]:
        with torch.no_grad():
            for model in (theirs, ours):
                model.get_parameter(part).mul_(1.5)
        assert error(evaluated(ours, x), evaluated(theirs, x)) < 1e-6, part
    with torch.no_grad():
        for model in (theirs, ours):
            the_layer(model).base_layer.weight.mul_(0.5).add_(0.1)
    assert error(evaluated(ours, x), evaluated(theirs, x)) < 1e-6
    state = {n: t + 0.1 for n, t in theirs.state_dict().items()}
    for model in (theirs, ours):
        model.load_state_dict(state, assign=True)
    assert error(evaluated(ours, x), evaluated(theirs, x)) < 1e-6


def test_a_magnitude_that_a_file_sets_to_zero_keeps_its_gradient():
    theirs, ours, x = pair("linear")
    step(ours, x)
    for model in (theirs, ours):
        state = model.state_dict()
        state["base_model.model.layer.lora_magnitude_vector.default.weight"][:3] = 0
        model.load_state_dict(state)
    assert_same_step(step(ours, x), step(theirs, x), 1e-6)


def test_near_cancellation_the_dense_norm_is_taken():
    theirs = one(nn.Linear(24, 40), r=24, lora_alpha=24)
    layer = the_layer(theirs)
    with torch.no_grad():
        nn.init.eye_(layer.lora_A["default"].weight)
        layer.lora_B["default"].weight.copy_(-0.99 * layer.base_layer.weight)
    x = torch.randn(7, 24)
    exact, ours = copy.deepcopy(theirs).double(), twin(theirs)
    assert the_layer(ours)._doratune.memories["default"].dense_norm
    assert error(evaluated(ours, x), evaluated(exact, x.double())) < 3e-5


# PEFT's own errors


@pytest.mark.parametrize("steps", [1, 5])
def test_rows_of_zeros_train_and_merge(steps):
    base = nn.Linear(24, 40)
    with torch.no_grad():
        base.weight[5:9] = 0
    theirs = one(base)
    layer = the_layer(theirs)
    with torch.no_grad():
        layer.lora_B["default"].weight.zero_()
        layer.lora_magnitude_vector["default"].weight.copy_(base.weight.norm(dim=1))
    x = torch.randn(50, 24)
    assert theirs(x).isnan().any()
    ours = twin(theirs)
    assert error(ours(x), base(x)) < 1e-6
    optimiser = torch.optim.Adam((p for p in ours.parameters() if p.requires_grad), lr=1e-2)
    target = torch.randn(50, 40)
    losses = []
    for _ in range(steps):
        loss = (ours(x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    expected = evaluated(ours, x)
    assert error(expected[:, 5:9], base(x)[:, 5:9]) > 1e-2
    # The file says what was trained: PEFT alone now computes the same function, and so does the merged layer.
    plain = copy.deepcopy(ours)
    dt.peft.accelerate(plain).undo()
    assert error(evaluated(plain, x), expected) < 1e-6
    assert error(evaluated(ours.merge_and_unload(), x), expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_of_zeros_that_a_magnitude_of_zero_silences_stay_silent(dtype):
    """As in files written here, of rows of zeros that were not trained."""
    base = nn.Linear(24, 40, bias=False)
    with torch.no_grad():
        base.weight[5:9] = 0
    theirs = one(base).to(dtype)
    with torch.no_grad():
        the_layer(theirs).lora_magnitude_vector["default"].weight[5:9] = 0
    ours, x = twin(theirs), torch.randn(50, 24).to(dtype)
    assert torch.equal(
        the_layer(ours).lora_magnitude_vector["default"].weight,
        the_layer(theirs).lora_magnitude_vector["default"].weight,
    )
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    assert evaluated(theirs, x)[:, 5:9].count_nonzero() == 0
    assert evaluated(ours, x)[:, 5:9].float().abs().max() < 1e-25
    assert error(evaluated(ours, x), evaluated(theirs, x)) < tolerance
    assert_same_step(step(ours, x), step(theirs, x), tolerance)
    for model in (theirs, ours):
        with torch.no_grad():
            the_layer(model).lora_magnitude_vector["default"].weight[5] = 0.5
    assert error(evaluated(ours, x), evaluated(theirs, x)) < tolerance


@pytest.mark.parametrize("options", [{"dilation": 2}, {"padding": 1, "padding_mode": "reflect"}], ids=str)
def test_convolutions_that_peft_gets_wrong_equal_their_merged_selves(options):
    theirs = one(nn.Conv2d(6, 10, 3, **options))
    x = torch.randn(2, 6, 9, 9)
    expected = evaluated(copy.deepcopy(theirs).merge_and_unload(), x)
    assert error(evaluated(twin(theirs), x), expected) < 1e-5


# What stays PEFT's


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def left(layer, x, **options):
    """A layer that doratune does not serve: PEFT's output, bit for bit, and the reason."""
    theirs = one(layer, **options)
    ours = copy.deepcopy(theirs)
    (found,) = dt.peft.accelerate(ours).report.layers
    assert not found.served
    assert torch.equal(evaluated(ours, x), evaluated(theirs, x))
    return found.reason


def test_layers_that_stay_pefts():
    x = torch.randn(4, 24)
    assert left(nn.Linear(24, 40), x, use_dora=False) == "plain LoRA"
    assert "OwnForward has a forward of its own" in left(OwnForward(24, 40), x)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LoRA adapter added to ConvNd layer with groups")
        assert "grouped" in left(nn.Conv2d(8, 12, 3, groups=2), torch.randn(2, 8, 5, 5), r=8)
    assert "max_norm" in left(nn.Embedding(17, 24, max_norm=1e6), tokens())


def test_hooks_on_parts_are_called():
    theirs, ours, x = pair("linear")
    seen = []
    hook = the_layer(ours).lora_A["default"].register_forward_hook(lambda *args: seen.append(1))
    assert torch.equal(evaluated(ours, x), evaluated(theirs, x))
    assert seen
    hook.remove()
    seen.clear()
    evaluated(ours, x)
    assert not seen


def test_hooks_of_the_base_see_what_they_see_in_peft():
    theirs, ours, x = pair("linear", lora_dropout=0.5)
    seen = []
    for model in (theirs, ours):
        the_layer(model).base_layer.register_forward_hook(lambda module, args, y: seen.append(args[0]) or y * 1.5)
    assert_same_step(step(ours, x), step(theirs, x), 1e-6)
    assert len(seen) == 4
    assert all(torch.equal(found, x) for found in seen)
    assert "has hooks" in dt.peft.report(ours.train()).left[0].reason
    assert dt.peft.report(ours.eval()).served


def test_parameters_in_pieces_stay_pefts():
    _, ours, _ = pair("linear")
    the_layer(ours).lora_A["default"].weight.ds_id = 3
    assert "ZeRO-3" in dt.peft.report(ours).left[0].reason


def test_replaced_parts_are_called():
    theirs, ours, x = pair("linear")
    layer = the_layer(ours)
    layer.lora_A["default"] = nn.Sequential(layer.lora_A["default"])
    layer.lora_A["default"].weight = layer.lora_A["default"][0].weight
    assert dt.peft.report(ours).layers[0].reason == "lora_A or lora_B is a Sequential"
    assert torch.equal(evaluated(ours, x), evaluated(theirs, x))


def test_several_active_adapters_and_mixed_batches():
    theirs, ours, x = pair("linear")
    config = LoraConfig(r=4, use_dora=False, target_modules=["layer"], init_lora_weights=False)
    for model in (theirs, ours):
        torch.manual_seed(3)
        model.add_adapter("other", config)
        model.base_model.set_adapter(["default", "other"])
    assert "several adapters" in dt.peft.report(ours).layers[0].reason
    assert torch.equal(evaluated(ours, x), evaluated(theirs, x))
    for model in (theirs, ours):
        model.set_adapter("default")
    mixed = {"adapter_names": ["other", "__base__", "other"]}
    with torch.no_grad():
        assert torch.equal(ours.eval()(x, **mixed), theirs.eval()(x, **mixed))
    with pytest.raises(ValueError, match="DoRA"):
        ours(x, adapter_names=["default", "__base__", "other"])
