import gc
import logging
import shutil

import datasets
import pytest
import torch
import transformers
from safetensors import safe_open

import doratune as dt
from doratune.train import last_checkpoint
from helpers import move
from train.tiny import llama, tokenizer, words

CONFIG = dt.AdapterConfig(rank=4, dropout=0.1)


def rows(count=32, length=16):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 256, (count, length), generator=generator).tolist()
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})


def settings(folder, cls=None, **more):
    options = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 5,
        "use_cpu": True,
    }
    return (cls or transformers.TrainingArguments)(**{**options, **more})


def plain(folder, config=CONFIG, train_options=None, **more):
    from doratune.train import AdapterTrainer

    model = llama()
    if config is not None:
        dt.attach(model, config)
    data = rows()
    return AdapterTrainer(model, settings(folder, **more), train_dataset=data, eval_dataset=data, **train_options or {})


def sft(folder, config=CONFIG, **more):
    from trl import SFTConfig

    from doratune.train import AdapterSFTTrainer

    text = datasets.Dataset.from_dict({"text": [words(12, seed) for seed in range(32)]})
    args = settings(folder, SFTConfig, bf16=False, max_length=32, **more)
    return AdapterSFTTrainer(dt.attach(llama(), config), args, train_dataset=text, processing_class=tokenizer())


def trained(trainer):
    return {name: p.detach().clone() for name, p in dt.trainable_parameters(trainer.model).items()}


@pytest.mark.parametrize("make", [plain, sft])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, make, caplog):
    whole = make(tmp_path / "a")
    whole.train()
    expected = trained(whole)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    # The run was killed while it wrote checkpoint-6, and checkpoint-4 was already whole.
    (tmp_path / "b" / "checkpoint-6" / "complete.json").unlink()
    (tmp_path / "b" / "checkpoint-6" / "adapter_model.safetensors").write_bytes(b"cut")
    resumed = make(tmp_path / "b")
    with caplog.at_level(logging.WARNING, "doratune"):
        resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-6 has no completion marker" in caplog.text
    assert resumed.state.global_step == 6
    found = trained(resumed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry][4:] for run in (whole, resumed)]
    assert losses[0] == losses[1]


def test_resuming_goes_on_from_the_middle(tmp_path):
    """The comparison above would also hold for a run that started over."""
    plain(tmp_path, max_steps=4).train()
    model_before = trained(plain(tmp_path))
    resumed = plain(tmp_path, max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert any(not torch.equal(model_before[name], p) for name, p in trained(resumed).items())


@pytest.mark.parametrize("make", [plain, sft])
def test_checkpoints_hold_the_adapter_and_no_base_weights(tmp_path, make):
    trainer = make(tmp_path, max_steps=2)
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    assert not (folder / "model.safetensors").exists()
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert keys
    assert all(".lora_" in key for key in keys)
    other = dt.load_adapter(llama(), folder)  # a checkpoint is an adapter like any other
    ids = torch.arange(12).view(2, 6)
    trainer.model.eval()
    assert torch.allclose(other.eval()(ids).logits, trainer.model(ids).logits, atol=1e-6)


def test_a_cut_checkpoint_is_refused_by_name_and_absence_is_said(tmp_path):
    trainer = plain(tmp_path, max_steps=2)
    with pytest.raises(dt.AdapterError, match="no whole checkpoint to resume from"):
        trainer.train(resume_from_checkpoint=True)
    trainer.train()
    (tmp_path / "checkpoint-2" / "complete.json").unlink()
    with pytest.raises(dt.AdapterError, match=r"1 were passed over"):
        plain(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(dt.AdapterError, match=r"no completion marker.*True takes the last whole one"):
        plain(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_marker_of_an_earlier_run_does_not_vouch_for_a_half_written_checkpoint(tmp_path, monkeypatch):
    plain(tmp_path, max_steps=2).train()
    again = plain(tmp_path, max_steps=2)
    monkeypatch.setattr(type(again), "_save_rng_state", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        again.train()
    assert last_checkpoint(tmp_path) is None


def test_rotation_keeps_the_limit(tmp_path):
    plain(tmp_path, save_steps=1, save_total_limit=2).train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    # One token trained over and over makes everything else worse: the first measurement is the best.
    same = datasets.Dataset.from_dict({"input_ids": [[7] * 16] * 32, "labels": [[7] * 16] * 32})
    trainer = plain(
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        save_total_limit=1,
    )
    trainer.train_dataset = same
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert min(losses) < losses[-1], "the test needs a run that gets worse"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


def test_magnitudes_have_a_group_of_their_own(tmp_path):
    options = {"magnitude_learning_rate": 0.5, "magnitude_weight_decay": 0.25}
    trainer = plain(tmp_path, train_options=options, weight_decay=0.125)
    optimizer = trainer.create_optimizer()
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert (groups["weights"]["lr"], groups["weights"]["weight_decay"]) == (1e-2, 0.125)
    assert (groups["magnitudes"]["lr"], groups["magnitudes"]["weight_decay"]) == (0.5, 0.25)
    in_groups = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert in_groups == {id(p) for p in dt.trainable_parameters(trainer.model).values()}
    assert type(optimizer) is torch.optim.AdamW


def test_other_groups_than_the_checkpoint_has_are_refused(tmp_path):
    plain(tmp_path, max_steps=2).train()
    other = plain(tmp_path, train_options={"lora_plus_ratio": 16.0})
    with pytest.raises(dt.AdapterError, match=r"other groups of parameters than .*leave lora_plus_ratio"):
        other.train(resume_from_checkpoint=True)


def test_magnitudes_are_not_decayed_and_share_the_rate_unless_asked(tmp_path):
    groups = {g["name"]: g for g in plain(tmp_path, weight_decay=0.125).create_optimizer().param_groups}
    assert (groups["magnitudes"]["lr"], groups["magnitudes"]["weight_decay"]) == (1e-2, 0.0)


def test_an_adapted_head_is_refused_where_trl_computes_past_it(tmp_path):
    head = dt.AdapterConfig(rank=4, targets=["q_proj", "lm_head"])
    with pytest.raises(dt.AdapterError, match=r"lm_head has an adapter.*modules_to_save=\['lm_head'\]"):
        sft(tmp_path / "a", head)
    plain(tmp_path / "b", head)
    whole = sft(tmp_path / "c", dt.AdapterConfig(rank=4, targets=["q_proj"], modules_to_save=["lm_head"]))
    before = trained(whole)
    assert any("lm_head" in name for name in before)
    whole.train()
    assert not [name for name, p in trained(whole).items() if torch.equal(p, before[name])]


def test_parameters_outside_the_adapter_are_refused(tmp_path):
    trainer = plain(tmp_path)
    trainer.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(dt.AdapterError, match=r"1 trained parameters .* model\.norm\.weight.*modules_to_save"):
        trainer.train()


def test_without_an_adapter_the_trainer_is_itself_and_resumes(tmp_path):
    trainer = plain(tmp_path / "a", config=None)
    trainer.train()
    assert (tmp_path / "a" / "checkpoint-6" / "model.safetensors").exists()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoint-6")
    resumed = plain(tmp_path / "b", config=None)
    resumed.train(resume_from_checkpoint=True)
    expected = trained(trainer)
    assert all(torch.equal(expected[name], p) for name, p in trained(resumed).items())


def test_two_bases_one_mixin(tmp_path):
    from doratune.train import AdapterTrainerMixin

    class MyTrainer(AdapterTrainerMixin, transformers.Trainer):
        pass

    trainer = MyTrainer(model=dt.attach(llama(), CONFIG), args=settings(tmp_path, max_steps=1), train_dataset=rows())
    assert trainer.train().global_step == 1


def preferences(folder, kind, ref_model, dropout=0.0, **more):
    """TRL's DPO or KTO on a native model whose reference is the same model's base."""
    import trl

    from doratune.train import AdapterTrainerMixin

    class Preferring(AdapterTrainerMixin, getattr(trl, f"{kind}Trainer")):
        pass

    columns = {name: [words(6, 3 * seed + i) for seed in range(32)] for i, name in enumerate(("chosen", "rejected"))}
    if kind == "KTO":
        columns = {"completion": columns["chosen"], "label": [True, False] * 16}
    pairs = datasets.Dataset.from_dict({"prompt": [f"{words(4, seed)} " for seed in range(32)], **columns})
    args = settings(folder, getattr(trl, f"{kind}Config"), bf16=False, max_length=32, logging_steps=1, **more)
    model = dt.attach(llama(), dt.AdapterConfig(rank=4, alpha=8, dropout=dropout))
    reference = ref_model(model)
    return Preferring(model, reference, args, train_dataset=pairs, processing_class=tokenizer())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_.*able. is deprecated:FutureWarning")  # TRL's own calls
@pytest.mark.parametrize("kind", ["DPO", "KTO"])
def test_the_base_is_the_reference_of_trls_trainers(tmp_path, kind):
    trainers = [preferences(tmp_path / how.__name__, kind, how) for how in (dt.base_model, loaded_again)]
    for trainer in trainers:
        trainer.train()
    shared, apart = ([entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in trainers)
    assert shared == apart
    assert len(set(shared)) > 1
    for before, after in zip(llama().parameters(), trainers[0].ref_model.parameters(), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("disabled", [True, False])
def test_trls_disable_dropout_holds_for_adapters(tmp_path, disabled, caplog):
    options = {} if disabled else {"disable_dropout": False}  # TRL's default is True
    trainer = preferences(tmp_path, "DPO", dt.base_model, dropout=0.5, **options)
    move(trainer.model).train()
    ids = torch.arange(12)[None]
    first, second = (trainer.model(input_ids=ids).logits for _ in range(2))
    assert torch.equal(first, second) is disabled
    assert ("disable_dropout: the adapter's dropout of 0.5 is off" in caplog.text) is disabled


def loaded_again(model):
    """What takes the memory of a second model."""
    return llama()


def test_150_steps_leave_nothing_behind(tmp_path):
    alive = []

    class Count(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (20, 150):
                gc.collect()
                tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
                alive.append((len(tensors), sum(t.numel() for t in tensors)))

    options = {"callbacks": [Count()]}
    plain(tmp_path, train_options=options, max_steps=150, save_strategy="no", per_device_train_batch_size=2).train()
    assert all(late <= early for early, late in zip(*alive, strict=True))  # what earlier tests left may go meanwhile
