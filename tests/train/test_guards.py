from types import SimpleNamespace

import torch

import doratune as dt
from doratune.train.guards import keeping_masters, trainable_when_quantised
from train.tiny import llama


def test_quantised_models_are_declared_trainable_and_masters_stay_float32():
    model = llama()
    model.is_quantized = True
    assert not trainable_when_quantised(model)._hf_peft_config_loaded
    dt.attach(model, dt.AdapterConfig(rank=4))
    assert trainable_when_quantised(model)._hf_peft_config_loaded is True
    model._hf_peft_config_loaded = False
    model.hf_quantizer = SimpleNamespace(is_trainable=False)  # as those that quantise activations
    assert not trainable_when_quantised(model)._hf_peft_config_loaded
    before = {name: p.detach().clone() for name, p in dt.trainable_parameters(model).items()}
    with keeping_masters(model):  # SFTTrainer does this to quantised models
        for parameter in dt.trainable_parameters(model).values():
            parameter.data = parameter.data.to(torch.bfloat16)
    for name, parameter in dt.trainable_parameters(model).items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name])
