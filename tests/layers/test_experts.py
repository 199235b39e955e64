"""Adapters on the fused experts of transformers' mixtures, against the definition with each expert's own weights."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from transformers.integrations import moe
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import doratune as dt
from doratune.layers.experts import ExpertsHost
from doratune.ops import reference, row_norm
from doratune.study.decompose import adapter_change
from helpers import assert_same, enable_checkpointing, error, move, replicas, snapshot

EXPERTS, WIDTH, INNER, TOKENS, CHOSEN = 5, 16, 24, 9, 2
CONFIG = SimpleNamespace(
    num_local_experts=EXPERTS,
    n_routed_experts=EXPERTS,
    hidden_size=WIDTH,
    moe_latent_size=None,
    intermediate_size=INNER,
    moe_intermediate_size=INNER,
    hidden_act="silu",
    mlp_hidden_act="relu2",
    swiglu_alpha=1.702,
    swiglu_limit=7.0,
)


class Mixture(nn.Module):
    """A model of one experts module, beside a layer with the name of an expert's."""

    def __init__(self, kind, implementation="grouped_mm"):
        super().__init__()
        config = copy.copy(CONFIG)
        config._experts_implementation = implementation
        self.experts = kind(config)
        self.down_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, index, weights):
        return self.down_proj(self.experts(x, index, weights))


KINDS = {"mixtral": MixtralExperts, "transposed, bias": GptOssExperts, "no gate": NemotronHExperts}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
every_method = pytest.mark.parametrize(
    "options",
    [{}, {"method": "lora"}, {"rank": 0}, {"norm_gradient": "exact"}],
    ids=["dora", "lora", "magnitude", "exact"],
)
TARGETS = r"experts\..*_proj"


def made(kind=MixtralExperts, **options):
    torch.manual_seed(0)
    model = Mixture(kind, **options)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.requires_grad_(False)


def attached(model, **options):
    return dt.attach(model, dt.AdapterConfig(**{"rank": 2, "targets": TARGETS} | options))


@pytest.fixture
def batch():
    """Hidden states, and experts with weights for each token; the last expert gets no token."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, WIDTH, generator=generator)
    index = torch.rand(TOKENS, EXPERTS - 1, generator=generator).argsort(1)[:, :CHOSEN]
    return x, index, torch.rand(TOKENS, CHOSEN, generator=generator)


def outputs(model, batch):
    """The output in training and evaluation, with and without gradients."""
    found = {}
    for training in (True, False):
        model.train(training)
        found["grad", training] = model(*batch)
        with torch.no_grad():
            found["no_grad", training] = model(*batch)
        with torch.inference_mode():
            found["inference", training] = model(*batch).clone()
    return found


def by_definition(model, name="default"):
    """A float64 copy of the plain experts that loops over them, with weights from the definition, and their leaves."""
    host = model.experts
    assert isinstance(host, ExpertsHost)
    plain = copy.deepcopy(host.base_layer).double()
    plain.config._experts_implementation = "eager"
    leaves, weights = {}, {}
    for part, layer in host._projections.items():
        adapter = layer.adapters[name]
        own = {
            group: getattr(layer, group)[name].detach().double().requires_grad_()
            for group in ("lora_A", "lora_B", "magnitude")
            if name in getattr(layer, group)
        }
        leaves.update({f"{part}.{group}": leaf for group, leaf in own.items()})
        W = layer.base_layer.matrices.detach().double()
        out = W.shape[1]
        A = own.get("lora_A", torch.zeros(EXPERTS, W.shape[2]).double()).unflatten(0, (EXPERTS, -1))
        B = own.get("lora_B", torch.zeros(EXPERTS * out, 1).double()).unflatten(0, (EXPERTS, -1))
        if "magnitude" in own:
            m, how = own["magnitude"].unflatten(0, (EXPERTS, -1)), adapter.config.norm_gradient
            new = [reference.dora_weight(W[i], A[i], B[i], m[i], adapter.scale, how) for i in range(EXPERTS)]
        else:
            new = [reference.lora_weight(W[i], A[i], B[i], adapter.scale) for i in range(EXPERTS)]
        weights[part] = torch.stack(new).mT if plain.is_transposed else torch.stack(new)
        if name in layer.adapter_bias:
            weights[f"{part}_bias"] = layer.adapter_bias[name].detach().double().view(EXPERTS, out)

    def forward(x, index, routing):
        inner = torch.func.functional_call(plain, weights, (x.double(), index, routing.double()))
        return copy.deepcopy(model.down_proj).double()(inner)

    return forward, leaves


@every_method
@every_kind
def test_adapters_act_in_every_mode_and_merge(kind, options, batch):
    model = made(kind)
    base = outputs(model, batch)
    attached(model, **options)
    for mode, y in outputs(model, batch).items():
        assert error(y, base[mode]) < 1e-6
    move(model)
    expected = by_definition(model)[0](*batch)
    for y in outputs(model, batch).values():
        assert error(y, expected) < 1e-5
        assert error(y, base["grad", True]) > 1e-2
    with dt.disabled(model):
        for mode, y in outputs(model, batch).items():
            assert torch.equal(y, base[mode])
    dt.merge(model.eval(), verify=True)
    assert type(model.experts) is kind
    for y in outputs(model, batch).values():
        assert error(y, expected) < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=str)
@every_method
@every_kind
def test_gradients_are_the_references(kind, options, dtype, tolerance, batch):
    x, index, routing = (t.to(dtype) if t.is_floating_point() else t for t in batch)
    model = move(attached(made(kind).to(dtype), **options))
    x.requires_grad_()
    routing.requires_grad_()
    model(x, index, routing).square().sum().backward()
    forward, leaves = by_definition(model)
    wide = x.detach().double().requires_grad_(), index, routing.detach().double().requires_grad_()
    forward(*wide).square().sum().backward()
    assert error(x.grad, wide[0].grad) < tolerance
    assert error(routing.grad, wide[2].grad) < tolerance
    for name, leaf in leaves.items():
        part, group = name.split(".")
        found = getattr(model.experts._projections[part], group)["default"].grad
        assert error(found, leaf.grad) < tolerance, name


def test_an_expert_without_tokens_gets_no_gradient(batch):
    model = move(attached(made()))
    model(*batch).sum().backward()
    layer = model.experts._projections["down_proj"]
    for gradient in (layer.lora_B["default"].grad, layer.magnitude["default"].grad):
        assert not gradient.unflatten(0, (EXPERTS, -1))[-1].any()
        assert gradient.any()


def test_the_kept_output_may_have_eight_bits(batch):
    model = attached(made(), eight_bit_outputs=["gate_up_proj", "experts.down_proj"])
    move(model)
    model(*batch).square().sum().backward()
    forward, leaves = by_definition(model)
    forward(*batch).square().sum().backward()
    for part, layer in model.experts._projections.items():
        assert 1e-5 < error(layer.magnitude["default"].grad, leaves[f"{part}.magnitude"].grad) < 2e-2
        assert error(layer.lora_B["default"].grad, leaves[f"{part}.lora_B"].grad) < 1e-5


def test_dropout_acts_on_the_low_rank_path_alone(batch):
    model = made()
    base = model(*batch)
    attached(model, dropout=0.5).train()
    assert error(model(*batch), base) < 1e-6  # B is 0
    move(model)
    assert error(model(*batch), model(*batch)) > 1e-2
    assert error(model.eval()(*batch), by_definition(model)[0](*batch)) < 1e-5


def test_biases_train_and_merge(batch):
    model = attached(made(GptOssExperts), bias="lora_only")
    move(model)
    y = model(*batch)
    assert error(y, by_definition(model)[0](*batch)) < 1e-5
    y.sum().backward()
    assert model.experts._projections["down_proj"].adapter_bias["default"].grad.any()
    dt.merge(model, verify=True)
    assert error(model(*batch), y) < 1e-5


def test_every_start_is_each_experts_own():
    for init, size in (("default", 16**-0.5), ("gaussian", 0.5), ("orthogonal", 0.25)):
        model = attached(made(), init=init)
        A = model.experts._projections["gate_up_proj"].lora_A["default"].unflatten(0, (EXPERTS, 2))
        if init == "orthogonal":
            assert error(A @ A.mT, torch.eye(2).expand(EXPERTS, 2, 2)) < 1e-5
        else:
            assert 0.5 * size < A.std() < 1.5 * size


@every_method
@every_kind
def test_files(kind, options, batch, tmp_path):
    model = move(attached(made(kind), **options))
    dt.save_adapter(model, tmp_path)
    own = json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "DORATUNE"
    assert own == (options.get("method") != "lora")
    fresh = made(kind)
    dt.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh.eval()(*batch), model.eval()(*batch))
    smaller = made(kind)
    smaller.experts.down_proj = nn.Parameter(smaller.experts.down_proj[:3].clone())
    with pytest.raises(dt.AdapterError, match="expected shape"):
        dt.load_adapter(smaller, tmp_path)


def test_zero_rows_train_as_lora_and_come_back(batch, tmp_path):
    model = made()
    with torch.no_grad():
        model.experts.gate_up_proj[1, 3:6] = 0
    plain = copy.deepcopy(model)
    move(attached(model), amount=0.1)
    m = model.experts._projections["gate_up_proj"].magnitude["default"].view(EXPERTS, -1)
    assert (m[1, 3:6] == 0).all()
    y = model.eval()(*batch)
    assert error(y, by_definition(model)[0](*batch)) < 1e-5
    dt.save_adapter(model, tmp_path)
    dt.load_adapter(plain, tmp_path)
    assert error(plain.eval()(*batch), y) < 1e-6


def test_names_mean_experts_and_layers_alike():
    model = attached(made(), targets=["down_proj"])
    assert {layer.path: layer.kind for layer in dt.summary(model).layers} == {
        "experts.down_proj": "experts",
        "down_proj": "linear",
    }
    assert dt.summary(model).left_alone == {"experts.gate_up_proj": "not among the targets"}


def test_all_linear_leaves_experts_alone():
    model = attached(made(), targets="all-linear")
    assert [layer.path for layer in dt.summary(model).layers] == ["down_proj"]


def test_a_name_in_pefts_files_means_layers_only(batch, tmp_path):
    model = move(attached(made(), targets=r"down_proj"))
    dt.save_adapter(model, tmp_path)
    config = tmp_path / "adapter_config.json"
    options = json.loads(config.read_text())
    assert options["peft_type"] == "LORA"
    config.write_text(json.dumps(options | {"target_modules": ["down_proj"]}))
    fresh = dt.load_adapter(made(), tmp_path)
    assert [layer.path for layer in dt.summary(fresh).layers] == ["down_proj"]
    assert torch.equal(fresh(*batch), model(*batch))


def test_detach_restores_everything():
    model = made(GptOssExperts)
    before = snapshot(model)
    dt.detach(move(attached(model)))
    assert_same(before, snapshot(model))


def test_switching_and_deleting(batch):
    model = made()
    base = model(*batch)
    move(attached(model))
    one = model(*batch)
    dt.attach(model, dt.AdapterConfig(rank=3, method="lora", targets=["gate_up_proj"]), "two")
    move(model)
    two = model(*batch)
    dt.set_adapter(model, "default")
    assert torch.equal(model(*batch), one)
    dt.delete_adapter(model, "default")
    dt.set_adapter(model, "two")
    assert torch.equal(model(*batch), two)
    dt.delete_adapter(model, "two")
    assert type(model.experts) is MixtralExperts
    assert torch.equal(model(*batch), base)


def test_what_evaluation_remembers_follows_changes(batch, monkeypatch):
    model = move(attached(made())).eval()
    norms, original = [], row_norm.squared_row_norm
    monkeypatch.setattr(row_norm, "squared_row_norm", lambda *args: norms.append(1) or original(*args))
    with torch.no_grad():
        before = model(*batch)
        assert torch.equal(model(*batch), before)
        assert len(norms) == 2, "one for each projection, none for the second forward"
        move(model, seed=2)
        assert error(model(*batch), by_definition(model)[0](*batch)) < 1e-5
        assert error(model(*batch), before) > 1e-2


def test_weights_of_experts_are_not_read_past_an_adapter():
    model = attached(made())
    assert model.experts.down_proj.shape == (EXPERTS, WIDTH, INNER)
    with pytest.raises(dt.AdapterError, match=r"experts\.\w+_proj: the model computes with"):
        model.experts.down_proj.sum()
    with dt.disabled(model):
        assert model.experts.down_proj.sum()


def test_nearest_lora_and_changes(batch):
    model = move(attached(made()))
    y = model.eval()(*batch)
    change = adapter_change(model, spectra=True)
    assert dt.convert_to_lora(model, rank=WIDTH).kept == pytest.approx(1)  # every matrix whole
    assert error(model(*batch), y) < 1e-5
    with pytest.raises(dt.AdapterError, match="from 1 to 16"):
        dt.convert_to_lora(model, rank=17, to="other")
    base = dt.base_model(model)
    dt.set_adapter(model, "default")
    merged = dt.study.decompose(base, dt.merge(model))
    for path, found in change.items():
        assert found.direction == pytest.approx(merged[path].direction)
        assert found.spectrum is None  # of several matrices under each other it would say nothing


def test_copies_compute_the_same(batch):
    model = move(attached(made()))
    assert torch.equal(copy.deepcopy(model)(*batch), model(*batch))


@pytest.mark.skipif(
    not hasattr(moe, "_grouped_mm_fallback_backward_fake"), reason="transformers 5.20 cannot compile experts on a CPU"
)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo, of any Function
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # in transformers' own function
def test_compile(batch):
    model = move(attached(made()))
    model(*batch).square().sum().backward()
    eager = {name: p.grad.clone() for name, p in dt.trainable_parameters(model).items()}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(*batch).square().sum().backward()
    for name, p in dt.trainable_parameters(model).items():
        assert error(p.grad, eager[name]) < 1e-5, name
    with torch.no_grad():
        assert error(compiled.eval()(*batch), by_definition(model)[0](*batch)) < 1e-5


def test_refusals():
    model = made()
    model.experts._is_expert_parallel = True
    with pytest.raises(dt.AdapterError, match="expert parallelism"):
        attached(model)
    model = made()
    model.experts.down_proj = nn.Parameter(model.experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(dt.AdapterError, match=r"experts\.down_proj.*float8_e4m3fn"):
        attached(model, targets=["experts.down_proj"])
    with pytest.raises(dt.AdapterError, match=r"experts\.down_proj.*hold float64"):
        attached(made().double(), targets=["experts.down_proj"])
    model = made()
    with pytest.raises(dt.AdapterError, match="contains some: down_proj, gate_up_proj"):
        attached(model, targets=["experts"])


def test_data_parallel_is_refused(monkeypatch):
    model = attached(made())
    with pytest.raises(dt.AdapterError, match="MixtralExperts"):
        replicas(model, monkeypatch)


def test_a_whole_model_trains_with_checkpointing(tmp_path):
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        moe_intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        use_cache=False,
    )
    model = transformers.Qwen3MoeForCausalLM(config)
    dt.attach(model, dt.AdapterConfig(rank=2, targets=["q_proj", "gate_up_proj", "down_proj"]))
    move(model, 0.05).train()
    ids = torch.randint(32, (2, 7))
    model(input_ids=ids, labels=ids).loss.backward()
    plain = {name: p.grad.clone() for name, p in dt.trainable_parameters(model).items()}
    model.zero_grad()
    enable_checkpointing(model)
    model(input_ids=ids, labels=ids).loss.backward()
    for name, p in dt.trainable_parameters(model).items():
        assert error(p.grad, plain[name]) < 1e-6, name
    y = model.eval()(input_ids=ids).logits
    dt.merge(model, verify=True).save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert error(again(input_ids=ids).logits, y) < 1e-5


def test_all_biases_are_those_of_adapted_projections_or_the_modules(batch, tmp_path):
    model = move(attached(made(GptOssExperts), targets=["experts.down_proj"], bias="all"))
    assert set(dt.summary(model).saved) == {"down_proj"}
    dt.save_adapter(model, tmp_path / "one")
    fresh = dt.load_adapter(made(GptOssExperts), tmp_path / "one")
    assert torch.equal(fresh.eval()(*batch), model.eval()(*batch))
    model = attached(made(GptOssExperts), targets=r"down_proj", bias="all")
    assert set(dt.summary(model).saved) == {"experts"}
    with torch.no_grad():
        for name, p in dt.trainable_parameters(model).items():
            if "copies" in name:
                p.add_(0.1)
    dt.save_adapter(model, tmp_path / "two")
    fresh = dt.load_adapter(made(GptOssExperts), tmp_path / "two")
    assert torch.equal(fresh.eval()(*batch), model.eval()(*batch))


def test_offloaded_experts_compute_and_are_not_merged(batch):
    from accelerate import cpu_offload

    torch.manual_seed(1)
    whole = move(attached(made()))
    torch.manual_seed(1)
    model = cpu_offload(made(), execution_device=torch.device("cpu"))
    move(attached(model))
    assert model.experts.base_layer.down_proj.is_meta
    assert error(model(*batch), whole(*batch)) < 1e-6
    model(*batch).sum().backward()
    whole(*batch).sum().backward()
    found, expected = (m.experts._projections["down_proj"].lora_A["default"].grad for m in (model, whole))
    assert error(found, expected) < 1e-5
    with pytest.raises(dt.AdapterError, match=r"experts\.down_proj: accelerate keeps its weight elsewhere"):
        dt.merge(model)
