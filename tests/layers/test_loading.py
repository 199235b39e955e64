"""State dicts of the plain model fill adapted ones, whatever stands in a module's place."""

import pytest
import torch
from torch import nn

import doratune as dt
from helpers import error, move, output


class Attending(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))

    def forward(self, x):
        k = x[..., : self.attention.kdim]
        return self.head(self.attention(x, k, k)[0])


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 6, "add_bias_kv": True}], ids=["packed", "separate"])
def test_a_plain_checkpoint_fills_attention_and_saved_modules(options, assign):
    model, other = Attending(**options), Attending(**options)
    x = torch.randn(2, 3, 8)
    dt.attach(model, dt.AdapterConfig(rank=2, targets=["q_proj", "out_proj", "head.0"]))
    config = dt.AdapterConfig(rank=2, targets=["v_proj"], modules_to_save=["head"])
    dt.attach(model, config, "second")
    _, unexpected = model.load_state_dict(other.state_dict(), strict=False, assign=assign)
    assert unexpected == []
    with dt.disabled(model):
        assert error(output(model, x), output(other, x)) < 1e-6
    model.load_state_dict(model.state_dict())
    dt.set_adapter(model, "default")
    move(model)
    expected = output(model, x)
    assert error(output(dt.merge(model), x), expected) < 1e-5


@pytest.mark.parametrize("assign", [False, True])
def test_a_plain_checkpoint_fills_layers_of_which_biases_are_trained(assign):
    def layers():
        return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))

    model, other, x = layers(), layers(), torch.randn(2, 4)
    nn.init.normal_(other[1].weight)
    biases = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("bias")}
    dt.attach(model, dt.AdapterConfig(rank=2, targets=["0"], method="lora", bias="all"))
    _, unexpected = model.load_state_dict(other.state_dict(), strict=False, assign=assign)
    assert unexpected == []
    with dt.disabled(model):
        assert torch.equal(output(model, x), output(other, x))
    # The adapter's biases are its own, all else is the checkpoint's.
    other.load_state_dict(biases, strict=False)
    assert error(output(model, x), output(other, x)) < 1e-6


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_fresh_adapter_changes_nothing_of_a_base_that_comes_later(assign, rank):
    def layers():
        found = nn.Sequential(nn.Linear(4, 4), nn.Embedding(3, 4), nn.Conv2d(1, 2, 2), nn.Linear(4, 4))
        found[3].weight = found[0].weight
        return found

    model, other, third = layers(), layers(), layers()
    dt.attach(model, dt.AdapterConfig(rank=rank, targets=["0", "1", "2", "3"]))
    fresh = {n: p.detach().clone() for n, p in dt.trainable_parameters(model).items()}
    for base in (other, third):
        model.load_state_dict(base.state_dict(), strict=False, assign=assign)
        inputs = torch.randn(2, 4), torch.tensor([0, 2]), torch.randn(1, 1, 3, 3), torch.randn(2, 4)
        for layer, plain, x in zip(model, base, inputs, strict=True):
            assert error(output(layer, x), output(plain, x)) < 1e-6
    attending, whole, x = Attending(), Attending(), torch.randn(2, 3, 8)
    dt.attach(attending, dt.AdapterConfig(rank=rank, targets=["q_proj", "out_proj", "head.0"]))
    attending.load_state_dict(whole.state_dict(), strict=False, assign=assign)
    assert error(output(attending, x), output(whole, x)) < 1e-6
    move(model)
    moved = {n: p.detach().clone() for n, p in dt.trainable_parameters(model).items()}
    model.load_state_dict(other.state_dict(), strict=False, assign=assign)
    assert all(torch.equal(p, moved[n]) for n, p in dt.trainable_parameters(model).items())
    # A state dict with magnitudes of its own is taken as it is.
    model.load_state_dict({**{n: p.detach() for n, p in model.state_dict().items()}, **fresh})
    assert all(torch.equal(p, fresh[n]) for n, p in dt.trainable_parameters(model).items())
