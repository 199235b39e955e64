"""Every option of PEFT's is honoured, refused by name, or without effect; names and expressions match as PEFT's do."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import doratune as dt
from doratune.peft_config import from_peft, to_peft
from doratune.peft_fields import HARMLESS_INITS, HONOURED, REFUSED, WITHOUT_EFFECT
from doratune.targets import as_targets, plain_modules

VALID = {"peft_type": "LORA", "target_modules": ["q"]}


FLAGGED = [{"(?i)q": 8}] if sys.version_info >= (3, 11) else []
"""Flags amid an expression, which PEFT makes of these: Python 3.10 takes them."""


def peft_fields():
    import peft

    return {field.name for field in dataclasses.fields(peft.LoraConfig)}


def test_every_option_of_peft_is_classified_once():
    classes = [set(HONOURED), set(REFUSED), WITHOUT_EFFECT]
    assert set.union(*classes) == peft_fields(), "PEFT has an option that nobody classified, or lost one"
    assert sum(map(len, classes)) == len(set.union(*classes))


@pytest.mark.parametrize("option", sorted(REFUSED))
def test_options_that_change_the_meaning_are_refused_by_name(option):
    with pytest.raises(dt.AdapterError, match=rf"{option}=.* is not supported: {REFUSED[option][:20]}"):
        from_peft({**VALID, option: {"a": 1}}, "file")
    for unset in (None, False, {}, []):
        from_peft({**VALID, option: unset}, "file")


@pytest.mark.parametrize("option", sorted(WITHOUT_EFFECT))
@pytest.mark.parametrize("value", [None, "x", 5, {"a": [1]}, True])
def test_options_without_effect_have_none(option, value):
    assert from_peft({**VALID, option: value}, "file") == from_peft(VALID, "file")


def test_an_option_that_peft_may_add_is_refused_when_set():
    from_peft({**VALID, "use_tomorrows_idea": False}, "file")
    with pytest.raises(dt.AdapterError, match="unknown option 'use_tomorrows_idea': found True"):
        from_peft({**VALID, "use_tomorrows_idea": True}, "file")


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "orthogonal", "eva", "mica"])
def test_start_values_that_left_w_alone_are_accepted(init):
    assert init in HARMLESS_INITS
    assert from_peft({**VALID, "init_lora_weights": init}, "file") == from_peft(VALID, "file")


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "new", 5, [], {}])
def test_start_values_that_changed_w_are_refused(init):
    with pytest.raises(dt.AdapterError, match=r"init_lora_weights=.* is not supported"):
        from_peft({**VALID, "init_lora_weights": init}, "file")


def test_what_is_absent_has_peft_s_default():
    import peft

    theirs = peft.LoraConfig()
    config = from_peft(VALID, "file").config
    assert (config.rank, config.alpha, config.dropout) == (theirs.r, theirs.lora_alpha, theirs.lora_dropout)
    assert (config.method, config.rank_stabilized, config.bias) == ("lora", theirs.use_rslora, theirs.bias)


WRONG = {
    "r": ["16", 16.0, 0, -1, True, None, [], 10**30, float("nan")],
    "lora_alpha": ["16", 0, -1, True, None, [], 10**400, float("nan"), float("inf"), 1e200],
    "lora_dropout": ["0.1", 1, 1.5, -0.1, None, True, float("nan")],
    "target_modules": [5, None, "", [], {}, [5], [""], [["q"]], "(", "a{99999999999}", True, "all-linear"],
    "exclude_modules": [5, {"a": 1}, [5], [""], "(", True],
    "target_parameters": ["experts.down_proj", [""], 3],
    "rank_pattern": [[], 5, "q", {"q": "8"}, {"q": 0}, {"(": 8}, {"q": True}, {"q": 10**30}, [["q", 8]], *FLAGGED],
    "alpha_pattern": [[], 5, "q", {"q": "8"}, {"q": 0}, {"(": 8}, {"q": True}, {"q": 10**400}],
    "use_rslora": ["yes", 1, [], "false"],
    "use_dora": ["yes", 1, [], "false"],
    "bias": ["some", None, True, ["all"], {}],
    "modules_to_save": ["head", 5, {"a": 1}, [5], ["("], [""], [["head"]], True],
    "layers_to_transform": ["x", "1", 1.5, ["1"], [1.0], {"a": 1}, True, [True]],
    "layers_pattern": [5, {"a": 1}, [5], "(", ["("], True],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in WRONG for value in WRONG[field]], ids=repr)
def test_every_field_of_a_wrong_type_is_named(field, value):
    with pytest.raises(dt.AdapterError) as error:
        from_peft({**VALID, field: value}, "folder/adapter_config.json")
    assert str(error.value).startswith(f"folder/adapter_config.json: {field}: ")


def test_all_wrong_fields_are_named_at_once():
    assert set(WRONG) | {"peft_type", "init_lora_weights"} == set(HONOURED)
    with pytest.raises(dt.AdapterError) as error:
        from_peft({**VALID, **{field: values[0] for field, values in WRONG.items()}, "lora_bias": True}, "file")
    for field in (*WRONG, "lora_bias"):
        assert f"- {field}" in str(error.value)
    assert f"{len(WRONG) + 1} problems" in str(error.value)


@pytest.mark.parametrize("method", ["IA3", "LOHA", None, 5, [], "lora", {"a": []}])
def test_other_methods_are_refused(method):
    with pytest.raises(dt.AdapterError, match="peft_type: expected 'LORA', found"):
        from_peft({**VALID, "peft_type": method, "r": "x"}, "file")


def test_a_huge_or_deep_value_does_not_fill_the_message():
    deep: object = 1
    for _ in range(5000):
        deep = [deep]
    for value in (deep, "x" * 10**6, [1] * 10**6):
        with pytest.raises(dt.AdapterError) as error:
            from_peft(
                {**VALID, "r": value, "arrow_config": value, "y" * 10**6: value, "init_lora_weights": "x"}, "file"
            )
        assert len(str(error.value)) < 3000


def test_layers_need_names_not_an_expression():
    with pytest.raises(dt.AdapterError, match="layers_to_transform: cannot be used"):
        from_peft({**VALID, "target_modules": ".*q", "layers_to_transform": [0]}, "file")


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.floats()
    | st.sampled_from(["q", "a.q", ".*q", "lora", "all", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["q", "a", ".*"]), inner, max_size=2),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from(sorted({*HONOURED, *REFUSED, *WITHOUT_EFFECT, "other"})), json_values))
def test_any_options_give_an_adapter_error_or_options(change):
    raw = json.loads(json.dumps({**VALID, **change}))
    try:
        found = from_peft(raw, "file")
    except dt.AdapterError:
        return
    found.targeted(tree(["q", "a.q", "layers.0.q"]))
    found.config.scale_of("a.q")


# Which modules


def tree(paths: list[str]) -> nn.Module:
    """A model with a linear layer at each path that has none below it."""
    root = nn.Module()
    for path in paths:
        parent = root
        for part in path.split("."):
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
    for name, module in list(root.named_modules()):
        if name and not module._modules:
            parent = root.get_submodule(name.rpartition(".")[0]) if "." in name else root
            parent.add_module(name.rpartition(".")[2], nn.Linear(2, 2))
    return root


parts = st.sampled_from(
    ["q", "qq", "a", "0", "1", "layers", "q+", "(", "a|b", "^", "[", "*", "all-linear", "q\n", "\\d"]
)
trees = st.lists(st.lists(parts, min_size=1, max_size=4).map(".".join), min_size=1, max_size=8, unique=True)


def peft_finds(options: dict[str, object], model: nn.Module) -> set[str]:
    import peft
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

    config = peft.LoraConfig(**options)
    found = {path: check_target_module_exists(config, path) for path, _ in model.named_modules() if path}
    return {path for path, result in found.items() if result and not isinstance(result, _ExcludedModule)}


@given(trees, st.data())
@example(["q", "a.q"], None)
@example(["a+b.q", "aab.q"], None)
def test_as_targets_match_exactly_the_wanted_modules_in_peft(paths, data):
    model = tree(paths)
    linear = sorted(path for path, module in model.named_modules() if isinstance(module, nn.Linear))
    wanted = set(linear[:1]) if data is None else data.draw(st.sets(st.sampled_from(linear), min_size=1))
    targets = as_targets(sorted(wanted), plain_modules(model))
    assert peft_finds({"target_modules": targets}, model) == wanted


@given(
    trees,
    st.fixed_dictionaries(
        {"target_modules": st.lists(parts, min_size=1, max_size=3) | st.sampled_from([".*q", r"layers\.\d+\.(q|a)"])},
        optional={
            "exclude_modules": st.lists(parts, max_size=2) | st.sampled_from([r".*1.*", ""]),
            "layers_to_transform": st.integers(0, 1) | st.lists(st.integers(0, 1), max_size=2),
            "layers_pattern": st.sampled_from(["layers", ["a", "layers"], "(a|layers)", []]),
            "modules_to_save": st.sampled_from([["a"], ["layers.0"], ["qq", "1"], []]),
        },
    ),
)
def test_targeted_modules_are_those_that_peft_finds(paths, options):
    if isinstance(options["target_modules"], str):
        options = {k: v for k, v in options.items() if not k.startswith("layers")}
    elif "layers_to_transform" not in options:
        options.pop("layers_pattern", None)
    model = tree(paths)
    found = from_peft({"peft_type": "LORA", **options}, "file").targeted(model)
    assert found == peft_finds(options, model)


@given(
    st.lists(st.lists(parts, min_size=1, max_size=3).map(".".join), min_size=1, max_size=4),
    st.dictionaries(
        st.sampled_from(["q", "a.q", r"a\.q", ".*q", "^q", "^a.q", r"layers\.\d.q", "a|q"]), st.integers(1, 9)
    ),
)
def test_patterns_match_as_in_peft(paths, pattern):
    from peft.utils.other import get_pattern_key

    config = from_peft({**VALID, "rank_pattern": pattern, "alpha_pattern": pattern}, "file").config
    for path in paths:
        key = get_pattern_key(pattern.keys(), path)
        assert config.rank_of(path) == pattern.get(key, 8)
        assert config.alpha_of(path) == pattern.get(key, 8)


# Writing


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(2, 2)
        self.head = nn.Linear(2, 2)


def test_options_written_are_options_read():
    config = dt.AdapterConfig(
        rank=3,
        alpha=7.0,
        dropout=0.25,
        targets=["q"],
        rank_pattern={"^q": 2},
        alpha_pattern={"q": 1.5},
        rank_stabilized=True,
        bias="lora_only",
        modules_to_save=["head"],
    )
    raw = to_peft(Net(), config, ["q"], ["head"], transposed=False)
    assert from_peft(json.loads(json.dumps(raw)), "file").config == config
    assert isinstance(raw["lora_alpha"], int)  # as in PEFT's own files
    assert raw.keys() <= peft_fields()


def test_rank_0_is_written_as_rank_1():
    raw = to_peft(Net(), dt.AdapterConfig(rank=0, targets=["q"], rank_pattern={"q": 0}), ["q"], [], transposed=False)
    assert (raw["r"], raw["rank_pattern"]) == (1, {"q": 1})


def test_peft_reads_the_options_without_a_warning():
    import peft

    raw = to_peft(Net(), dt.AdapterConfig(targets=["q"]), ["q"], [], transposed=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = peft.LoraConfig.from_peft_type(**json.loads(json.dumps(raw)))
    assert config.use_dora


@pytest.mark.parametrize(
    ("name", "head", "saved", "task"),
    [
        ("NetForCausalLM", "head", [], "CAUSAL_LM"),
        ("NetForSequenceClassification", "classifier", ["classifier"], "SEQ_CLS"),
        ("NetForSequenceClassification", "classifier", [], None),  # or else PEFT would look for it in the file
        ("NetForTokenClassification", "pre_classifier", [], None),
        ("NetForQuestionAnswering", "qa_outputs", ["qa_outputs"], "QUESTION_ANS"),
        ("Net", "head", [], None),
    ],
)
def test_the_task_says_no_more_than_the_file_holds(name, head, saved, task):
    model = type(name, (Net,), {})()
    model.add_module(head, nn.Linear(2, 2))
    config = dt.AdapterConfig(targets=["q"], modules_to_save=saved)
    raw = to_peft(model, config, ["q"], saved, transposed=False)
    assert raw["task_type"] == task
    assert (raw["auto_mapping"] is None) == (task is not None)


def test_what_peft_cannot_name_is_refused():
    model = tree(["q", "a|b", "head.q", "subhead"])
    with pytest.raises(dt.AdapterError, match="subhead as well"):
        to_peft(model, dt.AdapterConfig(targets=["q"], modules_to_save=["head"]), ["q"], ["head"], transposed=False)
    for name in ("layer", "default", "a.base_layer"):  # as the names of PEFT's own modules end
        config = dt.AdapterConfig(targets=["q"], modules_to_save=[name])
        if name == "a.base_layer":
            to_peft(tree(["q", name]), config, ["q"], [name], transposed=False)
            continue
        with pytest.raises(dt.AdapterError, match=r"PEFT would save q\..* as well"):
            to_peft(tree(["q", name]), config, ["q"], [name], transposed=False)
    config = dt.AdapterConfig(targets=["q"], modules_to_save=["q|b"])
    with pytest.raises(dt.AdapterError, match="q: PEFT would not adapt it"):  # q fits the expression "q|b"
        to_peft(tree(["q", "q|b"]), config, ["q"], ["q|b"], transposed=False)
