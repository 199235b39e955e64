"""Adapters on nn.MultiheadAttention and inside nn.TransformerEncoder: in every mode, past every fast path."""

import copy

import pytest
import torch
from torch import nn

import doratune as dt
from doratune.layers.attention import AttentionHost
from doratune.ops import reference
from helpers import assert_same, error, replicas, snapshot

# The base encoder's own fast path makes nested tensors, and torch says that they are a prototype.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

WIDTH = 16
PADDING = torch.zeros(3, 5, dtype=torch.bool)
PADDING[0, 3:] = True


class Attention(nn.Module):
    """A model of one attention module, with query, key and value of its own."""

    def __init__(self, **options):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 4, **options)

    def forward(self, x, **options):
        keys = x[..., : self.attn.kdim]
        values = x[..., : self.attn.vdim]
        return self.attn(x, keys, values, **options)[0]


class SelfAttention(Attention):
    def forward(self, x, **options):
        return self.attn(x, x, x, **options)[0]


class Encoder(nn.Module):
    """A transformer encoder, with or without padding; padded positions are not compared."""

    def __init__(self, layers=2, **options):
        super().__init__()
        nested = not options.get("norm_first", False)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 32, dropout=0.0, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=nested)

    def forward(self, x, padding=None):
        y = self.encoder(x, src_key_padding_mask=padding)
        return y if padding is None else y * (~padding)[..., None]


@pytest.fixture
def x():
    return torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(0))


def made(kind, **options):
    torch.manual_seed(0)
    return kind(**options).requires_grad_(False)


@torch.no_grad()
def moved(model):
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.normal_(std=0.2, generator=generator)
        elif "magnitude" in name:
            p.mul_(1 + 0.3 * torch.rand(p.shape, generator=generator))
    return model


ATTENTIONS = {
    "packed": (SelfAttention, {"batch_first": True}),
    "sequence-first": (SelfAttention, {}),
    "no-bias": (SelfAttention, {"bias": False, "batch_first": True}),
    "separate": (Attention, {"kdim": 8, "vdim": 12, "batch_first": True}),
    "extra-keys": (SelfAttention, {"add_bias_kv": True, "add_zero_attn": True}),
}
every_attention = pytest.mark.parametrize(("kind", "options"), ATTENTIONS.values(), ids=ATTENTIONS)
every_method = pytest.mark.parametrize(
    "config",
    [{}, {"method": "lora"}, {"rank": 0}, {"norm_gradient": "exact"}],
    ids=["dora", "lora", "magnitude", "exact"],
)


def outputs(model, x, **options):
    """The output in training and evaluation, with and without gradients."""
    found = {}
    for training in (True, False):
        model.train(training)
        found["grad", training] = model(x, **options)
        with torch.no_grad():
            found["no_grad", training] = model(x, **options)
        with torch.inference_mode():
            found["inference", training] = model(x, **options).clone()
    return found


def test_float64_keeps_its_digits(x):
    model, x = made(SelfAttention).double(), x.double()
    for p in model.parameters():
        p.div_(3)  # no float32 number
    before = model(x)
    dt.attach(model, dt.AdapterConfig(rank=2))  # changes nothing yet
    assert error(model(x), before) < 1e-12


@every_method
@every_attention
def test_adapters_act_in_every_mode_and_merge(kind, options, config, x):
    model = made(kind, **options)
    base = outputs(model, x)
    dt.attach(model, dt.AdapterConfig(**{"rank": 2} | config))
    for mode, y in outputs(model, x).items():
        assert error(y, base[mode]) < 1e-6
    moved(model)
    expected = reference_output(model, x)
    for y in outputs(model, x).values():
        assert error(y, expected) < 1e-5
        assert error(y, base["grad", True]) > 1e-2
    model.eval()
    dt.merge(model, verify=True)
    assert type(model.attn) is nn.MultiheadAttention
    for y in outputs(model, x).values():
        assert error(y, expected) < 1e-5


def reference_output(model, x):
    """The module itself, in float64, with weights from the definition."""
    host = model.attn
    assert isinstance(host, AttentionHost)
    plain = copy.deepcopy(host.base_layer).double()
    rows = WIDTH
    for index, (name, layer) in enumerate(host._projections.items()):
        adapter = layer.adapters["default"]
        W = layer.base_layer.weight.detach().double()
        A, B = torch.zeros(1, W.shape[1]).double(), torch.zeros(W.shape[0], 1).double()
        if adapter.rank:
            A, B = layer.lora_A["default"].detach().double(), layer.lora_B["default"].detach().double()
        W = reference.lora_weight(W, A, B, adapter.scale)
        if "default" in layer.magnitude:
            W = reference.dora_weight(
                layer.base_layer.weight.detach().double(),
                A,
                B,
                layer.magnitude["default"].detach().double(),
                adapter.scale,
            )
        with torch.no_grad():
            if name == "out_proj":
                plain.out_proj.weight.copy_(W)
            elif plain.in_proj_weight is None:
                getattr(plain, f"{name}_weight").copy_(W)
            else:
                plain.in_proj_weight[index * rows : (index + 1) * rows].copy_(W)
    wide = x.double()
    keys = wide[..., : plain.kdim]
    values = wide[..., : plain.vdim]
    with torch.no_grad():
        return plain.eval()(wide, keys, values)[0]


# In bfloat16 torch's own rounding in the softmax comes through to 4 % (B of the keys); without the norm it is 10 %.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-2)], ids=str)
@every_method
def test_gradients_are_the_references(config, dtype, tolerance, x):
    model, x = made(SelfAttention, batch_first=True).to(dtype), x.to(dtype)
    dt.attach(model, dt.AdapterConfig(**{"rank": 2} | config))
    moved(model)
    model(x).square().sum().backward()
    host = model.attn
    exact = config.get("norm_gradient", "detached")
    leaves, weights = [], {}
    for name, layer in host._projections.items():
        W = layer.base_layer.weight.detach().double()
        own = {}
        for part in ("lora_A", "lora_B", "magnitude"):
            group = getattr(layer, part)
            if "default" in group:
                own[part] = group["default"].detach().double().requires_grad_()
                leaves.append((f"{name}.{part}", group["default"].grad, own[part]))
        A = own.get("lora_A", torch.zeros(1, WIDTH).double())
        B = own.get("lora_B", torch.zeros(WIDTH, 1).double())
        scale = layer.adapters["default"].scale
        if "magnitude" in own:
            weights[name] = reference.dora_weight(W, A, B, own["magnitude"], scale, exact)
        else:
            weights[name] = reference.lora_weight(W, A, B, scale)
    wide = copy.deepcopy(host.base_layer).double()
    replaced = {
        "in_proj_weight": torch.cat([weights[n] for n in ("q_proj", "k_proj", "v_proj")]),
        "out_proj.weight": weights["out_proj"],
    }
    torch.func.functional_call(wide, replaced, (x.double(),) * 3)[0].square().sum().backward()
    for name, found, leaf in leaves:
        # A bias in the keys' direction cancels in the softmax: compare with the largest gradient of its kind.
        assert error(found, leaf.grad) < tolerance, name


def test_single_projections_are_targets(x):
    model = made(SelfAttention, batch_first=True)
    dt.attach(model, dt.AdapterConfig(rank=2, targets=["q_proj", "v_proj"]))
    assert {layer.path for layer in dt.summary(model).layers} == {"attn.q_proj", "attn.v_proj"}
    before = model.attn.base_layer.in_proj_weight[WIDTH : 2 * WIDTH].clone()
    moved(model)
    y = model.eval()(x)
    dt.merge(model)
    assert torch.equal(model.attn.in_proj_weight[WIDTH : 2 * WIDTH], before)
    assert error(model(x), y) < 1e-5


def test_masks_and_attention_weights_pass_through(x):
    model = made(SelfAttention, batch_first=True)
    dt.attach(model, dt.AdapterConfig(rank=2))
    moved(model).eval()
    mask = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
    options = {"attn_mask": mask, "key_padding_mask": PADDING, "average_attn_weights": False}
    with torch.no_grad():
        y, weights = model.attn(x, x, x, **options)
        dt.merge(model)
        plain_y, plain_weights = model.attn(x, x, x, **options)
    assert weights.shape == (3, 4, 5, 5)
    assert error(weights, plain_weights) < 1e-5
    assert error(y, plain_y) < 1e-5


ENCODER_TARGETS = [
    "all-linear",
    ["linear1"],
    ["q_proj"],
    ["out_proj"],
    r".*layers\.1\.linear1",
    r".*layers\.1\..*k_proj",
]


@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("targets", ENCODER_TARGETS, ids=str)
def test_no_fast_path_of_the_encoder_goes_past_an_adapter(targets, norm_first, padding, x):
    model = made(Encoder, norm_first=norm_first)
    base = outputs(model, x, padding=padding)
    dt.attach(model, dt.AdapterConfig(rank=2, targets=targets))
    with dt.disabled(model):
        for mode, y in outputs(model, x, padding=padding).items():
            assert torch.equal(y, base[mode]), "disabled is the base, bit for bit, by the same path"
    moved(model)
    found = outputs(model, x, padding=padding)
    for y in found.values():
        assert error(y, found["grad", True]) < 1e-5
        assert error(y, base["grad", True]) > 1e-2
    model.eval()
    with torch.no_grad():
        dt.merge(model, verify=True)
        assert error(model(x, padding=padding), found["grad", True]) < 1e-5


def test_the_fast_path_would_go_past_without_our_care(x, monkeypatch):
    """The other tests can fail: with plain weights shown, evaluation does not see the adapter."""
    model = made(Encoder)
    dt.attach(model, dt.AdapterConfig(rank=2, targets=["linear1"]))
    moved(model)
    monkeypatch.setattr("doratune.layers.holder.READ", ())
    trained = model.train()(x)
    with torch.no_grad():
        assert error(model.eval()(x), trained) > 1e-2


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo, of any Function
def test_compile_and_autocast(x):
    model = made(Encoder, layers=1)
    dt.attach(model, dt.AdapterConfig(rank=2))
    moved(model)
    y = model.train()(x)
    assert error(torch.compile(model, fullgraph=True, backend="aot_eager")(x), y) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert error(model(x), y) < 5e-2
    with torch.no_grad():
        base = outputs(dt.detach(copy.deepcopy(model)), x)["no_grad", False]
        assert error(torch.compile(model.eval(), fullgraph=True, backend="aot_eager")(x), y) < 1e-5
        assert error(y, base) > 1e-2


def test_detach_restores_everything(x):
    model = made(Encoder)
    before = snapshot(model)
    dt.attach(model, dt.AdapterConfig(rank=2))
    moved(model)
    dt.detach(model)
    assert_same(before, snapshot(model))


def test_switching_and_deleting(x):
    model = made(SelfAttention, batch_first=True)
    dt.attach(model, dt.AdapterConfig(rank=2), "one")
    moved(model)
    one = model(x)
    dt.attach(model, dt.AdapterConfig(rank=3, method="lora", targets=["q_proj"]), "two")
    moved(model)
    two = model(x)
    assert error(one, two) > 1e-2
    dt.set_adapter(model, "one")
    assert error(model(x), two) > 1e-2
    dt.delete_adapter(model, "one")
    dt.set_adapter(model, "two")
    assert torch.equal(model(x), two)
    dt.delete_adapter(model, "two")
    assert type(model.attn) is nn.MultiheadAttention


def test_dropout_is_refused_by_name():
    with pytest.raises(dt.AdapterError, match=r"attn\.q_proj.*dropout"):
        dt.attach(made(SelfAttention), dt.AdapterConfig(dropout=0.1, targets=["q_proj"]))


class VisionTransformer(nn.Module):
    """As open_clip and torchvision build theirs: a patch convolution, packed attention blocks, a head."""

    def __init__(self):
        super().__init__()
        self.conv_proj = nn.Conv2d(3, WIDTH, 4, 4)
        self.class_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.blocks = nn.ModuleList([VisionBlock(), VisionBlock()])
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, images):
        x = self.conv_proj(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


class VisionBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x):
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


def test_a_vision_transformer_trains_in_all_its_parts():
    model = made(VisionTransformer)
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    names = r".*(q_proj|v_proj|out_proj|mlp\.\d|conv_proj)"
    dt.attach(model, dt.AdapterConfig(rank=2, targets=names, modules_to_save=["head"]))
    optimizer = torch.optim.AdamW(dt.parameter_groups(model, lr=1e-2))
    start = {n: p.detach().clone() for n, p in dt.trainable_parameters(model).items()}
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(images), torch.arange(4))
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert all(not torch.equal(p, start[n]) for n, p in dt.trainable_parameters(model).items())
    model.eval()
    with torch.no_grad():
        y = model(images)
        dt.merge(model, verify=True)
        assert error(model(images), y) < 1e-5


def test_data_parallel_is_refused_by_name(x, monkeypatch):
    model = made(SelfAttention)
    dt.attach(model, dt.AdapterConfig(rank=2))
    with pytest.raises(dt.AdapterError, match=r"nn.DataParallel.*use DistributedDataParallel"):
        replicas(model, monkeypatch)
    dt.detach(model)
    assert len(replicas(model, monkeypatch)) == 2


PROJECTIONS = dt.AdapterConfig(rank=2, targets=["q_proj"])
BIASES = dt.AdapterConfig(rank=2, targets=["1"], bias="all")


@pytest.mark.parametrize("first", ["projections", "biases"])
@pytest.mark.parametrize("active", ["projections", "biases"])
def test_biases_of_one_adapter_and_projections_of_another(first, active, x):
    model = nn.Sequential(made(SelfAttention, batch_first=True), nn.Linear(WIDTH, 4)).eval()
    before = snapshot(model)
    base = copy.deepcopy(model)
    adapters = {"projections": PROJECTIONS, "biases": BIASES}
    for name in sorted(adapters, reverse=first == "projections"):
        dt.attach(model, adapters[name], name)
    dt.set_adapter(model, active)
    for name, p in base.named_parameters():  # torch's other ways to compute round otherwise on some processors
        p.requires_grad_(active == "biases" and name.startswith("0.") and "bias" in name)
    with torch.set_grad_enabled(active == "biases"):
        assert torch.equal(model(x), base(x))
    with torch.no_grad():
        for p in dt.trainable_parameters(model).values():
            p.add_(0.1)
        y = model(x)
        assert error(y, base(x)) > 1e-3
        assert error(dt.merge(copy.deepcopy(model))(x), y) < 1e-5
        with dt.disabled(model):
            assert torch.equal(model(x), base(x))
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in dt.trainable_parameters(model).values())
    assert_same(before, snapshot(dt.detach(model)))
