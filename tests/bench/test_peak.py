import pytest
import torch
from bench.peak import peak_bytes

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
