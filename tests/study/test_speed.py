from dataclasses import replace

import pytest
import torch

import doratune as dt
from doratune.layers.linear import Linear
from doratune.study import speed
from doratune.study.speed import DORA, FROZEN, GIVEN, LORA, measure_speed
from doratune.targets import adapted_layers
from helpers import ids, move, tiny_llama

CONFIG = dt.AdapterConfig(rank=4, alpha=8)
SHORT = {"seconds": 0.0}


def tokens(length=16):
    return ids(shape=(1, length), vocabulary=32)


def test_costs_of_every_role():
    told = []
    costs = measure_speed(tiny_llama(), CONFIG, tokens(), watch=lambda what, share: told.append(what), **SHORT)
    assert [cost.name for cost in costs] == [FROZEN, LORA, DORA]
    frozen, lora, dora = costs
    assert frozen.step.ratio == frozen.decode.ratio == 1
    assert 0 < frozen.saved < lora.saved < dora.saved
    assert all(cost.step.milliseconds > 0 and cost.decode.milliseconds > 0 for cost in costs)
    assert set(told) == {"training steps", "decode steps"}


def test_an_adapter_from_a_folder_takes_part(tmp_path):
    dt.save_adapter(move(dt.attach(tiny_llama(), CONFIG)), tmp_path / "a")
    costs = measure_speed(tiny_llama(), dt.AdapterConfig(rank=2), tokens(), adapter=tmp_path / "a", **SHORT)
    assert [cost.name for cost in costs] == [FROZEN, LORA, DORA, GIVEN]
    assert costs[3].saved > costs[2].saved, "the folder's adapter has rank 4, the others 2"


def test_lora_and_dora_have_moved_and_share_their_direction():
    model = tiny_llama()
    measure_speed(model, CONFIG, tokens(), **SHORT)
    for layer in adapted_layers(model).values():
        assert layer.lora_B[DORA].any()
        assert (layer.row_scale(DORA) - 1).abs().max() > 0.01
        assert torch.equal(layer.lora_A[LORA].sign(), layer.lora_A[DORA].sign())
    attached = dt.attach(tiny_llama(), CONFIG).get_input_embeddings()._forward_hooks
    assert len(model.get_input_embeddings()._forward_hooks) == len(attached), "a hook was left behind"


def test_the_frozen_model_passes_gradients_to_its_inputs():
    model, seen = tiny_llama(), []
    first = model.model.layers[0].self_attn.q_proj
    first.register_full_backward_hook(lambda module, inputs, outputs: seen.append(inputs[0] is not None))
    measure_speed(model, CONFIG, tokens(), **SHORT)
    assert seen
    assert all(seen)


def test_wrong_outputs_have_no_speed(monkeypatch):
    right = Linear.forward
    monkeypatch.setattr(Linear, "forward", staticmethod(lambda *args: right(*args) * 1.05))
    with pytest.raises(dt.AdapterError, match=r"so no speed is reported[\s\S]*lora, .*q_proj"):
        measure_speed(tiny_llama(), CONFIG, tokens(), **SHORT)


def test_switching_adapters_off_is_not_timed(monkeypatch):
    timed, off, race = [], speed.disabled, speed.race

    def noting(lane):
        def run():
            timed.append(lane.name)
            lane.run()
            timed.pop()

        return replace(lane, run=run)

    def switched_off(model):
        assert not timed, "the frozen model would seem slower, and adapters cheaper"
        return off(model)

    monkeypatch.setattr(speed, "disabled", switched_off)
    monkeypatch.setattr(speed, "race", lambda lanes, *args, **options: race([*map(noting, lanes)], *args, **options))
    model = tiny_llama()
    measure_speed(model, CONFIG, tokens(), **SHORT)
    assert all(layer.enabled for layer in adapted_layers(model).values())
