"""Two processes against one: DDP, FSDP2 and tensor parallelism train the same adapter and write the same files."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import doratune as dt
from distributed.common import (
    ACCUMULATED,
    CONFIG,
    IDS,
    STEPS,
    attached,
    in_torchaos,
    load,
    on_stream,
    read,
    save,
    steps,
    trainer,
)
from distributed.launch import ENVIRONMENT, TORCHRUN, forked
from doratune.cli import main
from doratune.inference.evaluation import evaluate
from doratune.train.launch import refuse_unserved, refuse_unsynchronised
from train.tiny import save_model, save_rows, write_text

WORKER = Path(__file__).with_name("worker.py")


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The folder of a run in one process, and its losses."""
    folder = tmp_path_factory.mktemp("processes")
    save_model(folder / "words")
    save_rows(folder / "rows.jsonl", [{"prompt": f"ask {i} ", "completion": "tell " * (i % 7 + 1)} for i in range(140)])
    run = trainer(attached(load(save(folder / "model"))), folder / "one", 4)
    run.train()
    return folder, losses(run)


@pytest.fixture(scope="module")
def two(one):
    """What two processes found, by part."""
    folder, _ = one
    run = subprocess.run(
        [*TORCHRUN, str(WORKER), str(folder)], env=ENVIRONMENT, capture_output=True, text=True, timeout=500
    )
    assert run.returncode == 0, run.stderr[-5000:]
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


PARTS = {"ddp": [False, False], "fsdp": [True, False], "accelerated": [True, True]}


@pytest.mark.parametrize("way", PARTS)
def test_losses_and_adapters_are_those_of_one_process(one, two, way):
    folder, expected = one
    found = two[way]
    assert found["parts"] == PARTS[way], "W and m in parts or not: else something else was tested than what is named"
    assert found["equal"], "the processes hold different adapters"
    assert len(found["losses"]) == STEPS
    assert found["losses"] == pytest.approx(expected, abs=1e-4)
    for step in (STEPS // 2, STEPS):
        mine, theirs = (
            load_file(folder / run / f"checkpoint-{step}" / "adapter_model.safetensors") for run in ("one", way)
        )
        assert mine.keys() == theirs.keys()
        assert all(torch.allclose(mine[key], theirs[key], atol=1e-4) for key in mine)


@pytest.mark.parametrize("kind", ["torchao-int8", "torchao-int4"])
def test_bases_that_torchao_has_quantised_train_under_ddp(two, kind, tmp_path):
    run = trainer(attached(in_torchaos(kind)), tmp_path, 4)
    run.train()
    found = two["torchao"][kind]
    assert found["wrapped"] == "DistributedDataParallel"
    assert found["equal"], "the processes hold different adapters"
    assert found["losses"] == pytest.approx(losses(run), abs=1e-4)


def test_accumulated_gradients_and_forwards_computed_again_change_nothing(one, two, tmp_path):
    folder, expected = one
    run = trainer(attached(load(folder / "model")), tmp_path, 2, **ACCUMULATED)
    run.train()
    assert losses(run) == pytest.approx(expected, abs=1e-4), "in one process"
    for way in ("ddp", "fsdp"):
        found = two["accumulated"][way]
        assert found["parts"] == PARTS[way]
        assert found["equal"], "the processes hold different adapters"
        assert found["losses"] == pytest.approx(losses(run), abs=1e-4), way


def test_adapters_on_a_base_of_16_bits_stay_float32_and_equal(one, two, tmp_path):
    run = trainer(attached(load(one[0] / "model", dtype=torch.bfloat16)), tmp_path, 4)
    run.train()
    for way in ("ddp", "fsdp"):
        found = two["half_precision"][way]
        assert found["parts"] == PARTS[way]
        assert found["dtypes"] == ["torch.float32"]
        assert found["equal"], "the processes hold different adapters"
        # Products are rounded to 8 bits, and batches of another size are summed up in another order.
        assert found["losses"] == pytest.approx(losses(run), rel=1e-2), way


def test_each_process_trains_on_its_own_rows_of_a_stream(one, two):
    folder, _ = one
    run = on_stream(folder, "stream-one", 4)
    mine, theirs = two["stream"]["rows"]
    assert [a + b for a, b in zip(mine, theirs, strict=True)] == read(run)
    run.train()
    assert two["stream"]["losses"] == pytest.approx(losses(run), abs=1e-4)


@pytest.mark.parametrize("way", PARTS)
def test_files_of_two_processes_load_in_peft(one, two, way):
    from peft import PeftModel

    folder, _ = one
    checkpoint = folder / way / f"checkpoint-{STEPS}"
    theirs = PeftModel.from_pretrained(load(folder / "model"), checkpoint).eval()
    ours = dt.load_adapter(load(folder / "model"), checkpoint).eval()
    with torch.no_grad():
        assert torch.allclose(theirs(IDS).logits, ours(IDS).logits, atol=1e-5)


def test_one_process_goes_on_with_what_two_began_and_the_other_way_round(one, two):
    folder, expected = one
    assert two["resumed"]["losses"] == pytest.approx(expected, abs=1e-4)
    for way in ("ddp", "fsdp", "accelerated"):
        run = trainer(attached(load(folder / "model")), folder / f"again-{way}", 4)
        run.train(resume_from_checkpoint=str(folder / way / f"checkpoint-{STEPS // 2}"))
        assert losses(run)[STEPS // 2 :] == pytest.approx(expected[STEPS // 2 :], abs=1e-4)


@pytest.mark.parametrize("case", ["hf", "torch", "exact", "lora", "magnitude"])
def test_tensor_parallelism(one, two, case):
    folder, found = one[0], two["tensor_parallel"][case]
    near = case == "hf"  # with a row that nearly cancels, where rounding is magnified
    assert (found["dense"] > 0) == near
    assert found["start"] < 1e-6
    assert found["loss"] < 1e-5
    assert found["gradients"] < (5e-3 if near else 2e-4)
    for what in ("evaluation", "frozen", "merged"):
        assert found[what] < (1e-3 if near else 5e-5), what
    mine, theirs = (load_file(folder / f"tp-{case}{end}" / "adapter_model.safetensors") for end in ("-expected-0", ""))
    assert mine.keys() == theirs.keys()
    assert all(torch.allclose(mine[key], theirs[key], rtol=1e-6) for key in mine)


def test_tensor_parallel_losses(one, two):
    found = two["tensor_parallel"]
    assert found["parts"] == [True, True]
    assert found["losses"] == pytest.approx(steps(attached(load(one[0] / "model"))), abs=1e-4)


def test_a_model_that_no_process_holds_whole(two):
    found = two["meta_start"]
    assert found["parts"] == [True, True]
    assert found["magnitudes"] < 1e-6
    assert found["output"] < 1e-5


def test_experts_train_in_parts_as_whole(two):
    found = two["experts"]
    assert found["parts"] == [True, True]
    assert found["losses"] == pytest.approx(found["expected"], abs=1e-4)
    assert len(set(found["losses"])) == 5


def test_what_is_not_served_is_refused_by_name(two):
    found = two["refused"]
    assert "attach before wrapping" in found["attach to DDP"]
    assert "attach before fully_shard" in found["attach to FSDP2"]
    assert "accelerate runs it on accelerators only" in found["FSDP2 on a CPU"]
    assert "doratune merge" in found["merge under FSDP2"]
    assert "doratune convert" in found["convert under FSDP2"]


def test_weights_that_deepspeed_has_taken_away_are_refused():
    model = load_tiny()
    model.lm_head.weight.ds_id = 0
    with pytest.raises(dt.AdapterError, match="ZeRO-3"):
        dt.attach(model, CONFIG)


def set_up(deepspeed_stage=None, fsdp_version=None):
    """A Trainer as accelerate has set it up."""
    deepspeed = None if deepspeed_stage is None else SimpleNamespace(zero_stage=deepspeed_stage)
    fsdp = None if fsdp_version is None else SimpleNamespace(fsdp_version=fsdp_version)
    state = SimpleNamespace(deepspeed_plugin=deepspeed, fsdp_plugin=fsdp)
    arguments = SimpleNamespace(world_size=2, fsdp_plugin_args=None, device=torch.device("cpu"))
    return SimpleNamespace(accelerator=SimpleNamespace(state=state), args=arguments, model=load_tiny())


@pytest.mark.parametrize(("plugins", "message"), [((3, None), "ZeRO-3"), ((None, 1), "use FSDP2")])
def test_plugins_that_take_weights_away_are_refused(plugins, message):
    refuse_unserved(set_up(2, None))
    refuse_unserved(set_up(None, 2))
    with pytest.raises(dt.AdapterError, match=message):
        refuse_unserved(set_up(*plugins))


def test_processes_that_would_train_alone_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    alone = set_up()
    alone.args.world_size = 1
    with pytest.raises(dt.AdapterError, match="use_cpu=True"):
        refuse_unserved(alone)
    monkeypatch.delenv("WORLD_SIZE")
    unwrapped = set_up()
    unwrapped.model = unwrapped.model_wrapped = dt.attach(unwrapped.model, CONFIG)
    unwrapped.is_deepspeed_enabled = unwrapped.is_distributed_loading_by_transformers = False
    with pytest.raises(dt.AdapterError, match="an adapter of its own"):
        refuse_unsynchronised(unwrapped)


def load_tiny():
    from train.tiny import llama

    return llama()


def command(folder, *more):
    options = ["--max-length", "16", "--steps", "400", "--batch-size", "2", "--save-every", "5", "--rank", "4"]
    data = ["--model", str(folder / "model"), "--data", str(folder / "text.txt"), "--output", str(folder / "run")]
    return ["train", *data, *options, *more]


def test_a_killed_worker_ends_the_run_and_leaves_a_checkpoint_to_go_on_from(tmp_path):
    save_model(tmp_path / "model")
    write_text(tmp_path / "text.txt")
    log = tmp_path / "log"
    with log.open("w") as file:
        words = [*TORCHRUN, "-m", "doratune", *command(tmp_path, "--fsdp")]
        run = subprocess.Popen(words, env=ENVIRONMENT, stdout=file, stderr=file)
    whole = tmp_path / "run" / "checkpoints"
    end = time.monotonic() + 200
    while not list(whole.glob("checkpoint-*/complete.json")) and run.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    assert run.wait(timeout=100) != 0
    assert "SIGKILL" in log.read_text()
    # One process goes on where two were stopped.
    assert main(command(tmp_path, "--resume", "--steps", "20")) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["processes"] == 1


@pytest.mark.parametrize("more", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
def test_a_run_of_two_processes_comes_to_its_end(tmp_path, more):
    from peft import PeftModel

    save_model(tmp_path / "model")
    write_text(tmp_path / "text.txt")
    held_out = str(write_text(tmp_path / "held-out.txt", 82))
    printed = forked(command(tmp_path, "--steps", "4", "--eval-data", held_out, *more), tmp_path)
    assert printed.count("held-out loss") == 1, "one table, of the first process"
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (found["processes"], found["steps"]) == (2, 4)
    adapter = tmp_path / "run" / "adapter"
    assert found["held_out_examples"] % 4, "else no batch is filled up"
    expected = [one.loss for one in evaluate([str(adapter)], [held_out]).measured]
    assert [found["loss_before"], found["loss_after"]] == pytest.approx(expected, rel=1e-6)
    ours = dt.load_adapter(load(tmp_path / "model"), adapter).eval()
    theirs = PeftModel.from_pretrained(load(tmp_path / "model"), adapter).eval()
    with torch.no_grad():
        logits = ours(IDS).logits
        assert torch.allclose(theirs(IDS).logits, logits, atol=1e-5)
        with dt.disabled(ours):
            assert not torch.allclose(ours(IDS).logits, logits, atol=1e-6), "the adapter was written before it learnt"


def test_parts_of_a_model_go_on_from_an_adapter(tmp_path):
    save_model(tmp_path / "model")
    write_text(tmp_path / "text.txt")
    model = dt.attach(load_tiny(), dt.AdapterConfig(method="lora", rank=4))
    with torch.no_grad():
        for parameter in dt.trainable_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    dt.save_adapter(model, tmp_path / "lora")
    data = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "text.txt"), "--max-length", "16"]
    options = [*data, "--steps", "2", "--batch-size", "2", "--start-from", str(tmp_path / "lora")]
    assert main(["train", *options, "--output", str(tmp_path / "one")]) == 0
    forked(["train", *options, "--output", str(tmp_path / "two"), "--fsdp"], tmp_path)
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["loss_before"] == pytest.approx(one["loss_before"], rel=1e-6)
    assert two["loss_after"] < two["loss_before"]
    assert two["magnitude"] == one["magnitude"] > 0
