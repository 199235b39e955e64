import dataclasses
import io
import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import doratune as dt
from doratune.inference.evaluation import Measured, evaluate
from doratune.inference.measuring import Measuring
from doratune.train import AdapterOptions, TrainConfig, train
from doratune.train.choices import Quantize
from doratune.train.placement import quantization
from inference.classifiers import train_on_images, train_on_texts
from inference.small import save_moved, save_writer
from train.tiny import llama, save_chat_model, save_encoder, save_rows, tokenizer, write_text

ROUNDING = 1e-6


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("assets") / "model")


def asked(count):
    return [{"question": f"who is {i}?", "topic": "kings", "reply": f"king {i * i}"} for i in range(count)]


def chats(count):
    turns = [(f"once {i}", f"upon {i}", "and then?", "time" * i) for i in range(1, count + 1)]
    roles = ("user", "assistant", "user", "assistant")
    return [{"talk": [{"role": role, "content": said} for role, said in zip(roles, own, strict=True)]} for own in turns]


def run(folder, base, kind, **options):
    """A short run, and the file it measured on."""
    if kind == "documents":
        data, held_out = (write_text(folder / f"{name}.txt", count) for name, count in (("train", 200), ("test", 61)))
    else:
        rows = chats if kind == "chats" else asked
        data, held_out = (
            save_rows(folder / f"{name}.jsonl", rows(count)) for name, count in (("train", 12), ("test", 7))
        )
    config = TrainConfig(
        str(base),
        (str(data),),
        folder / "run",
        eval_data=(str(held_out),),
        adapter=AdapterOptions(rank=2),
        learning_rate=1e-2,
        steps=3,
        save_every=None,
        **options,
    )
    return train(config, Console(quiet=True)), str(held_out)


TEMPLATE = {"prompt_template": "{topic}: {question}\n", "completion_column": "reply"}
PAIRS = {"prompt_column": "question", "completion_column": "reply"}
RUNS = {
    "documents in blocks": ("documents", {"max_length": 16}),
    "documents apart": ("documents", {"max_length": 64, "packing": False}),
    "completions": ("pairs", PAIRS),
    "completions after a template": ("pairs", {**TEMPLATE, "max_length": 30}),
    "whole pairs as chats": ("pairs", {**PAIRS, "as_chat": True, "loss_on": "all"}),
    "chats": ("chats", {"messages_column": "talk"}),
    "packed chats": ("chats", {"messages_column": "talk", "packing": True, "max_length": 100}),
    "magnitudes": ("documents", {"max_length": 16, "method": "magnitude"}),
    "a whole model": ("documents", {"max_length": 16, "method": "full"}),
}


@pytest.mark.parametrize("case", RUNS)
def test_it_measures_what_the_run_measured(base, tmp_path, case):
    kind, options = RUNS[case]
    result, held_out = run(tmp_path, base, kind, **options)
    assert abs(result.loss_before - result.loss_after) > 1e-3
    losses = {"run": result.loss_after} | ({} if options.get("method") == "full" else {"base": result.loss_before})
    for batch_size in (4, 3):
        found = evaluate([result.adapter], [held_out], measuring=Measuring(batch_size=batch_size))
        assert {one.name: one.loss for one in found.measured} == pytest.approx(losses, rel=ROUNDING), batch_size
        for one in found.measured:
            assert one.perplexity == pytest.approx(torch.tensor(one.loss, dtype=torch.float64).exp())
            assert one.examples == result.held_out_examples
        assert found.example == result.example
        assert len({one.tokens for one in found.measured}) == 1


@pytest.mark.parametrize("kind", get_args(Quantize))
def test_a_base_in_fewer_bits_as_in_the_run(tmp_path, kind):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=257, **sizes)).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    result, held_out = run(tmp_path, tmp_path / "model", "documents", max_length=16, quantize=kind)
    screen = io.StringIO()
    found = evaluate([result.adapter], [held_out], console=Console(file=screen, width=200)).measured
    assert [one.loss for one in found] == pytest.approx([result.loss_before, result.loss_after], rel=ROUNDING)
    assert f"the base is loaded as in training: --quantize {kind} (--quantize none: in full" in screen.getvalue()
    asked = evaluate([result.adapter], [held_out], measuring=Measuring(quantize=kind)).measured
    assert [one.loss for one in asked] == [one.loss for one in found]
    whole = evaluate([result.adapter], [held_out], measuring=Measuring(quantize=None)).measured
    assert abs(whole[0].loss - result.loss_before) > 1e-5


def test_scales_in_full_and_a_dtype_as_in_the_run(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=257, **sizes)).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    options = {"max_length": 16, "quantize": "nf4", "double_quant": False, "dtype": "bfloat16"}
    result, held_out = run(tmp_path, tmp_path / "model", "documents", **options)
    screen = io.StringIO()
    found = evaluate([result.adapter], [held_out], console=Console(file=screen, width=200)).measured
    assert [one.loss for one in found] == pytest.approx([result.loss_before, result.loss_after], rel=ROUNDING)
    assert "as in training: --dtype bfloat16 --quantize nf4 (" in screen.getvalue()
    note = Path(result.adapter) / "doratune.json"
    about = json.loads(note.read_text())
    note.write_text(json.dumps(about | {"double_quant": True}))
    assert evaluate([result.adapter], [held_out]).measured[0].loss != found[0].loss
    note.write_text(json.dumps({k: v for k, v in about.items() if k not in ("dtype", "quantize", "double_quant")}))
    assert evaluate([result.adapter], [held_out]).measured[0].loss != found[0].loss  # as an earlier version wrote it


def test_a_classifier_s_base_in_fewer_bits_as_in_the_run(tmp_path):
    result = train_on_texts(tmp_path, kind="decoder", quantize="nf4")  # so small an encoder hardly sees its input
    test = str(tmp_path / "test.jsonl")
    (one,) = evaluate([result.adapter], [test]).measured
    assert one.loss == pytest.approx(result.loss_after, rel=ROUNDING)
    (whole,) = evaluate([result.adapter], [test], measuring=Measuring(quantize=None)).measured
    assert whole.loss != pytest.approx(result.loss_after, rel=ROUNDING)


@pytest.mark.parametrize("method", ["dora", "full", "head"])
@pytest.mark.parametrize("train_on", [train_on_images, train_on_texts])
def test_classifiers_are_measured_as_in_their_run(tmp_path, train_on, method):
    result = train_on(tmp_path, method)
    test = next(str(path) for path in tmp_path.glob("test.*"))
    (one,) = evaluate([result.adapter], [test]).measured
    assert one.accuracy == result.accuracy_after
    assert one.loss == pytest.approx(result.loss_after, rel=ROUNDING)
    assert (one.name, one.examples, one.tokens, one.perplexity) == ("run", result.held_out_examples, None, None)


def test_a_decoder_that_classifies_and_a_merged_one(tmp_path):
    result = train_on_texts(tmp_path, kind="decoder with other ends")
    model = dt.load_adapter(dt.train.models.load_base(result.adapter), result.adapter)
    merged = dt.merge(model)
    merged.save_pretrained(tmp_path / "merged")
    tokenizer().save_pretrained(tmp_path / "merged")
    about = dt.train.Information.load(result.adapter)
    about.save(tmp_path / "merged")
    data = [str(tmp_path / "test.jsonl")]
    one, other = evaluate([result.adapter, str(tmp_path / "merged")], data).measured
    assert one.loss == pytest.approx(result.loss_after, rel=ROUNDING)
    assert (other.name, other.base) == ("merged", str(tmp_path / "merged"))
    assert other.loss == pytest.approx(one.loss, abs=1e-4)


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """A base, two adapters that nobody noted anything about, and a text."""
    folder = tmp_path_factory.mktemp("moved")
    base = save_writer(folder / "model")
    text = write_text(folder / "text.txt", 60)
    return base, [save_moved(folder / name, base, seed) for seed, name in enumerate(("one", "two"), 1)], str(text)


def by_hand(model, text, length):
    ids = [*tokenizer()(text)["input_ids"], 256]
    blocks = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    with torch.no_grad():
        logits = model.eval()(blocks).logits
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), blocks[:, 1:].flatten())), blocks


def test_several_adapters_and_the_base_are_measured_on_the_same_tokens(moved):
    base, adapters, data = moved
    found = evaluate([*map(str, adapters)], [data], measuring=Measuring(max_length=32))
    text = Path(data).read_text(encoding="utf-8")
    expected, blocks = by_hand(llama(), text, 32)
    assert [one.name for one in found.measured] == ["base", "one", "two"]
    assert found.measured[0] == Measured(
        "base", None, str(base), pytest.approx(expected, rel=1e-5), len(blocks), tokens=blocks[:, 1:].numel()
    )
    for one, folder in zip(found.measured[1:], adapters, strict=True):
        expected, _ = by_hand(dt.load_adapter(llama(), folder), text, 32)
        assert one == dataclasses.replace(
            found.measured[0], name=folder.name, folder=str(folder), loss=pytest.approx(expected, rel=1e-5)
        )
    (alone,) = evaluate([], [data], str(base), Measuring(max_length=32)).measured
    assert alone == found.measured[0]
    (whole,) = evaluate([str(base)], [data], measuring=Measuring(max_length=32)).measured
    assert whole == dataclasses.replace(alone, name=base.parent.name, folder=str(base))


def test_a_base_that_comes_quantised_needs_no_adapter(moved, tmp_path):
    base, adapters, data = moved
    options = {"quantization_config": quantization("torchao-int8", torch.float32), "dtype": torch.float32}
    AutoModelForCausalLM.from_pretrained(base, **options).save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "small")
    way, small = Measuring(max_length=32), str(tmp_path / "small")
    (alone,) = evaluate([], [data], small, way).measured
    assert alone == evaluate([str(adapters[0])], [data], small, way).measured[0]
    assert alone.loss != evaluate([], [data], str(base), way).measured[0].loss


def test_what_peft_wrote(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = save_writer(tmp_path / "model")
    theirs = get_peft_model(llama(), LoraConfig(use_dora=True, target_modules="all-linear", r=2))
    theirs.peft_config["default"].base_model_name_or_path = str(base)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape))
    theirs.save_pretrained(tmp_path / "theirs")
    data = write_text(tmp_path / "text.txt", 150)
    found = evaluate([str(tmp_path / "theirs")], [str(data)])
    expected, _ = by_hand(theirs, data.read_text(encoding="utf-8"), TrainConfig.max_length)
    assert found.example == "blocks of 512 tokens"
    assert found.measured[1].loss == pytest.approx(expected, rel=1e-5)
    assert abs(found.measured[0].loss - expected) > 0.01


def test_a_classifier_that_peft_wrote(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    base = save_encoder(tmp_path / "model")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    theirs = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    rows = [{"text": "a tale " * i, "label": f"LABEL_{i % 3}"} for i in range(1, 8)]
    data = [str(save_rows(tmp_path / "data.jsonl", rows))]
    with pytest.raises(dt.AdapterError, match=r"positions for 64; use --max-length 64 or less"):
        evaluate(
            [str(tmp_path / "theirs")],
            [str(save_rows(tmp_path / "long.jsonl", [{"text": "a" * 99, "label": "LABEL_0"}]))],
        )
    (one,) = evaluate([str(tmp_path / "theirs")], data).measured
    with torch.no_grad():
        logits = torch.cat([theirs(**tokenizer()(row["text"], return_tensors="pt")).logits for row in rows])
    labels = torch.tensor([i % 3 for i in range(1, 8)])
    assert one.accuracy == pytest.approx(float((logits.argmax(-1) == labels).float().mean()))
    assert one.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-4)


def test_classifiers_with_classes_of_their_own(tmp_path):
    results = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        results.append(train_on_texts(tmp_path / name))
    about = dt.train.Information.load(results[1].adapter)
    dataclasses.replace(about, labels=tuple(reversed(about.labels))).save(tmp_path / "two" / "run" / "adapter")
    folders, data = [result.adapter for result in results], [str(tmp_path / "one" / "test.jsonl")]
    said = Console(record=True, width=200, file=io.StringIO())
    one, other = evaluate(folders, data, console=said).measured
    assert (one.name, other.name) == ("run", "run-2")
    assert one.accuracy == results[0].accuracy_after
    assert other.accuracy == 1 - one.accuracy, "the same answers under each other's names"
    assert said.export_text().count("columns:") == 1


def test_files_written_before_the_way_was_noted(base, tmp_path):
    result, held_out = run(tmp_path, base, "pairs", **PAIRS)
    file = tmp_path / "run" / "adapter" / "doratune.json"
    noted = json.loads(file.read_text())
    assert {name: noted.pop(name) for name in ("as_chat", "loss_on", "packing")} == {
        "as_chat": False,
        "loss_on": "completion",
        "packing": None,
    }
    file.write_text(json.dumps(noted))
    assert evaluate([result.adapter], [held_out]).measured[1].loss == pytest.approx(result.loss_after, rel=ROUNDING)


def test_adapters_that_disagree_ask_for_the_flag(base, tmp_path):
    for name, length in (("one", 16), ("two", 24)):
        (tmp_path / name).mkdir()
        _, data = run(tmp_path / name, base, "documents", max_length=length)
    folders = [str(tmp_path / name / "run" / "adapter") for name in ("one", "two")]
    with pytest.raises(dt.AdapterError, match="max_length: run 16, run-2 24; say which with --max-length"):
        evaluate(folders, [data])
    assert len(evaluate(folders, [data], measuring=Measuring(max_length=16)).measured) == 3


def test_packed_examples_that_leak_are_refused(moved, tmp_path, monkeypatch):
    """As in training: a model that does not keep them apart gives another number."""
    monkeypatch.setattr("doratune.train.packing.NOISE", -1.0)
    _, adapters, _ = moved
    data = save_rows(tmp_path / "rows.jsonl", [{"prompt": "once ", "completion": "upon"}] * 4)
    with pytest.raises(dt.AdapterError, match="packed examples see those before them"):
        evaluate([str(adapters[0])], [str(data)], measuring=Measuring(packing=True))


def test_everything_wrong_is_listed_before_anything_is_loaded(moved, tmp_path):
    base, adapters, data = moved
    run = save_moved(tmp_path / "run" / "adapter", base).parent
    with pytest.raises(dt.AdapterError) as caught:
        evaluate([str(run), str(adapters[0])], [data, "absent.jsonl"], measuring=Measuring(batch_size=0))
    said = str(caught.value)
    assert "cannot be measured (3 problems)" in said
    for part in (f"did you mean {run / 'adapter'}?", "data absent.jsonl: no such file", "batch_size must be above 0"):
        assert part in said
    with pytest.raises(dt.AdapterError, match="name an adapter's folder, or a model with --base"):
        evaluate([], [data])
    with pytest.raises(dt.AdapterError, match="data: name at least one file"):
        evaluate([str(adapters[0])], [])
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(dt.AdapterError, match=r"data .*empty.jsonl is empty"):
        evaluate([str(adapters[0])], [str(tmp_path / "empty.jsonl")])


def test_wrong_data_are_refused_before_a_model_is_loaded(moved, tmp_path, monkeypatch):
    _, (adapter, _), _ = moved
    monkeypatch.setattr("doratune.inference.evaluation.Writer", None)
    file = save_rows(tmp_path / "rows.jsonl", [{"text": "once"}, {"text": ""}, {"other": 1}])
    with pytest.raises(dt.AdapterError, match=r"(?s)2 of 3 rows cannot be used.*rows.jsonl:2: text is empty"):
        evaluate([str(adapter)], [str(file)])
    with pytest.raises(dt.AdapterError, match="no column looks like a text"):
        evaluate([str(adapter)], [str(save_rows(tmp_path / "other.jsonl", [{"number": 1}]))])


def test_language_models_and_classifiers_are_measured_apart(moved, tmp_path):
    _, (adapter, _), data = moved
    folder = tmp_path / "classifier"
    save_moved(folder, moved[0])
    dt.train.Information("text-classification", str(moved[0]), "dora", labels=("a", "b")).save(folder)
    with pytest.raises(dt.AdapterError, match=r"trained for different tasks \(.*; measure them apart"):
        evaluate([str(adapter), str(folder)], [data])
    dt.train.Information("text-classification", "x", "full", labels=("a", "b")).save(tmp_path)
    with pytest.raises(dt.AdapterError, match="where no base is measured; name it without --base"):
        evaluate([], [data], str(tmp_path))
