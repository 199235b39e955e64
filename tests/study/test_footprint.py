import torch
from torch.utils.checkpoint import checkpoint

from doratune.study.footprint import saved_bytes


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
