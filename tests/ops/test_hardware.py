"""Which dtypes are multiplied in hardware."""

import pytest
import torch

from doratune.ops.hardware import full_precision, multiplies, sums_stay_wide

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_this_torch_can_be_asked(dtype):
    """The questions to oneDNN are private functions of torch, which another version may have lost."""
    assert multiplies(dtype, CPU) in (True, False)


def test_float32_sums_of_16_bit_products_are_asked_of_nvidias_gpus_only(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    assert sums_stay_wide(torch.device("cuda", 1)) is hasattr(torch.ops.aten.mm, "dtype")
    assert not sums_stay_wide(CPU)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not sums_stay_wide(torch.device("cuda"))


@pytest.mark.parametrize("allowed", ["highest", "high", "medium"])
def test_full_precision_for_a_while(allowed):
    A = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    try:
        torch.set_float32_matmul_precision(allowed)
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        with full_precision():
            if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
                assert torch.backends.cuda.matmul.fp32_precision == "ieee"
                assert torch.backends.cudnn.conv.fp32_precision == "ieee"
            assert torch.allclose(A @ A, (A.double() @ A.double()).float(), rtol=1e-4, atol=1e-5)
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before
        assert torch.get_float32_matmul_precision() == allowed
    finally:
        torch.set_float32_matmul_precision("highest")


def test_what_was_allowed_is_allowed_again_after_an_error():
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(ValueError, match="inside"):
            _fail_in_full_precision()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@full_precision()
def _fail_in_full_precision():
    raise ValueError("inside")
