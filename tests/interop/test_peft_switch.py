"""accelerate, undo, install and uninstall: everything PEFT does with a model works as before, and all is given back."""

import copy
import io
import json
import subprocess
import sys
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import layer as peft_layers
from torch import nn

import doratune as dt
from doratune.interop.peft.service import State
from helpers import assert_same, error, ids, snapshot, tiny_llama
from interop.wrapped import assert_same_step, evaluated, move, one, peft_llama, step, the_layer, twin

CLASSES = (peft_layers.Linear, peft_layers.Embedding, peft_layers._ConvNd)
FORWARDS = [cls.forward for cls in CLASSES]
DORA = {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": ["q_proj", "up_proj"]}


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    """Every test begins and ends with PEFT's own classes, whatever models live on."""
    yield
    dt.peft.uninstall()
    for layer in list(State.served):
        dt.peft.accelerate(layer).undo()
    assert [cls.forward for cls in CLASSES] == FORWARDS


def tokens(seed=0):
    return ids(seed, (2, 9), vocabulary=32)


def counted(monkeypatch):
    """Calls of PEFT's own DoRA arithmetic."""
    from peft.tuners.lora.dora import DoraLinearLayer

    calls = []
    plain = DoraLinearLayer.forward
    monkeypatch.setattr(DoraLinearLayer, "forward", lambda self, *a, **k: calls.append(1) or plain(self, *a, **k))
    return calls


# One model


def test_a_step_of_a_language_model(monkeypatch):
    theirs = peft_llama(lora_dropout=0.1)
    expected = step(theirs, tokens())
    calls = counted(monkeypatch)
    ours = twin(theirs)
    assert_same_step(step(ours, tokens()), expected, 1e-5)
    assert not calls


def test_undo_gives_everything_back():
    model = peft_llama()
    before, attributes = snapshot(model), [sorted(m.__dict__) for m in model.modules()]
    expected = step(model, tokens())
    handle = dt.peft.accelerate(model)
    assert [cls.forward for cls in CLASSES] != FORWARDS
    evaluated(model, tokens())
    handle.undo()
    model.train()
    before["modules"] = [(*m[:3], True) for m in before["modules"]]
    assert_same(before, snapshot(model))
    assert [sorted(m.__dict__) for m in model.modules()] == attributes
    assert [cls.forward for cls in CLASSES] == FORWARDS
    found = step(model, tokens())
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    handle.undo()


def test_accelerating_twice_is_accelerating_once():
    theirs = peft_llama()
    ours = twin(theirs)
    first, second = dt.peft.accelerate(ours), dt.peft.accelerate(ours)
    assert_same_step(step(ours, tokens()), step(theirs, tokens()), 1e-5)
    first.undo()
    assert not second.report.served
    assert torch.equal(evaluated(ours, tokens()), evaluated(theirs, tokens()))


def test_another_model_stays_pefts(monkeypatch):
    theirs = peft_llama()
    ours = twin(theirs)
    calls = counted(monkeypatch)
    evaluated(ours, tokens())
    assert not calls
    evaluated(theirs, tokens())
    assert calls
    assert {layer.reason for layer in dt.peft.report(theirs).layers} == {"not accelerated"}


def test_files_are_the_same(tmp_path):
    theirs = peft_llama()
    ours = twin(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    weights, config = "adapter_model.safetensors", "adapter_config.json"
    assert (tmp_path / "ours" / weights).read_bytes() == (tmp_path / "theirs" / weights).read_bytes()
    configs = [json.loads((tmp_path / who / config).read_text()) for who in ("ours", "theirs")]
    for found in configs:
        found["target_modules"].sort()  # a set, until it is written
    assert configs[0] == configs[1]
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours")
    expected = evaluated(theirs, tokens())
    assert error(evaluated(again, tokens()), expected) < 1e-6
    dt.peft.accelerate(again)
    assert error(evaluated(again, tokens()), expected) < 1e-5


def test_a_file_loaded_into_an_accelerated_model(tmp_path):
    theirs = peft_llama()
    ours = twin(theirs)
    evaluated(ours, tokens())
    move(theirs, 0.5, seed=9).save_pretrained(tmp_path)
    ours.delete_adapter("default")
    ours.load_adapter(tmp_path, "default")
    ours.set_adapter("default")
    assert {layer.served for layer in dt.peft.report(ours).layers} == {True}
    assert error(evaluated(ours, tokens()), evaluated(theirs, tokens())) < 1e-5


def test_merging():
    theirs = peft_llama()
    ours = twin(theirs)
    expected = evaluated(theirs, tokens())
    evaluated(ours, tokens())
    ours.merge_adapter()
    assert {layer.reason for layer in dt.peft.report(ours).layers} == {"an adapter is merged"}
    assert error(evaluated(ours, tokens()), expected) < 1e-5
    ours.unmerge_adapter()
    assert len(dt.peft.report(ours).served) == 14
    assert error(evaluated(ours, tokens()), expected) < 1e-5
    merged = ours.merge_and_unload()
    assert error(evaluated(merged, tokens()), expected) < 1e-5
    assert not any(hasattr(m, "_doratune") for m in merged.modules())


def test_switching_disabling_adding_and_deleting_adapters():
    theirs = peft_llama()
    ours = twin(theirs)
    plain = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    for model in (theirs, ours):
        torch.manual_seed(4)
        model.add_adapter("other", plain)
        model.add_adapter("second", LoraConfig(**{**DORA, "r": 3}))
        move(model, 0.1, seed=5)

    def same():
        assert error(evaluated(ours, tokens()), evaluated(theirs, tokens())) < 1e-5
        assert_same_step(step(ours, tokens()), step(theirs, tokens()), 1e-5)

    same()
    base = evaluated(tiny_llama(), tokens())
    outputs = [evaluated(ours, tokens()), base]
    for name, served in (("other", 0), ("second", 4), ("default", 14)):
        for model in (theirs, ours):
            model.set_adapter(name)
        assert len(dt.peft.report(ours).served) == served
        same()
        outputs.append(evaluated(ours, tokens()))
    assert torch.equal(outputs[0], outputs[-1])
    assert min(error(a, b) for i, a in enumerate(outputs[:-1]) for b in outputs[:i]) > 1e-3
    with ours.disable_adapter():
        assert torch.equal(evaluated(ours, tokens()), base)
        assert {layer.reason for layer in dt.peft.report(ours).layers} == {"the adapters are disabled"}
    for model in (theirs, ours):
        model.delete_adapter("second")
    same()


def test_copies_and_pickles():
    theirs = peft_llama()
    ours = twin(theirs)
    expected = evaluated(ours, tokens())
    copied = copy.deepcopy(ours)
    assert len(dt.peft.report(copied).served) == 14
    layers = [(m, c) for m, c in zip(ours.modules(), copied.modules(), strict=True) if hasattr(m, "_doratune")]
    assert all(m._doratune is not c._doratune and not c._doratune.memories for m, c in layers)
    move(copied, seed=3)
    assert error(evaluated(ours, tokens()), expected) == 0
    assert error(evaluated(copied, tokens()), expected) > 1e-2
    dt.peft.accelerate(ours).undo()
    assert len(dt.peft.report(copied).served) == 14
    dt.peft.accelerate(copied).undo()
    ours = twin(theirs)
    file = io.BytesIO()
    torch.save(ours, file)
    assert b"doratune.interop" not in file.getvalue()
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert not dt.peft.report(loaded).served
    assert torch.equal(evaluated(loaded, tokens()), evaluated(theirs, tokens()))


def test_nothing_of_the_size_of_the_base_is_kept():
    ours = twin(one(nn.Linear(64, 48)))
    evaluated(ours, torch.randn(3, 64))
    cache = the_layer(ours)._doratune.memories["default"].cache
    remembered = [*cache._base, *cache._evaluation.value, cache._scale.value]
    kept = list({t.data_ptr(): t.numel() for t in remembered if isinstance(t, torch.Tensor)}.values())
    assert sorted(kept) == [48, 48, 4 * 48, 4 * 64]  # |W|^2 and g, g s B and A


# The process


def test_install_serves_models_made_later(monkeypatch):
    expected = step(peft_llama(), tokens())
    calls = counted(monkeypatch)
    dt.peft.install()
    dt.peft.install()
    later = peft_llama()
    assert len(dt.peft.report(later).served) == 14
    assert_same_step(step(later, tokens()), expected, 1e-5)
    assert not calls
    dt.peft.uninstall()
    assert not any(hasattr(m, "_doratune") for m in later.modules())
    assert [cls.forward for cls in CLASSES] == FORWARDS
    found = step(later, tokens())
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    assert calls
    dt.peft.uninstall()


def test_uninstall_leaves_accelerated_models_accelerated():
    ours = twin(peft_llama())
    dt.peft.install()
    evaluated(ours, tokens())
    dt.peft.uninstall()
    assert len(dt.peft.report(ours).served) == 14


def test_install_with_another_dropout():
    model = peft_llama(lora_dropout=0.5)
    dt.peft.install()
    torch.manual_seed(1)
    first = model.train()(tokens()).logits
    dt.peft.install(dropout="adapter")
    torch.manual_seed(1)
    second = model(tokens()).logits
    dt.peft.install()
    torch.manual_seed(1)
    assert torch.equal(model(tokens()).logits, first)
    assert error(second, first) > 1e-3


def test_somebody_elses_forward_over_ours_goes_on(monkeypatch):
    theirs = peft_llama()
    expected = evaluated(theirs, tokens())
    handle = dt.peft.accelerate(theirs)
    ours = peft_layers.Linear.forward
    monkeypatch.setattr(peft_layers.Linear, "forward", lambda self, x, *args, **kwargs: ours(self, x, *args, **kwargs))
    handle.undo()
    assert torch.equal(evaluated(theirs, tokens()), expected)
    monkeypatch.undo()
    dt.peft.uninstall()


# Reports and errors


@pytest.mark.parametrize("training", [True, False])
def test_under_torch_func_peft_computes(training, monkeypatch):
    model = peft_llama().train(training)
    model.set_attn_implementation("eager")  # vmap has no rule for torch's kernel on CPUs
    values = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    pair = {name: torch.stack([p, 2 * p]) for name, p in values.items()}

    def loss(values):
        return torch.func.functional_call(model, values, (tokens(),)).logits.square().mean()

    expected = torch.func.grad(loss)(values)
    calls = counted(monkeypatch)
    dt.peft.accelerate(model)
    loss(values)
    assert not calls
    found = torch.func.grad(loss)(values)
    assert calls
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    with torch.no_grad():
        assert error(torch.func.vmap(loss, randomness="different")(pair)[0], loss(values)) < 1e-5


def test_the_report_says_what_is_served_and_why_not():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm, self.head = nn.Embedding(9, 8), nn.LayerNorm(8), nn.Linear(8, 9)
            self.conv = nn.Conv1d(8, 8, 3, groups=2)

        def forward(self, x):
            return self.head(self.conv(self.norm(self.embed(x)).mT).mT)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LoRA adapter added to ConvNd layer with groups")
        model = get_peft_model(Mixed(), LoraConfig(**{**DORA, "target_modules": ["embed", "head", "conv"]}))
    handle = dt.peft.accelerate(model)
    report = handle.report
    assert [(x.path, x.kind, x.served) for x in report.layers] == [
        ("base_model.model.embed", "embedding", True),
        ("base_model.model.head", "linear", True),
        ("base_model.model.conv", "Conv1d", False),
    ]
    assert report.served[1].reason == "dense, fused input gradient"
    assert "grouped convolution" in report.left[0].reason
    assert str(report).splitlines()[0] == "2 of 3 LoRA layers served by doratune, 1 left to PEFT"
    assert "PEFT         1 x conv (Conv1d): PEFT's A for a grouped" in str(report)
    assert "2 of 3" in repr(handle)
    evaluated(model, torch.arange(6)[None])
    handle.undo()
    assert [x.reason for x in report.layers] != [x.reason for x in handle.report.layers]


def test_attention_and_layers_replaced_before_are_named():
    attention = nn.MultiheadAttention(8, 2)
    model = get_peft_model(nn.ModuleDict({"a": attention}), LoraConfig(r=2, target_modules=["a"]))
    found = dt.peft.accelerate(model).report.layers
    assert [(x.kind, x.reason) for x in found] == [
        ("MultiheadAttention", "PEFT's MultiheadAttention has no forward that doratune serves"),
        ("Linear", "plain LoRA"),
    ]
    ours = one(nn.Linear(4, 4))
    layer = the_layer(ours)
    layer.forward = layer.forward
    assert "replaced on the instance" in dt.peft.accelerate(ours).report.layers[0].reason


def test_hooks_of_accelerate_set_after_install_are_seen_through(monkeypatch):
    from accelerate.hooks import ModelHook, add_hook_to_module

    calls = counted(monkeypatch)
    dt.peft.install()
    ours = one(nn.Linear(4, 4))
    add_hook_to_module(the_layer(ours), ModelHook())
    assert dt.peft.report(ours).served
    evaluated(ours, torch.randn(2, 4))
    assert not calls


def test_errors():
    with pytest.raises(dt.AdapterError, match=r"expected a model with PEFT's LoRA layers.*found none in this Linear"):
        dt.peft.accelerate(nn.Linear(3, 3))
    with pytest.raises(dt.AdapterError, match="dropout: expected one of 'peft', 'adapter'; found 'none'"):
        dt.peft.accelerate(peft_llama(), dropout="none")
    with pytest.raises(dt.AdapterError, match="dropout: expected one of"):
        dt.peft.install(dropout="none")


def test_without_peft_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "import torch, doratune as dt\n"
        "for switch in (dt.peft.install, lambda: dt.peft.accelerate(torch.nn.Linear(2, 2))):\n"
        "    try: switch()\n"
        "    except dt.AdapterError as error: print(error)\n"
        "dt.peft.uninstall()\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.count("pip install -U peft") == 2
