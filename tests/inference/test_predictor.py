import json

import pytest
import torch

import doratune as dt
from doratune.cli import main
from doratune.inference.inputs import Text, read_pictures, read_texts
from doratune.inference.predictor import Classifier, Predictor
from doratune.train import TrainConfig
from inference.classifiers import train_on_images, train_on_texts
from inference.small import save_moved, save_writer
from train.tiny import llama, save_encoder, save_image_folder, save_model, save_vision_model, tokenizer


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    return folder, train_on_texts(folder, kind="decoder")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    return folder, train_on_images(folder)


def accuracy(predictions):
    return sum(one.label == one.input.label for one in predictions) / len(predictions)


def reading(found, *names):
    return TrainConfig(model=found.base, data=tuple(map(str, names)))


@pytest.mark.parametrize("method", ["dora", "head", "full"])
@pytest.mark.parametrize("kind", ["texts", "images"])
def test_held_out_data_are_classified_as_in_training(tmp_path, kind, method):
    result = (train_on_texts if kind == "texts" else train_on_images)(tmp_path, method)
    found = Classifier.find(tmp_path / "run" / ("adapter" if method == "dora" else "model"))
    assert found.takes_images == (kind == "images")
    read, name = (read_texts, "test.jsonl") if kind == "texts" else (read_pictures, "test.npz")
    inputs = read(reading(found, tmp_path / name), found.about.columns, print)
    predictor = Predictor.load(found)
    assert predictor.labels == result.labels
    predictions = predictor.predict(inputs)
    assert accuracy(predictions) == pytest.approx(result.accuracy_after)
    likely = torch.tensor([one.probabilities[result.labels.index(one.input.label)] for one in predictions])
    assert -likely.log().mean().item() == pytest.approx(result.loss_after, abs=2e-3)


def test_a_batch_gives_what_single_texts_do(texts):
    predictor = Predictor.load(Classifier.find(texts[0] / "run" / "adapter"))
    inputs = [Text("a", "a good tale", None), Text("b", "wolf", None), Text("c", "x" * 100, None)]
    for one, alone in zip(predictor.predict(inputs), map(predictor.predict, ([i] for i in inputs)), strict=True):
        assert one.label == alone[0].label
        assert one.probabilities == pytest.approx(alone[0].probabilities, abs=1e-5)
        assert sum(one.probabilities) == pytest.approx(1)
        assert one.probability == max(one.probabilities)
    assert predictor.cut == 2, "once in the batch and once alone"
    with torch.no_grad():
        ids = torch.tensor([tokenizer()("a good tale")["input_ids"]])
        expected = predictor.model(ids).logits.softmax(-1)[0].tolist()
    assert predictor.predict(inputs[:1])[0].probabilities == pytest.approx(expected)


def test_padding_is_the_tokenizers_whatever_the_models_config_says(tmp_path, capsys):
    result = train_on_texts(tmp_path, kind="decoder with other ends")
    folder = tmp_path / "run" / "adapter"
    assert main(["merge", str(folder), "--output", str(tmp_path / "merged")]) == 0
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["pad_token_id"] == 256
    found = Classifier.find(folder)
    inputs = read_texts(reading(found, tmp_path / "test.jsonl"), found.about.columns, print)
    predictor = Predictor.load(found)
    predictions = predictor.predict(inputs)
    likely = torch.tensor([one.probabilities[result.labels.index(one.input.label)] for one in predictions])
    assert -likely.log().mean().item() == pytest.approx(result.loss_after, abs=2e-3)
    for one in predictions:
        assert one.probabilities == pytest.approx(predictor.predict([one.input])[0].probabilities, abs=1e-5)


@pytest.mark.parametrize("method", ["dora", "head", "full"])
def test_what_trained_in_float32_beside_a_16_bit_base_is_not_rounded(tmp_path, method):
    """The head, and the pooler that the base's files lack."""
    result = train_on_texts(tmp_path, method, dtype="bfloat16")
    found = Classifier.find(tmp_path / "run" / ("adapter" if method == "dora" else "model"))
    inputs = read_texts(reading(found, tmp_path / "test.jsonl"), found.about.columns, print)
    predictor = Predictor.load(found, "bfloat16")
    predictions = [one for start in range(0, 20, 8) for one in predictor.predict(inputs[start : start + 8])]
    likely = torch.tensor([one.probabilities[result.labels.index(one.input.label)] for one in predictions])
    rounding = 5e-3 if method == "full" else 1e-6  # its loss is taken in 16 bits
    assert -likely.log().mean().item() == pytest.approx(result.loss_after, abs=rounding)
    pooler = predictor.model.get_submodule("bert.pooler.dense")
    assert {p.dtype for p in pooler.parameters()} == {torch.bfloat16 if method == "full" else torch.float32}


def test_logits_stay_float32_on_a_16_bit_base(pictures):
    found = Classifier.find(pictures[0] / "run" / "adapter")
    inputs = read_pictures(reading(found, pictures[0] / "photos"), {}, print)
    exact, rough = (Predictor.load(found, dtype).predict(inputs) for dtype in ("float32", "bfloat16"))
    for one, other in zip(exact, rough, strict=True):
        assert other.probabilities == pytest.approx(one.probabilities, abs=0.05)
    assert len({one.probability for one in rough}) > len(rough) // 2, "rounded to 16 bits many would be the same"


def test_an_adapter_made_by_peft(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    save_encoder(tmp_path / "bert")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert", id2label={0: "no", 1: "yes"})
    config = LoraConfig(task_type="SEQ_CLS", r=2, use_dora=True, modules_to_save=["classifier", "pooler"])
    wrapped = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        expected = wrapped(**tokenizer()("a tale", return_tensors="pt", return_token_type_ids=False)).logits
    wrapped.save_pretrained(tmp_path / "adapter")
    found = Classifier.find(tmp_path / "adapter")
    assert not found.takes_images
    predictor = Predictor.load(found)
    assert predictor.labels == ("LABEL_0", "LABEL_1"), "the base knows no names"
    (one,) = predictor.predict([Text("a", "a tale", None)])
    assert one.probabilities == pytest.approx(expected.softmax(-1)[0].tolist(), abs=1e-6)


def other_classes(kind, folder):
    """A base for two classes, a model of it for six, and the module of it that PEFT has to train whole."""
    from transformers import (
        AutoModelForImageClassification,
        AutoModelForSequenceClassification,
        RobertaConfig,
        RobertaForSequenceClassification,
    )

    torch.manual_seed(0)
    if kind == "vit":
        save_vision_model(folder)
        return AutoModelForImageClassification.from_pretrained(folder, num_labels=6), "classifier"
    if kind == "llama":
        save_model(folder)
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=6), "score"
    if kind == "bert":
        save_encoder(folder)
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=6), "classifier"
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(vocab_size=257, max_position_embeddings=512, pad_token_id=256, **sizes)
    RobertaForSequenceClassification(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    options = {"num_labels": 6, "ignore_mismatched_sizes": True}
    return AutoModelForSequenceClassification.from_pretrained(folder, **options), "classifier"


@pytest.mark.parametrize(
    ("kind", "task"),
    [("bert", "SEQ_CLS"), ("roberta", "SEQ_CLS"), ("llama", "SEQ_CLS"), ("llama", None), ("vit", None)],
)
def test_an_adapter_made_by_peft_may_have_other_classes_than_its_base(tmp_path, kind, task):
    from peft import LoraConfig, get_peft_model

    model, head = other_classes(kind, tmp_path / "base")
    whole = [head, "pooler"] if kind == "bert" else [head]
    targets = ["query", "q_proj"]
    wrapped = get_peft_model(model, LoraConfig(task_type=task, r=2, target_modules=targets, modules_to_save=whole))
    wrapped.save_pretrained(tmp_path / "adapter")
    found = Classifier.find(tmp_path / "adapter")
    predictor = Predictor.load(found)
    assert predictor.labels == tuple(f"LABEL_{number}" for number in range(6))
    if kind == "roberta":
        assert predictor.max_length == 512 - 257, "its positions begin after that of padding"
    if found.takes_images:
        inputs = read_pictures(reading(found, save_image_folder(tmp_path / "photos", 2)), {}, print)
        batch = {
            "pixel_values": torch.stack([predictor.processor(inputs[0].open(), return_tensors="pt")["pixel_values"][0]])
        }
    else:
        inputs = [Text("a", "a tale", None)]
        batch = tokenizer()("a tale", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        expected = wrapped.eval()(**batch).logits.softmax(-1)[0].tolist()
    assert predictor.predict(inputs[:1])[0].probabilities == pytest.approx(expected, abs=1e-6)
    assert main(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]) == 0
    merged = Predictor.load(Classifier.find(tmp_path / "merged")).predict(inputs[:1])
    assert merged[0].probabilities == pytest.approx(expected, abs=1e-5)


def test_names_of_a_base_with_as_many_classes_stay(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    save_encoder(tmp_path / "bert")
    named = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert", **named).save_pretrained(tmp_path / "bert")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert")
    get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2)).save_pretrained(tmp_path / "adapter")
    assert Predictor.load(Classifier.find(tmp_path / "adapter")).labels == ("no", "yes")


def test_folders_that_do_not_classify(tmp_path, texts):
    base = save_writer(tmp_path / "llama")
    save_moved(tmp_path / "moved", base)
    for folder, base_given, complaint in (
        (base, None, "was trained for text-generation; use doratune generate"),
        (texts[0] / "run", None, r"has no adapter_config.json.*did you mean .*adapter\?"),
        (tmp_path / "absent", None, "does not exist"),
        (tmp_path / "moved", tmp_path / "nowhere", "nowhere: no such folder"),
        (base, base, "is a whole model, which needs no --base"),
    ):
        with pytest.raises(dt.AdapterError, match=complaint):
            Classifier.find(folder, base_given and str(base_given))


def test_an_adapter_whose_base_has_gone(tmp_path, texts):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in (texts[0] / "run" / "adapter").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for name, key in (("adapter_config.json", "base_model_name_or_path"), ("doratune.json", "base")):
        raw = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**raw, key: str(tmp_path / "gone")}))
    with pytest.raises(dt.AdapterError, match=r"gone: no such folder .*another place can be given with --base"):
        Classifier.find(folder)
    found = Classifier.find(folder, str(texts[0] / "model"))
    assert Predictor.load(found).labels == ("bad", "good")
    (folder / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(dt.AdapterError, match="cannot be read"):
        Classifier.find(folder, str(texts[0] / "model"))


def test_nan_is_an_error(texts):
    predictor = Predictor.load(Classifier.find(texts[0] / "run" / "adapter"))
    with torch.no_grad():
        predictor.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(dt.AdapterError, match="gives NaN for 1 of 1 inputs, such as a:1"):
        predictor.predict([Text("a:1", "tale", None)])


def test_memory_is_short(texts, monkeypatch):
    predictor = Predictor.load(Classifier.find(texts[0] / "run" / "adapter"))

    def fail(**_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(predictor.model, "forward", fail)
    with pytest.raises(dt.AdapterError, match="out of memory; try a smaller batch_size"):
        predictor.predict([Text("a", "tale", None)])


def test_a_language_model_is_no_classifier(tmp_path):
    llama().save_pretrained(tmp_path)
    with pytest.raises(dt.AdapterError, match="use doratune generate"):
        Classifier.find(tmp_path)


def test_several_labels_at_once_are_no_classes(tmp_path):
    from transformers import AutoModelForSequenceClassification

    options = {"num_labels": 3, "problem_type": "multi_label_classification"}
    model = AutoModelForSequenceClassification.from_pretrained(save_encoder(tmp_path), **options)
    model.save_pretrained(tmp_path)
    with pytest.raises(dt.AdapterError, match="was trained for multi_label_classification"):
        Predictor.load(Classifier.find(tmp_path))
