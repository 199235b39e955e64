"""Whatever is done to a model in whatever order, it computes what its parameters say, and the rest stays as it was."""

import copy
import pickle
import tempfile

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import doratune as dt
from doratune.ops import reference
from doratune.targets import adapted_layers, saved_modules
from helpers import TinyModel, error, ids, move, tiny

names = st.sampled_from(["a", "b", "c"])
configs = st.builds(
    lambda norm, **options: dt.AdapterConfig(**options, **norm),
    method=st.sampled_from(["dora", "lora"]),
    rank=st.integers(1, 3),
    alpha=st.sampled_from([1.0, 4.0]),
    targets=st.sampled_from(["all-linear", ["q_proj", "down"], ["embed", "up"], ["lm_head", "v_proj"]]),
    norm=st.sampled_from([{}, {"norm_gradient": "exact"}, {"norm_refresh": "step"}]),
    bias=st.sampled_from(["none", "lora_only"]),
    modules_to_save=st.sampled_from([(), ("norm",)]),
)


def copied(parameters):
    return {key: t.detach().clone() for key, t in parameters.items()}


class Lifecycle(RuleBasedStateMachine):
    """A model, and beside it what it should be: its base, the adapters' parameters, the active one."""

    @initialize()
    def begin(self):
        self.model = tiny()
        self.base = copied(dict(self.model.named_parameters()))
        self.adapters = {}
        self.trains = {}
        self.active = None
        self.moves = 0

    def parameters(self, name):
        found = {}
        for path, layer in adapted_layers(self.model).items():
            for part in ("lora_A", "lora_B", "magnitude", "adapter_bias"):
                if name in (group := getattr(layer, part)):
                    found[path, part] = group[name]
        for path, module in saved_modules(self.model).items():
            if name in module.copies:
                found |= {(path, part): p for part, p in module.copies[name].named_parameters()}
        return found

    def add(self, name, trainable):
        self.active, self.trains[name] = name, trainable
        self.adapters[name] = copied(self.parameters(name))

    def weights(self, parts):
        """The plain model's parameters in float64, as the definition makes them from an adapter's."""
        plain = {name: t.double() for name, t in self.base.items()}
        for path, layer in adapted_layers(self.model).items():
            adapter = layer.adapters.get(self.active)
            if adapter is None or not parts:
                continue
            A, B, m = (parts.get((path, part)) for part in ("lora_A", "lora_B", "magnitude"))
            W = plain[f"{path}.weight"].T if path == "embed" else plain[f"{path}.weight"]
            if m is None:
                W = reference.lora_weight(W, A, B, adapter.scale)
            else:
                W = reference.dora_weight(W, A, B, m, adapter.scale, adapter.config.norm_gradient)
            plain[f"{path}.weight"] = W.T if path == "embed" else W
            if (path, "adapter_bias") in parts:
                plain[f"{path}.bias"] = parts[path, "adapter_bias"]
        return plain | {f"{path}.{part}": p for (path, part), p in parts.items() if part in ("weight", "bias")}

    def expected(self, parts=None):
        if parts is None:
            parts = {key: t.double() for key, t in self.adapters.get(self.active, {}).items()}
        return torch.func.functional_call(TinyModel().double(), self.weights(parts), ids())

    def is_training(self):
        return self.active is not None and self.trains[self.active]

    # What is done

    @rule(name=names, config=configs, trainable=st.booleans())
    def attach(self, name, config, trainable):
        if name in self.adapters:
            with pytest.raises(dt.AdapterError, match="already"):
                dt.attach(self.model, config, name)
        else:
            dt.attach(self.model, config, name, trainable=trainable)
            self.add(name, trainable)

    @rule(name=names)
    def switch(self, name):
        if name not in self.adapters:
            with pytest.raises(dt.AdapterError, match=name):
                dt.set_adapter(self.model, name)
        else:
            dt.set_adapter(self.model, name)
            self.active = name

    @precondition(lambda self: self.adapters)
    @rule(data=st.data())
    def delete(self, data):
        name = data.draw(st.sampled_from(sorted(self.adapters)))
        dt.delete_adapter(self.model, name)
        del self.adapters[name], self.trains[name]
        self.active = None if self.active == name else self.active

    @precondition(lambda self: self.adapters)
    @rule(data=st.data(), name=names, trainable=st.booleans())
    def save_and_load(self, data, name, trainable):
        saved = data.draw(st.sampled_from(sorted(self.adapters)))
        if name in self.adapters:
            return
        with tempfile.TemporaryDirectory() as folder:
            dt.save_adapter(self.model, folder, saved)
            dt.load_adapter(self.model, folder, name, trainable=trainable)
        self.add(name, trainable)
        for key, t in self.adapters[saved].items():
            assert torch.equal(t, self.adapters[name][key]), key

    @rule()
    def detach(self):
        dt.detach(self.model)
        self.adapters, self.trains, self.active = {}, {}, None

    @precondition(lambda self: self.active is not None)
    @rule()
    def move(self):
        self.moves += 1
        move(self.model, seed=self.moves)
        self.adapters[self.active] = copied(self.parameters(self.active))

    @precondition(is_training)
    @rule(optimizer=st.sampled_from([torch.optim.SGD, torch.optim.AdamW]), fused=st.booleans())
    def step(self, optimizer, fused):
        """Gradients are the definition's, too."""
        leaves = {key: t.double().requires_grad_() for key, t in self.adapters[self.active].items()}
        wanted = torch.autograd.grad(self.expected(leaves).square().mean(), list(leaves.values()))
        steps = optimizer(dt.parameter_groups(self.model, lr=0.05), fused=fused)
        self.model(ids()).square().mean().backward()
        for (key, p), grad in zip(self.parameters(self.active).items(), wanted, strict=True):
            assert error(p.grad, grad) < 1e-3, key
        steps.step()
        steps.zero_grad()
        self.adapters[self.active] = copied(self.parameters(self.active))

    @rule(training=st.booleans())
    def mode(self, training):
        self.model.train(training)

    @rule()
    def change_base(self):
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if name.endswith(("q_proj.weight", "q_proj.base_layer.weight")):
                    p.mul_(1.1)
        for name, t in self.base.items():
            if name.endswith("q_proj.weight"):
                t.mul_(1.1)

    @rule(how=st.sampled_from([copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]))
    def copy(self, how):
        self.model = how(self.model)

    @rule()
    def cast_there_and_back(self):
        self.model.double().float()

    @rule()
    def load_state_dict(self):
        state = copied(self.model.state_dict())
        with torch.no_grad():
            for p in self.model.parameters():
                p.mul_(2)
        self.model(ids())
        self.model.load_state_dict(state)

    @precondition(lambda self: self.active is not None)
    @rule()
    def merge_a_copy(self):
        model = dt.merge(copy.deepcopy(self.model), verify=True)
        assert error(model(ids()), self.expected()) < 1e-4

    @rule()
    def freeze_scales(self):
        with torch.no_grad(), dt.frozen_scales(self.model):
            for _ in range(2):
                assert error(self.model(ids()), self.expected()) < 1e-4

    # What always holds

    @invariant()
    def the_model_computes_what_its_parameters_say(self):
        expected, base = self.expected(), self.expected({})
        for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
            with context:
                assert error(self.model(ids()), expected) < 1e-4
        with dt.disabled(self.model):
            assert error(self.model(ids()), base) < 1e-5
        if self.adapters:
            assert error(dt.base_model(self.model)(ids()), base) < 1e-5

    @invariant()
    def nothing_else_has_changed(self):
        assert dt.active_adapter(self.model) == self.active
        assert dt.adapter_names(self.model) == list(self.adapters)
        for name, parts in self.adapters.items():
            found = self.parameters(name)
            assert found.keys() == parts.keys()
            assert all(torch.equal(p, parts[key]) for key, p in found.items())
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if not self.adapters:
            assert len(trained) == len(self.base)
        else:
            wanted = self.parameters(self.active).values() if self.is_training() else ()
            assert {id(p) for p in trained} == {id(p) for p in wanted}


TestLifecycle = Lifecycle.TestCase
TestLifecycle.settings = settings(max_examples=25, stateful_step_count=20)
