"""Which dtypes a processor multiplies matrices in, and how exactly."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

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


def sums_stay_wide(device: torch.device) -> bool:
    """Whether ``torch.mm`` of 16-bit matrices can give its float32 sums back, unrounded.

    On NVIDIA's GPUs this is not only for speed. A sum may be split into parts that are each rounded to 16 bits
    (``allow_bf16_reduced_precision_reduction``), and computing it again does not show what that rounding took.
    """
    return device.type == "cuda" and torch.version.hip is None and hasattr(torch.ops.aten.mm, "dtype")


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 numbers are exact to float32's digits, though TF32 or bfloat16 were allowed for speed.

    These switches hold for the whole process, so threads take turns.
    """
    with _TURNS:
        switches = _switches()
        before = [read() for read, _, _ in switches]
        try:
            for _, write, exact in switches:
                write(exact)
            yield
        finally:
            for (_, write, _), value in zip(switches, before, strict=True):
                write(value)


_TURNS = threading.RLock()


def _switches() -> list[tuple[Callable[[], Any], Callable[[Any], Any], Any]]:
    """How each is read and written, and what makes it exact."""

    def attribute(owner: Any, name: str, exact: Any) -> tuple[Callable[[], Any], Callable[[Any], Any], Any]:
        return functools.partial(getattr, owner, name), functools.partial(setattr, owner, name), exact

    backends: Any = torch.backends
    cuda, cudnn, mkldnn = backends.cuda, backends.cudnn, backends.mkldnn
    if not hasattr(cuda.matmul, "fp32_precision"):  # torch before 2.9
        products = (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest")
        return [products, attribute(cudnn, "allow_tf32", False)]
    kinds = [cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv]
    return [attribute(kind, "fp32_precision", "ieee") for kind in kinds]
