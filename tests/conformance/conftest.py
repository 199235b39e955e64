"""``--device cuda`` runs the conformance suite on a GPU."""

import contextlib

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _convolutions_in_float32(request):
    """Not in TF32, as torch has it by default on a GPU."""
    if request.config.getoption("device").startswith("cuda"):
        torch.backends.cudnn.conv.fp32_precision = "ieee"


@pytest.fixture(autouse=True)
def _device(request):
    """Layers, inputs and references are made on the device."""
    device = request.config.getoption("device")
    with contextlib.nullcontext() if device == "cpu" else torch.device(device):  # it looks at every call of torch
        yield
