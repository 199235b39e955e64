import itertools

import torch

from doratune.ops.reference import dora_scale
from doratune.study.moved import DIRECTION, MAGNITUDE, moved_adapter

W = torch.randn(96, 64, generator=torch.Generator().manual_seed(5))
TILES = [(slice(0, 40), W[:40]), (slice(40, 96), W[40:])]


def test_the_adapter_has_moved_as_far_as_promised():
    moved = moved_adapter(TILES, (96, 64), rank=8, scale=2.0, seed=0)
    change = 2 * moved.B @ moved.A
    assert abs(change.norm() / W.norm() - DIRECTION) < 0.01
    g = dora_scale(W, moved.A, moved.B, moved.m, 2.0)
    assert abs(g.mean() - 1) < 0.05
    assert abs(g.std() - MAGNITUDE) < 0.03


def test_values_are_the_same_for_everyone_and_in_bfloat16():
    one, other = (moved_adapter(tiles, (96, 64), 8, 2.0, 3) for tiles in (TILES, [(slice(0, 96), W)]))
    for a, b in zip(vars(one).values(), vars(other).values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-2)
        assert torch.equal(a, a.bfloat16().float())


def test_each_round_has_values_of_its_own_that_bfloat16_tells_apart():
    moved = moved_adapter(TILES, (96, 64), 8, 2.0, 3)
    rounds = [moved.at(number) for number in range(8)]
    assert torch.equal(rounds[0].m, moved.m)
    for earlier, later in itertools.pairwise(rounds):
        for a, b in zip(vars(earlier).values(), vars(later).values(), strict=True):
            assert torch.equal(b, b.bfloat16().float())
            assert not torch.equal(a, b)
    assert torch.equal(moved.at(8).B, moved.B)
