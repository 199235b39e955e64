import dataclasses
import math
import re

import pytest

import doratune as dt


def test_defaults():
    config = dt.AdapterConfig()
    assert (config.method, config.rank, config.alpha, config.targets) == ("dora", 16, 32, "all-linear")
    assert config.scale_of("any") == 2
    assert (config.norm_gradient, config.bias, config.dropout) == ("detached", "none", 0)


def test_it_cannot_be_changed_behind_an_adapters_back():
    with pytest.raises(dataclasses.FrozenInstanceError):
        dt.AdapterConfig().rank = 3


BAD = {
    "method": ["DoRA", "pissa", None],
    "init": ["pissa", "olora", True],
    "norm_gradient": ["none", False],
    "norm_refresh": ["epoch", True],
    "eight_bit_outputs": [[""], [1], "("],
    "bias": [True, "some"],
    "rank": [-1, 2.0, True, "8", None],
    "alpha": [0, -1, math.inf, math.nan, "16", True],
    "dropout": [-0.1, 1.0, 1, "0.1", True, math.nan],
    "rank_stabilized": [1, "yes"],
    "targets": ["", [], (), [""], [1], "(", "*.q"],
    "exclude": [[""], [1], "("],
    "modules_to_save": ["head", [""], [3]],
    "rank_pattern": [{"q": -1}, {"q": 1.5}, {"(": 3}],
    "alpha_pattern": [{"q": 0}, {"q": math.inf}, {"(": 3.0}],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in BAD.items() for v in values], ids=str)
def test_options_that_cannot_work_are_refused_by_name(field, value):
    with pytest.raises(dt.AdapterError, match=field):
        dt.AdapterConfig(**{field: value})


def test_every_problem_is_listed_at_once():
    with pytest.raises(dt.AdapterError) as caught:
        dt.AdapterConfig(method="x", rank=-1, alpha=0, dropout=2, targets=[], modules_to_save="head")
    message = str(caught.value)
    assert "6 problems" in message
    for word in ("method", "rank", "alpha", "dropout", "targets", "modules_to_save"):
        assert re.search(rf"^  - {word}", message, re.M), word
    assert isinstance(caught.value, ValueError)


def test_eight_bit_outputs_follow_the_targets_rule():
    assert not dt.AdapterConfig().keeps_eight_bits("layers.0.q_proj")
    config = dt.AdapterConfig(eight_bit_outputs=["q_proj", "layers.1.down"])
    found = [
        p for p in ("layers.0.q_proj", "layers.1.down", "layers.2.down", "my_q_proj") if config.keeps_eight_bits(p)
    ]
    assert found == ["layers.0.q_proj", "layers.1.down"]
    assert dt.AdapterConfig(eight_bit_outputs=r".*\.[qk]_proj").keeps_eight_bits("layers.0.k_proj")


def test_a_remembered_norm_has_no_exact_gradient():
    with pytest.raises(dt.AdapterError, match="norm_refresh"):
        dt.AdapterConfig(norm_refresh="step", norm_gradient="exact")


def test_rank_zero_is_the_magnitude_alone_and_only_doras():
    assert dt.AdapterConfig(rank=0).scale_of("any") == 0
    with pytest.raises(dt.AdapterError, match="magnitude only"):
        dt.AdapterConfig(rank=0, method="lora")
    with pytest.raises(dt.AdapterError, match=r"rank_pattern\['q'\]"):
        dt.AdapterConfig(rank_pattern={"q": 0}, method="lora")


def test_scales():
    config = dt.AdapterConfig(rank=4, alpha=8, rank_pattern={"q_proj": 16, "mlp.*": 0}, alpha_pattern={"q_proj": 4})
    assert config.scale_of("layers.0.k_proj") == 2
    assert config.scale_of("layers.0.q_proj") == 0.25
    assert config.scale_of("layers.0.mlp.up") == 0
    stabilized = dataclasses.replace(config, rank_stabilized=True)
    assert stabilized.scale_of("layers.0.k_proj") == 4
    assert stabilized.scale_of("layers.0.q_proj") == 1


def test_patterns_match_whole_parts_of_a_path_and_the_first_wins():
    config = dt.AdapterConfig(rank=4, rank_pattern={r"0\.q_proj": 1, "q_proj": 2, r"layers\.\d\.up": 3})
    assert config.rank_of("layers.0.q_proj") == 1
    assert config.rank_of("layers.10.q_proj") == 2
    assert config.rank_of("q_proj") == 2
    assert config.rank_of("my_q_proj") == 4
    assert config.rank_of("layers.1.up") == 3
    assert config.rank_of("layers.1.up.inner") == 4


@pytest.mark.parametrize(
    "option", ["targets", "exclude", "eight_bit_outputs", "modules_to_save", "rank_pattern", "alpha_pattern"]
)
def test_none_is_refused_by_the_options_name(option):
    with pytest.raises(dt.AdapterError, match=f"{option} must .*; found None; leave it out for the default"):
        dt.AdapterConfig(**{option: None})
