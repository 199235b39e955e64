"""No tensor of another device slips into a layer's work: a forward and a backward pass of every kind on a device that
computes nothing, where torch refuses to mix it with the CPU."""

import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

PROGRAM = """
import gc

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from helpers import one_layer
from helpers_cases import CASES, METHODS, setup

_setup_privateuseone_for_python_backend("elsewhere")
SIZES = ("linear-square", "linear-narrow", "linear-subclass", "conv1d", "conv3d")  # else as "linear" and "conv2d"


def there(t, trained=False):
    return torch.empty(t.shape, dtype=t.dtype, device="elsewhere", requires_grad=trained)


def move(model):
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(there(p), p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = there(b)


def one(case, method, dtype, keep_output, **options):
    model, x = (s := setup(case, method, **options)).model.to(dtype), s.x
    x = x.to(dtype) if x.is_floating_point() else x
    one_layer(model).adapters["default"].keep_output = keep_output
    with FakeTensorMode():
        move(model)
        y = model(there(x, case.differentiable))
        y.sum().backward()
        found = [y, *(p.grad for p in model.parameters() if p.requires_grad)]
        model.eval()
        with torch.no_grad():
            found += [model(there(x)), model(there(x))]
    assert {t.device.type for t in found} == {"elsewhere"}, (case, method, options)


with FakeTensorMode():
    try:
        there(torch.ones(3)) + torch.ones(3)
    except RuntimeError:
        pass
    else:
        raise SystemExit("torch mixes the devices, and this shows nothing")
gc.freeze()
for case in CASES:
    dropout, bias = {"dropout": 0.1} if case.drops else {}, {"bias": "lora_only"} if case.bias else {}
    for method in METHODS:
        each = (dropout, bias) if method == "dora" and case.name not in SIZES else ({**dropout, **bias},)
        for options in ({}, *filter(None, each)):
            one(case, method, torch.bfloat16, keep_output=True, **options)
        if method == "dora":
            one(case, method, torch.float32, keep_output=True)
        if method != "lora" and case.name not in SIZES:
            one(case, method, torch.bfloat16, keep_output=False)
            one(case, method, torch.bfloat16, keep_output=True, eight_bit_outputs=["layer"])
"""


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch is too old to make a device in Python",
)
def test_every_kind_of_layer_stays_on_its_device():
    tests = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tests, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
