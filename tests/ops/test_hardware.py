"""Which dtypes are multiplied in hardware."""

import pytest
import torch

from doratune.ops.hardware import multiplies

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_always_is(dtype):
    assert multiplies(dtype, CPU)


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
@pytest.mark.parametrize("answer", [True, False])
def test_16_bits_on_a_cpu_are_if_onednn_says_so(dtype, name, answer, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda: answer)
    assert multiplies(dtype, CPU) is answer
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not multiplies(dtype, CPU)


def test_this_processor_says_something():
    assert isinstance(multiplies(torch.bfloat16, CPU), bool)
    assert isinstance(multiplies(torch.float16, CPU), bool)
