import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import doratune as dt
from doratune.config import matches
from doratune.targets import adapted_layers, saved_modules
from helpers import assert_same, error, ids, move, output, snapshot, tiny, tiny_llama

LINEARS = {f"layers.{i}.{n}" for i in (0, 1) for n in ("q_proj", "v_proj", "up", "down")}


def attached(model=None, **options):
    model = tiny() if model is None else model
    dt.attach(model, dt.AdapterConfig(**{"rank": 2} | options))
    return model


def paths(model):
    return set(adapted_layers(model))


def refused(model, *words, **options):
    """The error's text; the model is as it was."""
    before = snapshot(model)
    with pytest.raises(dt.AdapterError) as caught:
        attached(model, **options)
    assert_same(before, snapshot(model))
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


# Which modules


def test_all_linear_leaves_the_head_and_the_embedding():
    assert paths(attached()) == LINEARS


def test_all_linear_without_a_head_takes_every_linear():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    assert paths(attached(model)) == {"0", "2"}


def test_all_linear_of_a_transformers_model():
    model = attached(tiny_llama())
    assert len(paths(model)) == 14
    assert not any("lm_head" in p or "embed" in p for p in paths(model))


def test_all_linear_leaves_the_heads_of_models_inside():
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    classifier = BertForSequenceClassification(BertConfig(vocab_size=32, **sizes))
    whole = nn.ModuleDict({"teacher": nn.ModuleList([tiny_llama()]), "student": classifier, "head": nn.Linear(4, 2)})
    adapted = paths(attached(whole))
    assert len(adapted) == 14 + 7 + 1
    assert "head" in adapted  # of no transformers model: nobody says that it is an output head
    assert not adapted & {"teacher.0.lm_head", "student.classifier"}


def test_all_linear_takes_transformers_conv1d_and_leaves_the_classifier():
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=1, n_head=2, pad_token_id=0)
    model = attached(GPT2ForSequenceClassification(config))
    names = {p.rpartition(".")[2] for p in paths(model)}
    assert names == {"c_attn", "c_proj", "c_fc"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"targets": ["q_proj"]}, {"layers.0.q_proj", "layers.1.q_proj"}),
        ({"targets": ["1.q_proj", "embed"]}, {"layers.1.q_proj", "embed"}),
        ({"targets": ["layers.0.up"]}, {"layers.0.up"}),
        ({"targets": r"layers\.\d\.(up|down)"}, {f"layers.{i}.{n}" for i in (0, 1) for n in ("up", "down")}),
        ({"targets": r".*proj"}, {f"layers.{i}.{n}" for i in (0, 1) for n in ("q_proj", "v_proj")}),
        ({"targets": ["lm_head"]}, {"lm_head"}),
        ({"exclude": ["q_proj", "0.up"]}, LINEARS - {"layers.0.q_proj", "layers.1.q_proj", "layers.0.up"}),
        ({"exclude": ["layers.0"]}, {p for p in LINEARS if p.startswith("layers.1")}),
        ({"exclude": ["lm_head", "norm"]}, LINEARS),
        ({"targets": ["up"], "exclude": ["q_proj"]}, {"layers.0.up", "layers.1.up"}),
        ({"exclude": r"(?!.*up).*"}, {"layers.0.up", "layers.1.up"}),
        ({"exclude": r"layers\.0\..*"}, {p for p in LINEARS if p.startswith("layers.1")}),
        ({"targets": ["up"], "exclude": r".*\.0\..*"}, {"layers.1.up"}),
        ({"modules_to_save": ["layers.0"]}, {p for p in LINEARS if p.startswith("layers.1")}),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_selection(options, expected):
    assert paths(attached(**options)) == expected


def test_one_name_is_not_taken_for_an_expression_without_a_word():
    refused(
        tiny(), "'up', an expression for whole paths", "names are given as a list; here they are down, ", targets="up"
    )


def test_names_match_whole_parts_of_a_path():
    assert matches("layers.0.up", ["up"])
    assert matches("up", ["up"])
    assert not matches("layers.0.group", ["up"])
    assert not matches("layers.0.up.inner", ["up"])
    assert matches("layers.0.up", r".*up")
    assert not matches("layers.0.up2", r".*up")
    assert not matches("layers.0.up", "")


# Ranks and scales


def test_ranks_and_alphas_for_some_modules():
    model = attached(rank=4, alpha=4, rank_pattern={"q_proj": 8, r"layers\.1\.up": 0}, alpha_pattern={"down": 12})
    found = {p: layer.adapters["default"] for p, layer in adapted_layers(model).items()}
    assert {p: a.rank for p, a in found.items() if a.rank != 4} == {
        "layers.0.q_proj": 8,
        "layers.1.q_proj": 8,
        "layers.1.up": 0,
    }
    assert found["layers.0.q_proj"].scale == 0.5
    assert found["layers.0.down"].scale == 3
    layer = adapted_layers(model)["layers.1.up"]
    assert "default" not in layer.lora_A
    assert "default" in layer.magnitude


# Errors


def test_a_misspelt_target_gets_a_suggestion():
    refused(tiny(), "'q_porj' matches no module", "did you mean q_proj", targets=["q_porj", "up"])


def test_targets_that_match_nothing_are_all_listed():
    text = refused(tiny(), "'nothing'", "'nix'", "'lost'", targets=["nothing", "nix"], modules_to_save=["lost"])
    assert "3 problems" in text
    assert "q_proj" in text  # what there is


@pytest.mark.parametrize("targets", [r"blocks\..*", r".*proj2"])
def test_an_expression_that_matches_nothing(targets):
    refused(tiny(), repr(targets), "matches no module", targets=targets)


@pytest.mark.parametrize(
    ("exclude", "words"),
    [
        (["layers.O", "q_porj"], ["exclude 'layers.O' matches no module", "'q_porj'", "did you mean q_proj"]),
        ("up", ["exclude 'up', an expression for whole paths, matches no module", "list"]),
        (r"layers.0", ["matches only modules that contain others (layers.0)", repr(r"layers\.0\..*")]),
    ],
)
def test_what_excludes_nothing_is_an_error(exclude, words):
    """Silence would adapt the vision tower that was to be spared."""
    refused(tiny(), *words, exclude=exclude)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"rank_pattern": {"q_porj": 8}},
            "'q_porj' matches no module that is adapted; did you mean q_proj",
        ),
        ({"alpha_pattern": {"up": 1.0}}, "alpha_pattern 'up' matches no module that is adapted"),
        ({"eight_bit_outputs": ["qproj", "q_proj"]}, "eight_bit_outputs 'qproj' matches no module that is adapted"),
        ({"eight_bit_outputs": "proj"}, "eight_bit_outputs 'proj' matches no module that is adapted"),
    ],
    ids=str,
)
def test_options_for_layers_that_are_not_adapted_are_errors(options, words):
    refused(tiny(), words, targets=["q_proj", "v_proj"], **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"exclude": ".*"}, "modules that targets match are taken out by exclude '.*'"),
        ({"targets": ["up"], "modules_to_save": ["up"]}, "are taken out by modules_to_save"),
    ],
    ids=str,
)
def test_what_empties_a_selection_is_named(options, words):
    refused(tiny(), words, **options)


def test_models_with_parts_that_torch_jit_compiled_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of new versions of torch, which still have it
        model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.BatchNorm1d(4)))
    with pytest.raises(dt.AdapterError, match=r"targets: 1 was compiled by torch\.jit.*attach to the model as it was"):
        dt.attach(model, dt.AdapterConfig(rank=2))
    assert type(model[0]) is nn.Linear


def test_layers_without_a_shape_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4))
    with pytest.raises(dt.AdapterError, match="weights of 1 have no shape yet; run a batch through the model first"):
        dt.attach(model, dt.AdapterConfig(targets=["0"]))
    model(torch.randn(2, 4))
    dt.attach(model, dt.AdapterConfig())


def test_pefts_layers_are_not_adapted_once_more():
    wrapped = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    with pytest.raises(dt.AdapterError, match=r"is PEFT's .* call dt.peft.accelerate"):
        dt.attach(wrapped, dt.AdapterConfig())
    dt.attach(wrapped.unload(), dt.AdapterConfig())


def test_a_model_without_linear_layers():
    refused(nn.Sequential(nn.ReLU()), "no linear layer")
    model = nn.ModuleDict({"convolution": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4), "head": nn.Linear(4, 2)})
    model.get_output_embeddings = lambda: None
    refused(model, "no linear layer", "head: output head; name other layers in targets: convolution")


def test_kinds_that_are_not_served_are_named_with_what_is():
    text = refused(tiny(), "layers.0.norm", "LayerNorm", "linear", "embedding", targets=["norm"])
    assert "2 problems" in text


# Modules whose adapters would do nothing


class WithAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 8)

    def forward(self, x):
        return self.out(self.attention(x, x, x, need_weights=False)[0])


def transformer(layers=1):
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), layers, enable_nested_tensor=False
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [WithAttention, transformer], ids=lambda f: f.__name__)
@pytest.mark.parametrize("no_grad", [True, False])
def test_no_adapter_is_bypassed(make, training, no_grad):
    """Whatever is adapted acts, in every mode; what could not act is left alone and named."""
    torch.manual_seed(0)
    model = make()
    attached(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    model.train(training)
    x = torch.randn(2, 3, 8)
    left = dt.summary(model).left_alone
    assert not set(left) & paths(model)
    with torch.set_grad_enabled(not no_grad):
        before = model(x).detach().clone()
        for layer in adapted_layers(model).values():
            for group in (layer.lora_B, layer.magnitude):
                with torch.no_grad():
                    group["default"].add_(0.5)
                after = model(x).detach().clone()
                assert not torch.equal(before, after), layer.path
                before = after


@pytest.mark.parametrize("targets", [["out_proj"], r".*out_proj"], ids=["name", "expression"])
def test_an_attentions_output_projection_is_never_wrapped_in_vain(targets):
    model = WithAttention().eval()
    x = torch.randn(2, 3, 8)
    message = ""
    try:
        attached(model, targets=targets)
    except dt.AdapterError as refused:
        message = str(refused)
    if message:
        assert "attention.out_proj" in message
        assert "would do nothing there" in message
        assert isinstance(model.attention.out_proj, nn.Linear)
        return
    with torch.no_grad():
        before = model(x)
        move(model)
        assert not torch.equal(model(x), before)


def test_a_model_that_is_a_layer_itself_has_no_place_for_an_adapter():
    for model in (nn.Linear(8, 8), nn.Embedding(8, 8)):
        refused(model, "nn.Sequential", type(model).__name__)
    refused(nn.MultiheadAttention(8, 2), "nn.Sequential", targets=["out_proj"])


# Modules trained whole


def test_modules_to_save_train_a_copy_and_leave_the_original():
    model = tiny()
    x = ids()
    before = output(model, x)
    original = model.lm_head.weight
    attached(model, modules_to_save=["lm_head", "norm"])
    assert set(saved_modules(model)) == {"lm_head", "layers.0.norm", "layers.1.norm"}
    assert torch.equal(output(model, x), before)
    trained = dt.trainable_parameters(model)
    assert "lm_head.copies.default.weight" in trained
    assert all(".base_layer." not in n for n in trained)
    optimizer = torch.optim.SGD(trained.values(), lr=0.5)
    model(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(output(model, x), before)
    assert original.grad is None
    with dt.disabled(model):
        assert torch.equal(output(model, x), before)
    moved = model.lm_head.weight.detach().clone()
    expected = output(model, x)
    assert not torch.equal(moved, original)
    dt.merge(model)
    assert type(model.lm_head) is nn.Linear
    assert torch.equal(model.lm_head.weight, moved)
    assert torch.allclose(output(model, x), expected, atol=1e-5)


def test_saved_modules_give_back_the_original_when_detached():
    model = tiny()
    before = snapshot(model)
    attached(model, modules_to_save=["lm_head"], bias="all")
    for p in dt.trainable_parameters(model).values():
        p.data.add_(0.1)
    dt.detach(model)
    assert_same(before, snapshot(model))


def test_a_saved_container_owns_what_is_inside():
    class Headed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 4)
            self.head = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))

        def forward(self, x):
            return self.head(self.body(x))

    for bias in ("none", "all", "lora_only"):
        torch.manual_seed(0)
        model = Headed()
        x = torch.randn(5, 4)
        before = model(x)
        attached(model, modules_to_save=["head"], bias=bias)
        assert set(adapted_layers(model)) == {"body"}
        assert set(saved_modules(model)) == {"head"}
        assert torch.equal(model(x), before)
        model(x).sum().backward()
        assert all(p.grad is not None for p in dt.trainable_parameters(model).values())
        with torch.no_grad():
            for p in dt.trainable_parameters(model).values():
                p.add_(0.1)
            expected = model(x)
            with dt.disabled(model):
                assert torch.equal(model(x), before)
            assert torch.allclose(dt.merge(model)(x), expected, atol=1e-5)


# Biases


class Biased(nn.Module):
    """A container with a bias of its own, as Swin's table, Qwen3-Next's dt_bias and DeBERTa's q_bias are."""

    def __init__(self):
        super().__init__()
        self.dt_bias = nn.Parameter(torch.randn(6))
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x) + self.dt_bias))


@pytest.mark.parametrize("compiled", [False, True])
def test_layers_inside_a_module_with_a_bias_of_its_own_stay_adapted(compiled):
    torch.manual_seed(0)
    model, x = nn.Sequential(Biased(), Biased()), torch.randn(3, 4)
    before, original = model(x), snapshot(model)
    attached(model, bias="all")
    assert set(adapted_layers(model)) == {f"{i}.{n}" for i in (0, 1) for n in ("up", "down")}
    assert "0.copies.default.dt_bias" in dt.trainable_parameters(model)
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    assert torch.equal(run(x), before)
    move(model)
    with torch.no_grad():
        for saved in saved_modules(model).values():
            saved.dt_bias.add_(1.0)
    run(x).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in dt.trainable_parameters(model).values())
    expected = model(x)
    for path in ("0.copies.default.dt_bias", "0.base_layer.up.lora_B.default"):  # each of them is heard
        parameter = model.get_parameter(path)
        with torch.no_grad():
            kept = parameter.clone()
            parameter.add_(0.5)
            assert error(run(x), expected) > 1e-2
            parameter.copy_(kept)
    with dt.disabled(model):
        assert torch.equal(model(x), before)
    merged = dt.merge(copy.deepcopy(model))
    assert error(merged(x), expected) < 1e-5
    assert type(merged[0]) is Biased
    assert_same(original, snapshot(dt.detach(model)))


def test_biases_of_modules_with_layers_inside_are_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    base, x = nn.Sequential(Biased()), torch.randn(3, 4)
    model = move(attached(copy.deepcopy(base), bias="all"))
    with torch.no_grad():
        model[0].dt_bias.add_(1.0)
    dt.save_adapter(model, tmp_path)
    assert error(dt.load_adapter(base, tmp_path)(x), model(x)) < 1e-6


@pytest.mark.parametrize(
    ("bias", "expected"),
    [
        ("none", set()),
        ("lora_only", {f"layers.{i}.{n}" for i in (0, 1) for n in ("q_proj", "up", "down")}),
        ("all", {f"layers.{i}.{n}" for i in (0, 1) for n in ("q_proj", "up", "down", "norm")}),
    ],
)
def test_biases(bias, expected):
    model = tiny()
    x = ids()
    before = output(model, x)
    attached(model, bias=bias)
    assert torch.equal(output(model, x), before)
    trained = {n for n in dt.trainable_parameters(model) if "bias" in n}
    owners = {n.split(".adapter_bias")[0].split(".copies")[0] for n in trained}
    assert owners == expected
    model(x).square().mean().backward()
    with torch.no_grad():
        for name in trained:
            p = dt.trainable_parameters(model)[name]
            assert p.grad is not None
            assert p.grad.any()
            p.add_(1)
    moved = output(model, x)
    assert torch.equal(moved, before) == (not expected)
    with dt.disabled(model):
        assert torch.equal(output(model, x), before)
    dt.merge(model)
    assert torch.allclose(output(model, x), moved, atol=1e-5)


@pytest.mark.parametrize("late", [False, True], ids=["with data", "from the meta device"])
def test_all_biases_of_an_attention_without_adapters_are_trained(tmp_path, late):
    """The output projection's too, which the module, and the fast path of the layer around it, compute with."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), nn.Linear(8, 4))
    x = torch.randn(2, 3, 8)
    before = base.eval()(x)
    model = attached(copy.deepcopy(base).to("meta") if late else copy.deepcopy(base), targets=["1"], bias="all")
    if late:
        model.to_empty(device="cpu").load_state_dict(base.state_dict(), strict=False)
    names = [f"0.self_attn.copies.default.{name}" for name in ("in_proj_bias", "out_proj.bias")]
    assert set(names) <= set(dt.trainable_parameters(model))
    assert error(model(x), before) < 1e-6  # torch has other kernels for frozen weights
    model(x).square().sum().backward()
    assert all(model.get_parameter(name).grad.any() for name in names)
    move(model)
    after = model(x)
    for name in names:
        with torch.no_grad():
            kept = model.get_parameter(name).clone()
            model.get_parameter(name).add_(torch.randn_like(kept))
            assert error(model(x), after) > 1e-2  # without gradients by the fast path
            assert error(model.train()(x), model.eval()(x)) < 1e-5
            model.get_parameter(name).copy_(kept)
    dt.save_adapter(model, tmp_path)
    assert error(dt.load_adapter(copy.deepcopy(base), tmp_path)(x), after) < 1e-6
    with dt.disabled(model):
        assert error(model(x), before) < 1e-6
    assert error(dt.merge(copy.deepcopy(model))(x), after) < 1e-5
    dt.attach(model, dt.AdapterConfig(rank=2, targets=["out_proj"]), "other")  # whose host comes in between
    dt.set_adapter(model, "default")
    assert error(model(x), after) < 1e-6


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_weights_are_left_alone_and_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 0), nn.Linear(0, 4), nn.Embedding(4, 0))
    reasons = {str(n): f"its weight is empty ({shape})" for n, shape in enumerate(("0 x 4", "4 x 0", "4 x 0"), 1)}
    attached(model)
    assert paths(model) == {"0"}
    assert dt.summary(model).left_alone == reasons
    dt.detach(model)
    refused(
        model,
        *(f"{path}: {reason}" for path, reason in reasons.items()),
        "3: its weight is empty",
        targets=list("0123"),
    )


def test_a_module_around_layers_says_which():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "block": nn.ModuleList([nn.Linear(8, 8)])})
    refused(
        model,
        "attention: MultiheadAttention is no layer, but contains some: k_proj, out_proj, q_proj, v_proj",
        "block: ModuleList is no layer, but contains some: 0",
        targets=["attention", "block"],
    )


def test_all_linear_does_not_pass_over_layers_quantised_by_others():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("qweight", torch.zeros(4, 8, dtype=torch.int32))

    model = nn.ModuleDict({"router": nn.Linear(4, 4), **{f"up_{i}": Packed() for i in range(7)}})
    with pytest.raises(dt.AdapterError, match="up_0: no kind of layer serves Packed") as raised:
        dt.attach(model, dt.AdapterConfig(rank=2))
    assert "(7 problems):" in str(raised.value)
    assert "and 2 more" in str(raised.value)
    dt.attach(model, dt.AdapterConfig(rank=2, targets=["router"]))
