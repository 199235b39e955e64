"""Adapters on whole models."""

import copy
import gc
import os
import pickle

import psutil
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import doratune as dt
from doratune.targets import adapted_layers, holders
from helpers import (
    DORA,
    LORA,
    Block,
    assert_same,
    error,
    gradients,
    ids,
    move,
    output,
    snapshot,
    tiny,
    tiny_llama,
)
from helpers_cases import copy_hook


def loss_of(model, x=None):
    return lambda: model(ids() if x is None else x).square().mean()


def train(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model)().backward()
        optimizer.step()


def parts(model, name):
    return {n: p for n, p in model.named_parameters() if n.endswith("." + name)}


def values(tensors):
    return {n: t.detach().clone() for n, t in tensors.items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(t, second[n]) for n, t in first.items())


# Attach and detach


@pytest.mark.parametrize("value", [1e20, -float("inf"), float("nan")])
def test_rows_without_a_norm_are_told(value, caplog):
    model = tiny()
    with torch.no_grad():
        model.layers[0].up.weight[3, 2] = value
    dt.attach(model, DORA)
    (message,) = caplog.messages
    assert message.startswith("layers.0.up: 1 rows of the weight have no norm")


@pytest.mark.parametrize("config", [DORA, LORA], ids=["dora", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attach_changes_nothing_and_detach_gives_the_base_back(dtype, config):
    model = tiny().to(dtype)
    model.layers[1].up.weight.requires_grad_(False)
    model.embed.eval()
    before = snapshot(model)
    x = ids()
    expected = output(model, x)
    assert dt.attach(model, config) is model
    assert torch.equal(output(model, x), expected)
    move(model)
    optimizer = torch.optim.AdamW(dt.trainable_parameters(model).values(), lr=0.1, weight_decay=0.1)
    train(model, optimizer)
    assert not torch.equal(output(model, x), expected)
    with dt.disabled(model):
        assert torch.equal(output(model, x), expected)
    assert dt.detach(model) is model
    assert torch.equal(output(model, x), expected)
    assert_same(before, snapshot(model))


def test_only_the_adapter_trains():
    model = tiny()
    dt.attach(model, DORA)
    base = {n: p for n, p in model.named_parameters() if ".default" not in n}
    before = values(base)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names == set(dt.trainable_parameters(model))
    assert all(n.endswith((".lora_A.default", ".lora_B.default", ".magnitude.default")) for n in names)
    assert len(names) == 3 * 8
    start = values(dt.trainable_parameters(model))
    train(model, torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1), steps=2)
    assert equal(before, base)
    assert all(p.grad is None for p in base.values())
    after = dt.trainable_parameters(model)
    assert all(not torch.equal(start[n], after[n]) for n in names)


def test_not_trainable_is_not_trained():
    model = tiny()
    dt.attach(model, DORA, trainable=False)
    assert not dt.trainable_parameters(model)
    move(model)
    before = values(dict(model.named_parameters()))
    assert not model(ids()).requires_grad
    dt.attach(model, LORA, "second")
    train(model, torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1))
    assert equal(before, {n: p for n, p in model.named_parameters() if n in before})
    dt.set_adapter(model, "default")
    assert not dt.trainable_parameters(model)


class Failing(dt.AdapterConfig):
    """Fails at the third layer, after some have been prepared."""

    def scale_of(self, path):
        if path == "layers.0.up":
            raise RuntimeError("in the middle")
        return super().scale_of(path)


@pytest.mark.parametrize("already", [False, True], ids=["plain", "adapted"])
@pytest.mark.parametrize("trained", [False, True])
def test_an_error_in_the_middle_leaves_the_model_as_it_was(trained, already):
    model = tiny()
    model.requires_grad_(trained)
    if already:
        dt.attach(model, DORA)
        move(model)
    before = snapshot(model)
    x = ids()
    expected = output(model, x)
    with pytest.raises(RuntimeError, match="in the middle"):
        dt.attach(model, Failing(rank=2, bias="all", modules_to_save=["lm_head"]), "second")
    assert_same(before, snapshot(model))
    assert torch.equal(output(model, x), expected)
    assert dt.adapter_names(model) == (["default"] if already else [])
    dt.attach(model, dt.AdapterConfig(rank=2), "second")  # the name is still free


UNREADABLE = ["", "a.b", "a b", "ä", "a/b", "../x", "a\n"]
METHODS_OF_CONTAINERS = ["keys", "values", "training", "update", "forward", "pop"]


def test_attach_walks_over_the_model_as_often_whatever_the_number_of_layers():
    class Counted(nn.Sequential):
        walks = 0

        def named_modules(self, *args, **kwargs):
            Counted.walks += 1
            return super().named_modules(*args, **kwargs)

    def walks(layers):
        model = Counted(*(nn.Linear(2, 2) for _ in range(layers)))
        Counted.walks = 0
        dt.attach(model, dt.AdapterConfig(rank=1, targets=r"\d+"))
        return Counted.walks

    assert walks(30) == walks(3)


@pytest.mark.parametrize("name", UNREADABLE + METHODS_OF_CONTAINERS)
def test_bad_names(name):
    model = tiny()
    before = snapshot(model)
    with pytest.raises(dt.AdapterError, match="adapter name"):
        dt.attach(model, DORA, name)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("name", ["default", "A-1_b", "0", "weight", "base_layer"])
def test_good_names(name):
    model = tiny()
    x = ids()
    before = output(model, x)
    dt.attach(model, dt.AdapterConfig(rank=2, modules_to_save=["lm_head"], bias="lora_only"), name)
    assert torch.equal(output(model, x), before)
    assert dt.adapter_names(model) == [name]
    dt.delete_adapter(model, name)
    assert not holders(model)


def test_names_are_unique_and_unknown_ones_refused():
    model = tiny()
    dt.attach(model, DORA)
    before = snapshot(model)
    with pytest.raises(dt.AdapterError, match="already has an adapter 'default'"):
        dt.attach(model, LORA)
    for function in (dt.set_adapter, dt.delete_adapter):
        with pytest.raises(dt.AdapterError, match="no adapter 'lost'; it has default"):
            function(model, "lost")
    assert_same(before, snapshot(model))


# Several adapters


def two_adapters():
    model = tiny()
    dt.attach(model, DORA, "first")
    dt.attach(model, dt.AdapterConfig(rank=2, method="lora", targets=["up", "embed"], bias="all"), "second")
    move(model, name="first")
    move(model, name="second", seed=2)
    return model


def test_names_come_in_the_order_of_attaching_whatever_their_layers():
    model = tiny()
    for name, targets in {"first": ["down"], "second": ["q_proj", "down"], "third": ["embed"]}.items():
        dt.attach(model, dt.AdapterConfig(rank=2, targets=targets), name)
    assert dt.adapter_names(model) == ["first", "second", "third"]
    dt.delete_adapter(model, "first")
    dt.attach(model, LORA, "first")
    assert dt.adapter_names(model) == dt.adapter_names(copy.deepcopy(model)) == ["second", "third", "first"]


def test_one_adapter_is_active_and_the_order_does_not_matter():
    x = ids()
    alone = {}
    for name, config in (("first", DORA), ("second", LORA)):
        model = tiny()
        dt.attach(model, config, name)
        state = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for _, p in sorted(parts(model, name).items()):
                p.copy_(torch.randn(p.shape, generator=state))
        alone[name] = (output(model, x), values(parts(model, name)))
    for order in (("first", "second"), ("second", "first")):
        model = tiny()
        for name in order:
            dt.attach(model, {"first": DORA, "second": LORA}[name], name)
        assert dt.adapter_names(model) == list(order)
        assert dt.active_adapter(model) == order[1]
        with torch.no_grad():
            for name in order:
                for n, p in parts(model, name).items():
                    p.copy_(alone[name][1][n])
        for name in ("first", "second", "first"):
            dt.set_adapter(model, name)
            assert dt.active_adapter(model) == name
            assert torch.equal(output(model, x), alone[name][0])


@pytest.mark.parametrize("reverse", [False, True])
def test_adapters_with_different_roles_on_one_layer(reverse):
    """One adapts q_proj, the other trains its bias only; which came first makes no difference."""
    configs = {
        "adapts": dt.AdapterConfig(rank=2, targets=["q_proj"]),
        "bias": dt.AdapterConfig(rank=2, targets=["up"], bias="all"),
        "whole": dt.AdapterConfig(rank=2, targets=["up"], modules_to_save=["q_proj"]),
    }
    model = tiny()
    x = ids()
    before = output(model, x)
    order = list(configs)[::-1] if reverse else list(configs)
    for name in order:
        dt.attach(model, configs[name], name)
        assert torch.equal(output(model, x), before)
    for name, config in configs.items():
        alone = dt.attach(tiny(), config, name)
        dt.set_adapter(model, name)
        trained, expected = (sorted(p.shape for p in dt.trainable_parameters(m).values()) for m in (model, alone))
        assert trained == expected, name
        train(model, torch.optim.SGD(dt.trainable_parameters(model).values(), lr=0.1))
        assert not torch.equal(output(model, x), before)
        with dt.disabled(model):
            assert torch.equal(output(model, x), before)
        twin = copy.deepcopy(model)
        moved = output(twin, x)
        assert error(output(dt.merge(twin), x), moved) < 1e-5
    dt.detach(model)
    assert torch.equal(output(model, x), before)


def test_what_is_inactive_does_not_move():
    model = two_adapters()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for active, idle in (("first", "second"), ("second", "first"), ("first", "second")):
        dt.set_adapter(model, active)
        assert all(f".{active}" in n for n in dt.trainable_parameters(model))
        resting = {n: p for n, p in model.named_parameters() if f".{idle}" in n}
        before = values(resting)
        moving = values(dt.trainable_parameters(model))
        train(model, optimizer, 2)
        assert equal(before, resting)
        now = dt.trainable_parameters(model)
        assert all(not torch.equal(t, now[n]) for n, t in moving.items())


def test_gradients_left_over_do_not_move_an_adapter_after_a_switch():
    model = two_adapters()
    dt.set_adapter(model, "first")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model)().backward()
    before = values(parts(model, "first"))
    dt.set_adapter(model, "second")
    loss_of(model)().backward()
    optimizer.step()
    assert equal(before, parts(model, "first"))


def test_optimiser_state_survives_a_switch():
    model = two_adapters()
    dt.set_adapter(model, "first")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    train(model, optimizer)
    own = dt.trainable_parameters(model)
    state = {n: {k: v.clone() for k, v in optimizer.state[p].items()} for n, p in own.items()}
    identity = {n: id(p) for n, p in own.items()}
    dt.set_adapter(model, "second")
    train(model, optimizer)
    dt.set_adapter(model, "first")
    own = dt.trainable_parameters(model)
    assert {n: id(p) for n, p in own.items()} == identity
    for n, p in own.items():
        assert all(torch.equal(v, optimizer.state[p][k]) for k, v in state[n].items())


def test_deleting_one_leaves_the_other():
    model = two_adapters()
    x = ids()
    dt.set_adapter(model, "second")
    second = output(model, x)
    base = output(tiny(), x)
    dt.delete_adapter(model, "first")
    assert dt.adapter_names(model) == ["second"]
    assert dt.active_adapter(model) == "second"
    assert torch.equal(output(model, x), second)
    assert set(adapted_layers(model)) == {"embed", "layers.0.up", "layers.1.up"}
    dt.delete_adapter(model, "second")
    assert torch.equal(output(model, x), base)
    assert all(p.requires_grad for p in model.parameters())
    assert not holders(model)


def test_deleting_the_active_one_leaves_the_base():
    model = two_adapters()
    x = ids()
    dt.delete_adapter(model, "second")
    assert dt.active_adapter(model) is None
    assert torch.equal(output(model, x), output(tiny(), x))
    assert not dt.trainable_parameters(model)


def test_disabled_nests_and_recovers_from_errors():
    model = two_adapters()
    x = ids()
    moved, base = output(model, x), output(tiny(), x)
    with dt.disabled(model):
        with dt.disabled(model):
            assert torch.equal(output(model, x), base)
        assert torch.equal(output(model, x), base)
    with pytest.raises(ZeroDivisionError), dt.disabled(model):
        raise ZeroDivisionError
    assert torch.equal(output(model, x), moved)


def test_the_base_as_a_model_of_its_own_shares_the_weights():
    model = two_adapters()
    x, before = ids(), snapshot(model)
    base = dt.base_model(model)
    assert torch.equal(output(base, x), output(tiny(), x))
    assert_same(snapshot(model), before)
    assert not holders(base)
    assert not dt.trainable_parameters(base)
    assert not base.training
    own = {p.data_ptr() for p in model.parameters()} | {b.data_ptr() for b in model.buffers()}
    assert all(tensor.data_ptr() in own for tensor in base.state_dict().values())
    train(model, torch.optim.SGD(dt.trainable_parameters(model).values(), lr=0.1))
    assert torch.equal(output(base, x), output(tiny(), x))
    dt.detach(dt.attach(base, DORA))
    assert not dt.trainable_parameters(base), "these weights are the frozen ones of the other"


def test_a_model_without_adapters_is_itself_the_base():
    with pytest.raises(dt.AdapterError, match="the model has no adapter: it is itself the base"):
        dt.base_model(tiny())


# Around training


def test_parameter_groups():
    model = tiny()
    dt.attach(model, dt.AdapterConfig(rank=2, bias="all", modules_to_save=["lm_head"]))
    groups = {g["name"]: g for g in dt.parameter_groups(model, lr=0.1, magnitude_lr=0.3, weight_decay=0.05)}
    names = {id(p): n for n, p in dt.trainable_parameters(model).items()}
    found = {key: {names[id(p)] for p in g["params"]} for key, g in groups.items()}
    assert sorted(n for ns in found.values() for n in ns) == sorted(names.values())
    assert all(".magnitude." in n for n in found["magnitudes"])
    assert all("bias" in n for n in found["biases"])
    assert "lm_head.copies.default.weight" in found["weights"]
    assert {key: (g["lr"], g["weight_decay"]) for key, g in groups.items()} == {
        "weights": (0.1, 0.05),
        "biases": (0.1, 0.0),
        "magnitudes": (0.3, 0.0),
    }
    (_, _, last) = dt.parameter_groups(model, lr=0.1, magnitude_weight_decay=0.2)
    assert (last["lr"], last["weight_decay"]) == (0.1, 0.2)
    torch.optim.AdamW(dt.parameter_groups(model, lr=0.1))


def test_groups_without_parameters_are_left_out():
    model = tiny()
    dt.attach(model, LORA)
    assert [g["name"] for g in dt.parameter_groups(model, lr=0.1)] == ["weights"]


@pytest.mark.parametrize("use", [lambda m: dt.attach(m, LORA), lambda m: dt.load_adapter(m, "adapter"), dt.merge])
def test_what_is_no_model_is_refused(use):
    with pytest.raises(dt.AdapterError, match=r"model: expected a torch\.nn\.Module, found a str"):
        use("org/model")


def test_nothing_to_train_is_told_before_the_optimiser_is_made(tmp_path):
    model = tiny()
    dt.attach(model, LORA)
    dt.save_adapter(model, tmp_path)
    frozen = tiny()
    dt.load_adapter(frozen, tmp_path)
    with pytest.raises(dt.AdapterError, match=r"no parameter of the model is to be trained: .* trainable=True"):
        dt.parameter_groups(frozen, lr=0.1)
    dt.load_adapter(frozen, tmp_path, "second", trainable=True)
    assert dt.parameter_groups(frozen, lr=0.1)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_.*able. is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("config", [DORA, LORA], ids=["dora", "lora"])
def test_checkpointing_of_a_transformers_model(config, reentrant):
    """Also when only adapters need gradients, whose inputs come from frozen embeddings."""
    model = tiny_llama()
    dt.attach(model, config)
    move(model)
    model.train()
    x = ids(vocabulary=32)

    def loss():
        return model(x, labels=x, use_cache=False).loss

    expected = gradients(model, loss)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = gradients(model, loss)
    assert expected.keys() == found.keys() == set(dt.trainable_parameters(model))
    assert all(error(found[n], expected[n]) < 1e-5 for n in expected)
    dt.detach(model)
    hooks = [hook for m in model.modules() for hook in m._forward_hooks.values()]
    assert not [hook for hook in hooks if type(hook).__module__.startswith("doratune")]


@pytest.mark.parametrize("offload", [False, True])
def test_checkpointed_blocks(offload):
    class Checkpointed(Block):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False) if self.on else super().forward(x)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(13, 16), Checkpointed(), Checkpointed())
    dt.attach(model, dt.AdapterConfig(rank=2, targets=["q_proj", "up", "down"]))
    move(model)
    results = []
    for on in (False, True):
        model[1].on = model[2].on = on
        context = torch.autograd.graph.save_on_cpu() if offload else torch.enable_grad()
        with context:
            results.append(gradients(model, loss_of(model)))
    assert all(error(results[1][n], g) < 1e-5 for n, g in results[0].items())


def test_training_reduces_the_loss_and_agrees_with_the_merged_model():
    model = tiny()
    dt.attach(model, DORA)
    optimizer = torch.optim.AdamW(dt.parameter_groups(model, lr=0.02, weight_decay=0.01))
    x = ids()
    first = None
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten())
        first = first or loss.item()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first
    expected = output(model, x)
    assert error(output(dt.merge(model, verify=True), x), expected) < 1e-5


@pytest.mark.parametrize("autocast", [False, True])
def test_accumulated_gradients_equal_those_of_the_whole_batch(autocast):
    model = tiny()
    dt.attach(model, DORA)
    move(model)
    x = ids(shape=(4, 5))

    def whole():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(x).float().square().sum()

    def halves():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return sum(model(part).float().square().sum() for part in x.chunk(2))

    expected, found = gradients(model, whole), gradients(model, halves)
    assert all(error(found[n], g) < (2e-2 if autocast else 1e-5) for n, g in expected.items())


def test_three_hundred_steps_do_not_grow():
    model = tiny()
    dt.attach(model, dt.AdapterConfig(rank=2, dropout=0.1))
    optimizer = torch.optim.AdamW(dt.parameter_groups(model, lr=1e-3))
    process = psutil.Process(os.getpid())

    def live():
        gc.collect()
        return sum(1 for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter))

    counts, sizes = [], []
    for step in range(301):
        optimizer.zero_grad()
        model(ids(shape=(2, 8))).relu_().square().mean().backward()
        optimizer.step()
        if step % 100 == 0 and step:
            # evaluation in between, where scales are remembered
            output(model, ids())
            counts.append(live())
            sizes.append(process.memory_info().rss)
    assert counts[2] <= counts[0]  # what earlier tests left may go meanwhile
    assert sizes[2] - sizes[0] < 8 * 2**20


def test_no_cycle_keeps_a_graph_alive():
    """What a step has made goes when its loss goes, without waiting for the garbage collector."""
    model = tiny()
    dt.attach(model, DORA)

    def live():
        return sum(1 for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter))

    model(ids()).sum().backward()
    gc.collect()
    gc.disable()
    try:
        before = live()
        for _ in range(3):
            model(ids()).sum()
            model(ids()).relu_().sum().backward()
        assert live() == before
    finally:
        gc.enable()


# Copies, dtypes, devices


def test_copies_and_pickles():
    model = two_adapters()
    dt.set_adapter(model, "first")
    x = ids()
    expected = output(model, x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert dt.active_adapter(twin) == "first"
        assert torch.equal(output(twin, x), expected)
        train(twin, torch.optim.SGD(dt.trainable_parameters(twin).values(), lr=0.1))
        assert torch.equal(output(model, x), expected)
        dt.set_adapter(twin, "second")
        assert dt.active_adapter(model) == "first"
        dt.detach(twin)
        assert all(p.requires_grad for p in twin.parameters())
        assert torch.equal(output(model, x), expected)


def test_casting_the_model_does_not_round_the_adapter():
    model = tiny()
    dt.attach(model, dt.AdapterConfig(rank=2, bias="lora_only"))
    move(model)
    before = values(dt.trainable_parameters(model))
    expected = output(model, ids())
    model.to(torch.bfloat16)
    assert equal(before, dt.trainable_parameters(model))
    assert model.layers[0].up.weight.dtype == torch.bfloat16
    assert error(output(model, ids()), expected) < 3e-2
    model.float()
    assert equal(before, dt.trainable_parameters(model))


def test_a_base_with_hooks_keeps_them():
    model = tiny()
    calls = []
    up = model.layers[0].up
    up.register_forward_hook(copy_hook)
    up.register_full_backward_hook(lambda m, gi, go: calls.append("backward"))
    up.register_forward_pre_hook(lambda m, i: calls.append("forward"))
    x = ids()
    before = output(model, x)
    dt.attach(model, DORA)
    calls.clear()
    assert torch.equal(output(model, x), before)
    assert calls == ["forward"]
    gradients(model, loss_of(model))
    assert calls == ["forward", "forward", "backward"]
    move(model)
    expected = output(model, x)
    dt.merge(model)
    calls.clear()
    assert error(output(model, x), expected) < 1e-5
    assert calls == ["forward"]


# Shared modules and tied weights


class Sharing(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.blocks = nn.ModuleList([self.first, nn.Linear(4, 4)])

    def forward(self, x):
        return self.blocks[1](self.second(torch.tanh(self.first(x))))


def test_a_shared_module_has_one_adapter_in_all_its_places():
    torch.manual_seed(0)
    model = Sharing()
    x = torch.randn(3, 4)
    before = model(x)
    dt.attach(model, dt.AdapterConfig(rank=2))
    assert torch.equal(model(x), before)
    assert model.first is model.second is model.blocks[0]
    assert len(dt.trainable_parameters(model)) == 6
    move(model)
    expected = model(x)
    twin = copy.deepcopy(model)
    assert error(dt.merge(twin)(x), expected) < 1e-5
    assert twin.first is twin.second is twin.blocks[0]
    dt.detach(model)
    assert torch.equal(model(x), before)
    assert model.first is model.second is model.blocks[0]


@pytest.mark.parametrize("targets", [["embed"], ["lm_head"], ["embed", "lm_head"]], ids=str)
def test_tied_weights_train_apart_and_are_untied_by_merging(targets):
    model = tiny(tied=True)
    x = ids()
    before = output(model, x)
    dt.attach(model, dt.AdapterConfig(rank=2, targets=targets))
    assert torch.equal(output(model, x), before)
    move(model)
    expected = output(model, x)
    dt.merge(model)
    assert error(output(model, x), expected) < 1e-5
    assert model.embed.weight is not model.lm_head.weight


def test_tied_weights_stay_tied_while_adapted_and_after_detaching():
    model = tiny(tied=True)
    dt.attach(model, dt.AdapterConfig(rank=2, targets=["embed", "lm_head"]))
    assert model.embed.weight is model.lm_head.base_layer.weight
    dt.detach(model)
    assert model.embed.weight is model.lm_head.weight


# Models without data


def on_meta(config=DORA, **options):
    with torch.device("meta"):
        model = tiny(**options)
    return dt.attach(model, config)


@pytest.mark.parametrize("config", [DORA, LORA], ids=["dora", "lora"])
@pytest.mark.parametrize("how", ["assign", "to_empty", "in place"])
def test_attach_on_meta_then_load_the_base(how, config):
    plain = tiny()
    model = on_meta(config)
    if how == "assign":
        missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False, assign=True)
        assert (missing, unexpected) == ([], [])
    elif how == "to_empty":
        model.to_empty(device="cpu")
        model.load_state_dict(plain.state_dict(), strict=False)
    else:
        model.to_empty(device="cpu")
        with torch.no_grad():
            for p, q in zip(
                (p for n, p in model.named_parameters() if ".default" not in n), plain.parameters(), strict=True
            ):
                p.copy_(q)
    x = ids()
    assert torch.equal(output(model, x), output(plain, x))
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    train(model, torch.optim.Adam(dt.trainable_parameters(model).values(), lr=0.1))
    expected = output(model, x)
    assert not torch.equal(expected, output(plain, x))
    assert error(output(dt.merge(model), x), expected) < 1e-5


@pytest.mark.parametrize("assign", [True, False])
def test_attach_on_meta_then_load_base_and_adapter(assign):
    trained = dt.attach(tiny(), DORA)
    move(trained)
    model = on_meta()
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(trained.state_dict(), assign=assign)
    x = ids()
    assert torch.equal(output(model, x), output(trained, x))
    train(model, torch.optim.Adam(dt.trainable_parameters(model).values(), lr=0.1))


@pytest.mark.parametrize("assign", [True, False])
def test_a_base_that_comes_in_pieces(assign):
    """As sharded checkpoints do: every piece holds some layers, and none the adapter's parameters."""
    plain = tiny()
    state = plain.state_dict()
    model = on_meta()
    if not assign:
        model.to_empty(device="cpu")
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(7.0)
    for key in state:
        model.load_state_dict({key: state[key]}, strict=False, assign=assign)
    assert torch.equal(output(model, ids()), output(plain, ids()))


def test_two_adapters_on_meta_of_which_one_is_loaded():
    trained = dt.attach(tiny(), DORA, "first")
    move(trained)
    with torch.device("meta"):
        model = tiny()
    dt.attach(model, DORA, "first")
    dt.attach(model, LORA, "second")
    model.load_state_dict(trained.state_dict(), strict=False, assign=True)
    x = ids()
    assert torch.equal(output(model, x), output(tiny(), x))  # second, fresh
    dt.set_adapter(model, "first")
    assert torch.equal(output(model, x), output(trained, x))


def test_loading_reports_keys_that_do_not_fit_as_torch_does():
    model = dt.attach(tiny(), DORA)
    state = tiny().state_dict()
    state["nonsense"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"nonsense"):
        model.load_state_dict(state)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert unexpected == ["nonsense"]
    assert all(".default" in n for n in missing)


# The whole model compiled


def test_a_compiled_model_trains_as_the_eager_one():
    model = tiny()
    dt.attach(model, DORA)
    move(model)
    expected = gradients(model, loss_of(model))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = gradients(model, loss_of(compiled))
    assert all(error(found[n], g) < 1e-5 for n, g in expected.items())
    dt.set_adapter(compiled, "default")
    with dt.disabled(compiled), torch.no_grad():
        assert error(compiled(ids()), tiny()(ids())) < 1e-5
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo looks
def test_blocks_compiled_one_by_one_may_have_different_scales():
    """The second block runs through the first one's code; what differs, alpha and rank, must not break it."""
    model = tiny()
    dt.attach(model, dt.AdapterConfig(rank=2, alpha_pattern={"0.up": 7.5, "1.up": 3.25}, rank_pattern={"1.down": 3}))
    move(model)
    expected = gradients(model, loss_of(model))
    torch._dynamo.reset()
    for block in model.layers:
        block.compile(fullgraph=True, backend="aot_eager")
    found = gradients(model, loss_of(model))
    assert all(error(found[n], g) < 1e-5 for n, g in expected.items())
    torch._dynamo.reset()


def test_weights_that_accelerate_keeps_elsewhere(tmp_path):
    from accelerate import cpu_offload

    def made(offloaded):
        model = tiny_llama()
        return cpu_offload(model, execution_device=torch.device("cpu")) if offloaded else model

    expected, model = move(dt.attach(made(False), DORA)), made(True)
    assert any(p.is_meta for p in model.parameters())
    move(dt.attach(model, DORA))
    assert {p.device.type for p in dt.trainable_parameters(model).values()} == {"cpu"}
    x = ids()
    for one in (expected, model):
        one(input_ids=x, labels=x).loss.backward()
    grads = {n: p.grad for n, p in dt.trainable_parameters(expected).items()}
    assert all(error(p.grad, grads[n]) < 1e-5 for n, p in dt.trainable_parameters(model).items())
    dt.save_adapter(model, tmp_path)
    again = dt.load_adapter(made(True), tmp_path).eval()
    with torch.no_grad():
        assert error(again(x).logits, expected.eval()(x).logits) < 1e-5
    with pytest.raises(dt.AdapterError, match="accelerate keeps its weight elsewhere between forwards"):
        dt.merge(again)
