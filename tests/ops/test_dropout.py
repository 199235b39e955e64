"""Which elements dropout takes away."""

import pytest
import torch

from doratune.ops.dropout import dropped_elements


@pytest.mark.parametrize("probability", [1e-3, 0.05, 0.5, 0.9, 0.999])
def test_the_share_is_the_probability(probability):
    torch.manual_seed(0)
    dropped = dropped_elements(torch.zeros(1000, 1001), probability)
    assert dropped.dtype == torch.bool
    expected, n = probability * dropped.numel(), dropped.numel()
    # Five standard deviations, and one part in 65,536 of rounding.
    assert abs(int(dropped.sum()) - expected) < 5 * (expected * (1 - probability)) ** 0.5 + n / 65536


@pytest.mark.parametrize("shape", [(), (1,), (0, 4), (3,), (2, 3, 5), (4, 7)])
def test_any_shape(shape):
    assert dropped_elements(torch.zeros(shape), 0.5).shape == shape


def test_no_two_positions_share_their_bits():
    """Four elements come from one draw; each has to be independent of its neighbours."""
    torch.manual_seed(0)
    dropped = dropped_elements(torch.zeros(200_000, 4), 0.5).float()
    correlation = torch.corrcoef(dropped.T) - torch.eye(4)
    assert correlation.abs().max() < 0.012
    again = dropped_elements(torch.zeros(200_000, 4), 0.5).float()
    assert abs(float(torch.corrcoef(torch.stack([dropped.flatten(), again.flatten()]))[0, 1])) < 0.006


def test_the_seed_decides():
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(dropped_elements(torch.zeros(50, 9), 0.5))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
