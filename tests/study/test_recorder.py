import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import doratune as dt
from doratune.study.decompose import adapter_change, decompose
from doratune.study.recorder import ChangeRecorder
from doratune.train import AdapterTrainerMixin
from train.tiny import llama


class AdapterTrainer(AdapterTrainerMixin, Trainer):
    pass


class Board(TrainerCallback):
    """Stands where TensorBoard's callback stands: told of everything that is logged."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append((state.global_step, dict(logs)))


def train(model, tmp_path, every=2):
    ids = torch.arange(24).reshape(4, 6) % 16
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=5, learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True,
        per_device_train_batch_size=2, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    board = Board()
    trainer = AdapterTrainer(model, arguments, train_dataset=data, callbacks=[board])
    recorder = ChangeRecorder(trainer, every=every, label="mine")
    trainer.add_callback(recorder)
    trainer.train()
    return recorder, board


@pytest.mark.parametrize("method", ["dora", "full"])
def test_changes_are_recorded_and_logged(method, tmp_path):
    model = llama()
    if method == "dora":
        dt.attach(model, dt.AdapterConfig(rank=4))
    recorder, board = train(model, tmp_path)
    run = recorder.run
    assert (run.label, run.method, run.checkpoints) == ("mine", method, ["step 2", "step 4", "step 5"])
    expected = adapter_change(model) if method == "dora" else decompose(llama(), model)
    last = {point.path: point.change for point in run.last()}
    assert last.keys() == expected.keys()
    for path, change in expected.items():
        assert change.direction > 0
        assert last[path].direction == pytest.approx(change.direction, rel=1e-9)
    logged = dict(entry for entry in board.seen if any(key.startswith("delta") for key in entry[1]))
    assert sorted(logged) == [2, 4, 5]
    own = [change.magnitude for path, change in expected.items() if path.endswith("up_proj")]
    assert logged[5]["delta_m/up_proj"] == pytest.approx(sum(own) / len(own))
    assert -1 <= logged[5]["delta_correlation"] <= 1
    assert logged[5]["delta_correlation"] == pytest.approx(run.correlation().value)


def test_a_report_of_what_was_recorded(tmp_path):
    recorder, _ = train(dt.attach(llama(), dt.AdapterConfig(rank=2, method="lora")), tmp_path, every=100)
    page = recorder.write_report(str(tmp_path / "report")).read_text()
    assert "mine" in page
    assert "step 5" in page
