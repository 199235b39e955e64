"""Which dtypes a processor multiplies matrices in."""

from __future__ import annotations

import torch


def multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device has instructions for products of matrices of this dtype.

    Without them torch writes 16-bit products out in plain loops on a CPU, hundreds of times slower than float32 ones.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if device.type == "cuda":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return bool(getattr(torch.ops.mkldnn, name)())
