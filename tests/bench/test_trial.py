"""The benchmarks notice what is wrong, and give it no speed."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from bench.bases import REAL, OneLayer, first_layers, linear_paths, llama, quantise_nf4
from bench.contestants import BUILDERS, DORA, EIGHT_BIT, FROZEN, FULL, LORA, Setting, merged, share
from bench.tasks import DecodeTask, LayerTask, ModelTask
from bench.trial import Trial, moved_adapters

from bench import bases, contestants, decode, files, step
from doratune.study.race import FEWEST_ROUNDS
from doratune.targets import adapted_layers

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore")  # peers about themselves


def layer_trial(names, dtype=torch.float32, training=True):
    base = OneLayer(64, 64, dtype, CPU)
    return Trial(base, Setting(("proj",), 4), names, LayerTask(64, 64, 32, dtype, CPU), training)


def status(trial):
    return {name: entry.status for name, entry in trial.entries.items()}


def test_everybody_is_right_on_a_layer():
    trial = layer_trial(list(BUILDERS))
    trial.check()
    found = status(trial)
    assert found.pop(FROZEN) == found.pop(FULL) == "reference"
    assert set(found.values()) == {"right"}, trial.report()
    assert max(trial.entries[DORA].error.values()) < 1e-5


def test_eight_bits_may_be_eight_bits_wrong():
    base, _ = llama("tiny", torch.float32, CPU)
    trial = Trial(base, Setting(linear_paths(base), 4), [FROZEN, EIGHT_BIT], ModelTask(base, 32))
    trial.check()
    assert status(trial)[EIGHT_BIT] == "right"
    error = trial.entries[EIGHT_BIT].error
    assert 1e-3 < error.pop("m") < 1e-2
    assert max(error.values()) < 1e-5


def test_everybody_is_right_on_a_model_in_bfloat16():
    base, _ = llama("tiny", torch.bfloat16, CPU)
    names = [name for name in BUILDERS if name != "LyCORIS DoRA"]  # rounds W + s B A to 16 bits
    trial = Trial(base, Setting(linear_paths(base), 4), names, ModelTask(base, 32))
    trial.check()
    assert set(status(trial).values()) == {"right", "reference"}, trial.report()


def test_nf4():
    base, _ = llama("tiny", torch.bfloat16, CPU)
    quantise_nf4(base)
    trial = Trial(base, Setting(linear_paths(base), 4), [FROZEN, DORA, "PEFT DoRA bf16"], ModelTask(base, 32))
    trial.check()
    assert status(trial) == {FROZEN: "reference", DORA: "right", "PEFT DoRA bf16": "right"}, trial.report()


def no_norm(base, setting):
    contestant = BUILDERS[DORA](base, setting)
    for layer in adapted_layers(contestant.model).values():
        base_norm = layer.base_layer.weight.float().norm(dim=1)
        layer.cache.row_scale = lambda rows, A, B, m, *_, n=base_norm: m / n
    return contestant


def no_magnitude(base, setting):
    contestant = BUILDERS[DORA](base, setting)
    for layer in adapted_layers(contestant.model).values():
        layer.cache.row_scale = lambda rows, A, B, m, *_: m / m.detach()
    return contestant


def wrong_gradient(base, setting):
    contestant = BUILDERS[DORA](base, setting)
    for layer in adapted_layers(contestant.model).values():
        layer.lora_B["default"].register_hook(lambda grad: grad * 1.2)
    return contestant


@pytest.mark.parametrize("mistake", [no_norm, no_magnitude, wrong_gradient])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mistakes_are_wrong_and_have_no_speed(mistake, dtype, monkeypatch):
    monkeypatch.setitem(BUILDERS, "mistaken", mistake)
    trial = layer_trial([FROZEN, "mistaken", LORA], dtype)
    trial.race(trial.step, seconds=0.0)
    assert status(trial) == {FROZEN: "reference", "mistaken": "wrong", LORA: "right"}
    found = {entry["name"]: entry for entry in trial.report()}
    assert "timing" not in found["mistaken"]
    assert found["mistaken"]["error"]
    assert found[LORA]["timing"]["rounds"] == FEWEST_ROUNDS


def test_a_twin_is_compared_in_its_place(monkeypatch):
    monkeypatch.setitem(BUILDERS, "mistaken", wrong_gradient)
    names = [FROZEN, "mistaken", LORA]
    trial = layer_trial(names, torch.bfloat16)
    trial.twin = layer_trial(names, torch.float32)
    trial.race(trial.step, seconds=0.0)
    assert status(trial) == {FROZEN: "reference", "mistaken": "wrong", LORA: "right"}
    assert trial.entries["mistaken"].timing is None
    assert trial.entries[LORA].timing
    assert max(trial.entries[LORA].error.values()) < 1e-3  # no 16 bits' rounding


def test_whom_a_twin_lacks_is_compared_itself(monkeypatch):
    monkeypatch.setitem(BUILDERS, "mistaken", wrong_gradient)
    trial = layer_trial([FROZEN, "mistaken", LORA])
    trial.twin = layer_trial([FROZEN])
    trial.check()
    assert status(trial) == {FROZEN: "reference", "mistaken": "wrong", LORA: "right"}


@pytest.mark.parametrize("benchmark", [decode.Decode, decode.Eval])
def test_evaluation_of_deep_models_is_compared_on_their_first_layers_merged_ones_too(benchmark, monkeypatch):
    monkeypatch.setattr(step, "SHALLOW", 1)
    trials = []
    race = Trial.race
    monkeypatch.setattr(
        Trial, "race", lambda self, *args, **options: (trials.append(self), race(self, *args, **options))
    )
    options = benchmark(quick=True, dtype="bfloat16", device="cpu", seconds=0.01, only=("DoRA, merged", DORA))
    entries, about = options.measure(options.points()[0], lambda *_: None)
    (trial,) = trials
    assert about["weights"] == "random weights, compared on the first 1 layers"
    assert {FROZEN, DORA, "doratune DoRA, merged", "PEFT DoRA, merged"} <= trial.twin.contestants.keys()
    for entry in entries:
        assert entry["timing"]
        assert entry["name"] == FROZEN or entry["error"] == trial.twin.entries[entry["name"]].error


def test_what_becomes_wrong_during_the_race_has_no_speed():
    trial = layer_trial([FROZEN, DORA])
    layer = adapted_layers(trial.contestants[DORA].model)["proj"]

    def step(contestant):
        trial.step(contestant)
        layer.adapters["default"].scale = 1.0

    trial.race(step, seconds=0.0)
    assert status(trial)[DORA] == "wrong"
    assert trial.entries[DORA].timing is None


def test_a_contestant_that_cannot_run_is_out_with_its_reason(monkeypatch):
    def broken(base, setting):
        raise RuntimeError("no such thing\nand more")

    monkeypatch.setitem(BUILDERS, "broken", broken)
    trial = layer_trial([FROZEN, "broken", DORA])
    trial.race(trial.step, seconds=0.0)
    assert trial.entries["broken"].note == "RuntimeError: no such thing"
    assert trial.entries[DORA].timing


@pytest.mark.parametrize("before", [0, 8], ids=["in the warm-up", "in the race"])
def test_a_contestant_that_runs_out_of_memory_is_out_and_leaves_nothing_behind(before):
    trial = layer_trial([FROZEN, LORA, DORA])
    model = trial.contestants[DORA].model
    model.cycle = [model]  # larger models have some
    del model
    runs = []

    def step(contestant):
        trial.step(contestant)
        if contestant.name == DORA and len(runs) > before:
            runs.append(weakref.ref(contestant.model))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nAnd more")
        runs.append(None)

    gc.collect()
    gc.disable()  # or it comes by chance
    try:
        trial.race(step, seconds=0.0)
    finally:
        gc.enable()
    (model,) = filter(None, runs)
    assert model() is None
    assert trial.entries[DORA].note == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."
    assert trial.entries[DORA].timing is None
    assert trial.entries[LORA].timing["rounds"] == FEWEST_ROUNDS


def test_without_the_floor_nobody_has_a_speed():
    trial = layer_trial([FROZEN, LORA])
    runs = []

    def step(contestant):
        runs.append(contestant.name)
        if contestant.name == FROZEN and runs.count(FROZEN) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        trial.step(contestant)

    trial.race(step, seconds=0.0)
    assert status(trial) == {FROZEN: "failed", LORA: "right"}
    assert trial.entries[LORA].timing is None


def test_nobody_runs_beside_the_gradients_of_others():
    trial = layer_trial([FROZEN, DORA, FULL])
    seen = []

    def step(contestant):
        models = [other.model for other in trial.contestants.values()]
        seen.append([p.grad for model in models for p in model.parameters() if p.grad is not None])
        trial.step(contestant)

    trial.race(step, seconds=0.0)
    assert seen
    assert not any(seen)


def test_the_first_layers_share_the_tensors_and_leave_the_model_whole():
    base, _ = llama("tiny", torch.float32, CPU)
    part = first_layers(base, 1)
    assert (len(part.model.layers), len(base.model.layers)) == (1, 2)
    assert (part.config.num_hidden_layers, base.config.num_hidden_layers) == (1, 2)
    assert part.model.layers[0].mlp.up_proj.weight is base.model.layers[0].mlp.up_proj.weight
    ids = torch.arange(8)[None]
    whole, first = base(ids).logits, part(ids).logits
    assert not torch.equal(first, whole)
    base.model.layers, base.config.num_hidden_layers = base.model.layers[:1], 1
    assert torch.equal(first, base(ids).logits)


@pytest.mark.parametrize(("weights", "dtype"), [("random weights", torch.bfloat16), (REAL, torch.float32)])
def test_deep_models_in_16_bits_are_compared_on_their_first_layers(weights, dtype, monkeypatch):
    monkeypatch.setattr(step, "SHALLOW", 1)
    monkeypatch.setattr(step, "llama", lambda *args: (llama(*args)[0], weights))
    options = step.Step(quick=True, dtype="bfloat16", device="cpu", only=("doratune DoRA", FULL))
    trial, about = step.model_trial(options, options.points()[0], True)
    assert trial.twin.task.inputs.dtype == dtype
    assert (len(trial.base.model.layers), len(trial.twin.base.model.layers)) == (2, 1)
    assert about.startswith(f"{weights}, compared on the first 1 layers")
    assert FULL in trial.contestants
    assert FULL not in trial.twin.contestants  # it is not compared, and a copy of all weights
    trial.check()
    assert trial.entries[DORA].status == "right"


def test_wide_models_are_compared_on_fewer_layers_and_not_fully_trained(monkeypatch):
    monkeypatch.setitem(bases.SHAPES, "tiny", replace(bases.SHAPES["tiny"], layers=3))
    options = step.Step(quick=True, dtype="bfloat16", device="cpu", only=("doratune DoRA", FULL))
    (point, _) = options.points()
    trial, about = step.model_trial(options, point, True)
    assert (trial.twin, about) == (None, "random weights")
    assert FULL in trial.entries
    monkeypatch.setattr(step, "WIDE", bases.SHAPES["tiny"].hidden)
    trial, about = step.model_trial(options, point, True)
    assert len(trial.twin.base.model.layers) == 2
    assert about == "random weights, compared on the first 2 layers"
    assert FULL not in trial.entries
    assert step.WIDE_SHALLOW < step.SHALLOW


def test_quantised_models_can_use_checkpointing_and_large_ones_do(monkeypatch):
    options = step.Step(device="cpu", dtype="bfloat16", models=("tiny/nf4/checkpointing",), only=(DORA, FULL))
    (point,) = options.points()
    assert point.title == "tiny, nf4, checkpointing, 1,024 tokens, r 16"
    trial, _ = step.model_trial(options, point, True)
    assert hasattr(trial.base.model.layers[0].mlp.up_proj.weight, "quant_state")
    assert trial.base.is_gradient_checkpointing
    assert FULL not in trial.entries
    monkeypatch.setattr(step.Step, "torch_device", lambda self: torch.device("cuda"))
    large = [point for point in step.Step().points() if point.shape["model"] == "llama-8b"]
    assert {point.shape["variant"] for point in large} == {"checkpointing", "nf4/checkpointing"}


@pytest.mark.parametrize("name", ["tinny", "tiny/nf8"])
def test_a_model_or_variant_that_is_not_known_is_refused(name):
    with pytest.raises(SystemExit, match=f"models: expected one of .*tiny, and /checkpointing or /nf4.*found '{name}'"):
        step.Step(models=(name,)).points()


def test_contestants_share_the_base_and_leave_it_as_it_was():
    base, _ = llama("tiny", torch.float32, CPU)
    setting = Setting(linear_paths(base), 4)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    assert next(share(base).parameters()) is next(base.parameters())
    trial = Trial(base, setting, list(BUILDERS), ModelTask(base, 16))
    trial.race(trial.step, seconds=0.0)
    merged(base, setting, trial.values)
    assert before.keys() == base.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())


def test_all_adapters_have_the_same_values_in_every_round():
    base = OneLayer(32, 32, torch.bfloat16, CPU)
    setting = Setting(("proj",), 4)
    values = moved_adapters(base, setting)
    for number in (0, 3):
        expected = values["proj"].at(number)
        for name in BUILDERS:
            contestant = BUILDERS[name](base, setting)
            contestant.take(values, number)
            for A, B, m in contestant.adapters.values():
                assert torch.equal(A.float(), expected.A)
                assert torch.equal(B.float(), expected.B)
                assert m is None or torch.equal(m.float().flatten(), expected.m)


def test_decoding_is_compared_with_the_reference_and_merged_ones_take_part():
    base, _ = llama("tiny", torch.float32, CPU)
    task = DecodeTask(base, 8)
    names = [name for name in BUILDERS if "dropout" not in name and name not in (EIGHT_BIT, FULL)]
    trial = Trial(base, Setting(linear_paths(base), 4), names, task, training=False)
    for contestant in merged(base, trial.setting, trial.values):
        trial.add(contestant)
    trial.race(lambda c: task.decode(c.model), lambda c: task.prefill(c.model), seconds=0.0)
    assert set(status(trial).values()) == {"right", "reference"}, trial.report()
    assert all(entry.timing for entry in trial.entries.values())
    full = base(inputs_embeds=task.inputs).logits[:, -1]
    assert torch.allclose(task.output(trial.contestants[FROZEN].model)[:, -1], full, atol=1e-5)


def test_peers_keep_their_adapters_in_the_dtype_they_are_named_after():
    base = OneLayer(32, 32, torch.bfloat16, CPU)
    for name, dtype in (("PEFT DoRA bf16", torch.bfloat16), ("PEFT DoRA float32", torch.float32)):
        (tensors,) = BUILDERS[name](base, Setting(("proj",), 4)).adapters.values()
        assert {tensor.dtype for tensor in tensors} == {dtype}
    assert BUILDERS["PEFT DoRA float32, dropout"](base, Setting(("proj",), 4)).dropout == contestants.DROPOUT


def test_a_loaded_model_that_computes_nan_is_wrong(tmp_path, monkeypatch):
    base, _ = llama("tiny", torch.float32, CPU)
    work = files._Work(base, Setting(linear_paths(base)), tmp_path)
    load = work._load
    assert work.verdict(DORA)[0] == "right"

    def spoilt(name):
        model = load(name)
        with torch.no_grad():
            for layer in adapted_layers(model).values():
                layer.magnitude["default"].fill_(torch.nan)
        return model

    monkeypatch.setattr(work, "_load", spoilt)
    assert work.verdict(DORA) == ("wrong", "load: relative error nan")
