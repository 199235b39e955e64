"""Accelerated PEFT layers under what people run them with: trainers, quantised bases, checkpointing, torch.compile."""

import copy
import warnings

import bitsandbytes as bnb
import datasets
import pytest
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from peft import LoraConfig, get_peft_model
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import doratune as dt
from doratune.interop.peft.service import REPACKING
from helpers import enable_checkpointing, error, ids
from interop.wrapped import (
    One,
    assert_same_step,
    evaluated,
    one,
    peft_llama,
    peft_model,
    step,
    the_layer,
    trained,
    twin,
)
from train.tiny import llama, tokenizer, words

WIDTH = 64


@pytest.fixture(autouse=True)
def _uninstall():
    yield
    dt.peft.uninstall()


def linear():
    torch.manual_seed(0)
    return nn.Linear(WIDTH, 48)


# Quantised bases


def nf4():
    plain = linear()
    layer = bnb.nn.Linear4bit(WIDTH, 48, quant_type="nf4", compute_dtype=torch.float32)
    layer.weight = bnb.nn.Params4bit(plain.weight.data.clone(), requires_grad=False, quant_type="nf4")
    layer.bias = plain.bias
    return layer.to("cpu")


def int8():
    plain = linear()
    layer = bnb.nn.Linear8bitLt(WIDTH, 48, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(plain.weight.data.clone(), requires_grad=False)
    layer.bias = plain.bias
    return layer.to("cpu")


def hqq():
    settings = BaseQuantizeConfig(nbits=4, group_size=64)
    return HQQLinear(linear(), settings, compute_dtype=torch.float32, device="cpu")


def torchao():
    model = nn.Sequential(linear())
    quantize_(model, Int8WeightOnlyConfig())
    return model[0]


QUANTISED = {
    "nf4": (nf4, "is_loaded_in_4bit"),
    "int8": (int8, "is_loaded_in_8bit"),
    "hqq": (hqq, ""),
    "torchao": (torchao, ""),
}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("base", QUANTISED)
def test_quantised_bases(base, dropout):
    make, flag = QUANTISED[base]

    def model():
        whole = One(make())
        whole.__dict__[flag] = True
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*without `get_apply_tensor_subclass`")
            return peft_model(whole, target_modules=["layer"], lora_dropout=dropout)

    ours = model()
    switch = the_layer(ours).base_layer.__dict__.get(REPACKING)
    handle = dt.peft.accelerate(ours)
    (report,) = handle.report.layers
    assert report.served, report
    assert "quantised" in report.reason
    # Or else bitsandbytes would repack the weight for good in the first evaluation on some processors.
    assert the_layer(ours).base_layer.__dict__.get(REPACKING) is (False if base == "nf4" else switch)
    x = torch.randn(30, WIDTH)
    # bitsandbytes rounds the input to 8 bits for its own product; PEFT's second one, for dropout, takes it as it is.
    tolerance = 2e-2 if base == "int8" and dropout else 1e-6
    assert_same_step(trained(ours, x), trained(repacked_never(model()), x), tolerance)
    # A PEFT model of its own for evaluation: with 8 bits PEFT loses the weight's scales on a CPU after one forward.
    assert error(evaluated(ours, x), evaluated(repacked_never(model()), x)) < 1e-5
    handle.undo()
    assert the_layer(ours).base_layer.__dict__.get(REPACKING) is switch


def repacked_never(model):
    if REPACKING in the_layer(model).base_layer.__dict__:
        setattr(the_layer(model).base_layer, REPACKING, False)
    return model


@pytest.fixture
def cuda_autocast():
    """What PEFT's quantised layers ask for; on a machine without a GPU nothing else follows from it."""
    torch.set_autocast_enabled("cuda", True)
    yield
    torch.set_autocast_enabled("cuda", False)


@pytest.mark.usefixtures("cuda_autocast")
def test_the_dtype_of_a_quantised_layer_under_autocast():
    whole = One(nf4())
    whole.is_loaded_in_4bit = True
    theirs = peft_model(whole, target_modules=["layer"])
    ours = copy.deepcopy(theirs)
    repacked_never(theirs)
    dt.peft.accelerate(ours)
    x = torch.randn(3, WIDTH)
    assert ours(x).dtype == theirs(x).dtype == torch.float32
    half = x.bfloat16()
    for model in (theirs, ours):
        for part in (the_layer(model).lora_A, the_layer(model).lora_B):
            part.to(torch.bfloat16)
    assert ours(half).dtype == theirs(half).dtype == torch.float32


# Loops


def settings(folder, cls, **more):
    options = {
        "output_dir": str(folder),
        "max_steps": 5,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 5,
        "use_cpu": True,
        "save_strategy": "no",
        "bf16": False,
    }
    return cls(**{**options, **more})


DORA = LoraConfig(
    r=4, lora_alpha=8, use_dora=True, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM"
)


def trained_by_sft(folder, **more):
    """What a script does that knows nothing of doratune."""
    from trl import SFTConfig, SFTTrainer

    text = datasets.Dataset.from_dict({"text": [words(12, seed) for seed in range(32)]})
    args = settings(folder, SFTConfig, max_length=32, **more)
    return SFTTrainer(llama(), args, train_dataset=text, processing_class=tokenizer(), peft_config=copy.copy(DORA))


def trained_by_trainer(folder, **more):
    from transformers import Trainer, TrainingArguments

    rows = torch.randint(0, 256, (32, 16), generator=torch.Generator().manual_seed(3)).tolist()
    data = datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})
    torch.manual_seed(2)
    model = get_peft_model(llama(), copy.copy(DORA))
    return Trainer(model, settings(folder, TrainingArguments, **more), train_dataset=data)


def trained_by_dpo(folder, **more):
    """With the model whose adapters are disabled as the reference."""
    from trl import DPOConfig, DPOTrainer

    columns = {name: [words(6, 3 * seed + i) for seed in range(32)] for i, name in enumerate(("chosen", "rejected"))}
    pairs = datasets.Dataset.from_dict({"prompt": [f"{words(4, seed)} " for seed in range(32)], **columns})
    args = settings(folder, DPOConfig, max_length=32, beta=1.0, **more)
    return DPOTrainer(
        llama(), args=args, train_dataset=pairs, processing_class=tokenizer(), peft_config=copy.copy(DORA)
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_.*able. is deprecated:FutureWarning")  # TRL's own calls
@pytest.mark.parametrize("more", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("make", [trained_by_sft, trained_by_dpo, trained_by_trainer])
def test_trainers_lose_the_same(make, more, tmp_path):
    theirs = make(tmp_path / "theirs", **more)
    theirs.train()
    dt.peft.install()
    ours = make(tmp_path / "ours", **more)
    ours.train()
    report = dt.peft.report(ours.model)
    assert len(report.served) == 14
    assert all(getattr(m, "_doratune", None) for _, m in ours.model.named_modules() if hasattr(m, "lora_variant"))
    expected = losses(theirs)
    assert len(expected) == 5
    assert losses(ours) == pytest.approx(expected, rel=1e-4)
    names = [n for n, p in theirs.model.named_parameters() if p.requires_grad]
    assert any("lora_magnitude_vector" in n for n in names)
    for name in names:
        assert error(ours.model.get_parameter(name), theirs.model.get_parameter(name)) < 1e-2, name
        if "lora_B" in name:
            assert ours.model.get_parameter(name).abs().max() > 1e-3


# Checkpointing and compiling


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "other"])
def test_gradient_checkpointing(reentrant):
    theirs = peft_llama(lora_dropout=0.1)
    ours = twin(theirs)
    tokens = ids(0, (2, 9), vocabulary=32)
    expected = step(theirs, tokens)
    enable_checkpointing(ours.base_model.model, reentrant)
    ours.enable_input_require_grads()
    assert_same_step(step(ours, tokens), expected, 1e-5)


def test_compiled_layers_with_scales_of_their_own():
    """torch.compile would take a float that differs between layers for a symbol."""
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))
    theirs = peft_model(base, target_modules=["0", "1", "2", "3"])
    for number, layer in enumerate(m for m in theirs.modules() if hasattr(m, "lora_variant")):
        layer.set_scale("default", 1 + number / 10)
    ours, x = twin(theirs), torch.randn(5, WIDTH)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager")
    found = {n.removeprefix("_orig_mod."): t for n, t in step(compiled, x).items()}
    assert_same_step(found, step(theirs, x), 1e-5)


def test_a_layer_compiles_into_one_graph():
    theirs = one(linear())
    ours = twin(theirs)
    x = torch.randn(5, WIDTH)
    torch._dynamo.reset()
    compiled = torch.compile(the_layer(ours), backend="aot_eager", fullgraph=True)
    assert error(compiled(x), the_layer(theirs)(x)) < 1e-6
    with torch.no_grad():
        the_layer(ours).lora_B["default"].weight.mul_(2)
        the_layer(theirs).lora_B["default"].weight.mul_(2)
    assert error(compiled(x), the_layer(theirs)(x)) < 1e-6


def test_a_model_that_is_compiled_before_its_first_call_under_install():
    theirs = one(linear())
    expected = evaluated(theirs, torch.ones(2, WIDTH))
    dt.peft.install()
    torch._dynamo.reset()
    ours = copy.deepcopy(theirs)
    compiled = torch.compile(the_layer(ours), backend="aot_eager")
    with torch.no_grad():
        assert error(compiled.eval()(torch.ones(2, WIDTH)), expected) < 1e-6
