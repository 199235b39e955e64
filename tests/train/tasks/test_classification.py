import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import doratune as dt
from doratune.train import AdapterOptions, TrainConfig, train
from doratune.train.information import Information
from doratune.train.models import load_base, load_tokenizer
from doratune.train.output import METRICS
from doratune.train.results import read_metrics
from doratune.train.tasks import classification as module
from train.tiny import reviews, save_encoder, save_model, save_model_with_other_ends, save_rows


@pytest.fixture(scope="module", params=["encoder", "decoder"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return str((save_encoder if request.param == "encoder" else save_model)(folder))


def config(tmp_path, model, rows, **values):
    options = {"max_length": 32, "adapter": AdapterOptions(rank=4), "learning_rate": 2e-2, "steps": 20}
    data = (str(save_rows(tmp_path / "rows.jsonl", rows)),)
    return TrainConfig(
        model=model, data=data, output=tmp_path / "run", task="text-classification", **{**options, **values}
    )


@pytest.mark.parametrize("method", ["dora", "magnitude", "head", "full"])
def test_a_classifier_learns_and_comes_back(tmp_path, model, method):
    result = train(config(tmp_path, model, reviews(80), method=method), Console(quiet=True))
    assert result.accuracy_after is not None
    assert result.accuracy_after >= result.accuracy_before
    assert result.loss_after < result.loss_before
    assert result.labels == ("bad", "good")
    folder = tmp_path / "run" / ("adapter" if method in ("dora", "magnitude") else "model")
    about = Information.load(folder)
    assert (about.task, about.labels, about.method) == ("text-classification", ("bad", "good"), method)
    assert about.columns == {"text": "review", "label": "label"}
    again = load_base(folder)
    assert again.config.id2label == {0: "bad", 1: "good"}
    if result.method in ("dora", "magnitude"):
        dt.load_adapter(again, folder)
    found = module.prepare(config(tmp_path, model, reviews(80)), lambda _: None)
    again.eval()
    with torch.no_grad():
        losses = [again(**found.collate([row])).loss for row in found.held_out]
    assert float(sum(losses) / len(losses)) == pytest.approx(result.loss_after, abs=1e-4)


def test_accumulated_batches_are_one_batch(tmp_path, model):
    """transformers' classifiers pass over the number of examples that Trainer has them divide by."""
    found = []
    for name, sizes in (("one", {"batch_size": 12}), ("three", {"batch_size": 4, "gradient_accumulation": 3})):
        options = {"steps": 3, "eval_fraction": 0.25, "log_every": 1, "optimizer": "sgd", "learning_rate": 1e-3}
        (tmp_path / name).mkdir()
        train(config(tmp_path / name, model, reviews(48), **options, **sizes), Console(quiet=True))
        records = read_metrics(tmp_path / name / "run" / METRICS)
        found.append([(r["loss"], r["grad_norm"]) for r in records if "grad_norm" in r])
    assert len(found[0]) == 3
    for one, three in zip(*found, strict=True):
        assert three == pytest.approx(one, rel=0.5), "but for the dropout of an encoder"


def test_texts_are_counted_that_exist(tmp_path, model):
    options = config(tmp_path, model, reviews(40), steps=None, epochs=2, batch_size=16, log_every=1)
    train(options, Console(quiet=True))
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert [r["texts"] for r in records] == [16, 32, 36, 52, 68, 72]


def test_padding_is_known_at_the_measurement_before_training(tmp_path):
    """With a rate that changes nothing, what is measured before and after is the same."""
    base = str(save_model_with_other_ends(tmp_path / "model"))
    result = train(config(tmp_path, base, reviews(40), learning_rate=1e-12, steps=2), Console(quiet=True))
    assert result.loss_before == pytest.approx(result.loss_after, abs=1e-6)


@pytest.mark.parametrize("method", ["dora", "head"])
def test_a_head_is_trained_in_float32_on_a_16_bit_base(tmp_path, model, method):
    rate = 1e-5  # steps of this size vanish in bfloat16
    options = config(tmp_path, model, reviews(40), dtype="bfloat16", method=method, learning_rate=rate, steps=3)
    train(options, Console(quiet=True))
    [file] = (tmp_path / "run").glob("*/*model.safetensors")
    heads = [
        tensor for key, tensor in load_file(file).items() if key.rpartition(".")[0].endswith(("classifier", "score"))
    ]
    assert heads
    for tensor in heads:
        assert tensor.dtype == torch.float32
        assert not torch.equal(tensor, tensor.bfloat16().float())
    again = load_base(file.parent, dtype=torch.float32)
    if method == "dora":
        dt.load_adapter(again, file.parent)
    for tensor in heads:
        assert any(torch.equal(tensor, parameter) for parameter in again.parameters())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_head_on_a_quantised_base_is_not_quantised(tmp_path, model, kind):
    result = train(config(tmp_path, model, reviews(80), quantize=kind), Console(quiet=True))
    assert result.loss_after < result.loss_before


def test_peft_reads_head_and_adapter(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    base = str(save_encoder(tmp_path / "model"))
    train(config(tmp_path, base, reviews(40), steps=3), Console(quiet=True))
    folder = tmp_path / "run" / "adapter"
    ours = dt.load_adapter(load_base(folder), folder).eval()
    theirs = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base, num_labels=2), folder)
    ids = load_tokenizer(base)("a good tale", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits, theirs.eval()(ids).logits, atol=1e-5)


def test_cuts_and_splits_are_said(tmp_path, model):
    said = []
    found = module.prepare(config(tmp_path, model, reviews(40), max_length=5), said.append)
    assert max(len(row["input_ids"]) for row in found.train) == 5
    assert "texts were cut to 5 tokens (max_length)" in "".join(said)
    assert said[-1] == "36 texts in 2 classes to train on, 4 held out"
    assert sorted(row["labels"] for row in found.held_out) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"review": "x", "label": "a"}] * 3, "at least two classes; the data to train on have only 'a'"),
        ([*reviews(3), {"review": "", "label": "good"}], "rows.jsonl:4: text is empty"),
        ([*reviews(3), {"review": "x", "label": None}], "rows.jsonl:4: label is empty"),
        ([*reviews(3), {"review": "x", "label": 0.5}], "rows.jsonl:4: label: expected a name or a whole number"),
        ([{"foo": 1}], "no column looks like the text among foo"),
    ],
)
def test_wrong_rows(tmp_path, model, rows, said):
    with pytest.raises(dt.AdapterError, match=said):
        module.prepare(config(tmp_path, model, rows), lambda _: None)


@pytest.mark.parametrize("absent", ["review", "label"])
@pytest.mark.parametrize("named", [False, True])
def test_a_first_row_without_a_column_is_a_bad_row(tmp_path, model, absent, named):
    rows = reviews(20)
    del rows[0][absent]
    options = {"text_column": "review", "label_column": "label"} if named else {}
    with pytest.raises(dt.AdapterError, match=rf"1 of 20 rows cannot be used.*\n.*jsonl:1: has no column '{absent}'"):
        module.prepare(config(tmp_path, model, rows, **options), lambda _: None)
    found = module.prepare(config(tmp_path, model, rows, skip_bad=True, **options), lambda _: None)
    assert len(found.train) + len(found.held_out) == 19


def test_classes_of_eval_data_have_to_be_known(tmp_path, model):
    other = save_rows(tmp_path / "other.jsonl", [{"review": "x", "label": "ugly"}])
    with pytest.raises(
        dt.AdapterError, match="eval_data has classes that the data to train on lack: ugly; known are bad"
    ):
        module.prepare(config(tmp_path, model, reviews(4), eval_data=(str(other),)), lambda _: None)


def test_numbers_are_sorted_as_numbers(tmp_path, model):
    rows = [{"review": "x", "label": number} for number in (10, 9, 2, 10, 9, 2)]
    assert module.prepare(config(tmp_path, model, rows), lambda _: None).labels == ("2", "9", "10")


def test_plain_text_has_no_labels(tmp_path, model):
    (tmp_path / "x.txt").write_text("text")
    wrong = config(tmp_path, model, reviews(4))
    wrong.data = (str(tmp_path / "x.txt"), str(tmp_path / "absent.csv"))
    first, second = module.problems(wrong)
    assert "has no columns for text and label" in first
    assert second.endswith("absent.csv: no such file")


def test_the_information_is_json(tmp_path):
    about = Information("image-classification", "b", "dora", ("a",), image_size=(2, 3))
    about.save(tmp_path)
    assert Information.load(tmp_path) == about
    assert json.loads((tmp_path / "doratune.json").read_text())["labels"] == ["a"]
    (tmp_path / "doratune.json").write_text("{")
    with pytest.raises(dt.AdapterError, match=r"doratune.json cannot be read"):
        Information.load(tmp_path)
    assert Information.load(tmp_path / "absent") is None
