import pytest
import torch
from torch.utils.checkpoint import checkpoint

from doratune.study.footprint import peak_bytes, saved_bytes

MB = 1 << 20


def test_peak_is_the_highest_level_and_not_the_sum():
    def run():
        a = torch.empty(8 * MB, dtype=torch.uint8)
        b = torch.empty(4 * MB, dtype=torch.uint8)
        del a, b
        return torch.empty(6 * MB, dtype=torch.uint8)

    assert peak_bytes(run) == 12 * MB


def test_peak_sees_what_operators_allocate_inside():
    x = torch.ones(MB, dtype=torch.bfloat16)
    assert peak_bytes(lambda: (x.float() + 1).sum()) >= 8 * MB
    assert peak_bytes(lambda: x.add_(1)) < MB


def test_peak_counts_from_what_was_there_before():
    held = torch.empty(8 * MB, dtype=torch.uint8)
    assert peak_bytes(lambda: torch.empty(2 * MB, dtype=torch.uint8)) == 2 * MB
    assert held.numel() == 8 * MB


def test_peak_hands_on_errors():
    with pytest.raises(ZeroDivisionError):
        peak_bytes(lambda: 1 / 0)


def test_saved_counts_each_storage_once_and_known_ones_never():
    x = torch.randn(256, 256, requires_grad=True)

    def forward():
        y = x.exp()  # keeps y
        return (y * y.T + x * x).sum()  # keeps y, a view of it, and x

    size = x.numel() * 4
    assert saved_bytes(forward) == 2 * size
    assert saved_bytes(forward, [x]) == size


def test_saved_leaves_out_what_died_with_its_node():
    x = torch.randn(256, 256, requires_grad=True)

    def forward():
        (x.exp() * 2).sum().detach()  # this graph is gone when the forward pass ends
        return checkpoint(lambda x: x.exp().sin().sum(), x, use_reentrant=False)

    assert saved_bytes(forward, [x]) == 0
    assert saved_bytes(lambda: x.exp().sin().sum(), [x]) == x.numel() * 4
