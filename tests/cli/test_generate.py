import json

import pytest
import torch

from doratune.cli import main
from doratune.cli.chat import talk
from doratune.inference.prompts import Prompt
from doratune.inference.sampling import Sampling
from doratune.inference.sources import find_sources
from doratune.inference.writer import Writer
from doratune.train.information import Information
from inference.small import save_moved, save_writer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_writer(tmp_path_factory.mktemp("assets") / "model")


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [save_moved(folder / name, base, seed) for seed, name in enumerate(("one", "two"), 1)]


def generate(*arguments):
    return main(["generate", *map(str, arguments), "--max-tokens", "6"])


def written(base, adapter=None, prompt="once"):
    """What the library writes for the command to print."""
    sources = find_sources([str(adapter)] if adapter else [], str(base))
    return Writer.load(sources).write([Prompt(prompt)], Sampling(max_tokens=6), adapter and adapter.name)[0].text


def squeezed(text):
    return "".join(text.split())


def test_a_prompt_is_continued_as_it_is_written(base, adapters, capsys):
    assert generate(adapters[0], "--prompt", "once") == 0
    with_adapter = capsys.readouterr().out
    assert with_adapter == f"once{written(base, adapters[0])}\n"
    assert generate(base, "--prompt", "once") == 0
    plain = capsys.readouterr().out
    assert plain == f"once{written(base)}\n" != with_adapter
    assert generate("--base", base, adapters[0], "--prompt", "once", "--merge") == 0
    assert capsys.readouterr().out == with_adapter


def test_a_base_in_four_bits_writes_too(base, adapters, capsys):
    assert generate(adapters[0], "--prompt", "once", "--quantize", "nf4") == 0
    assert capsys.readouterr().out.startswith("once")
    sources = find_sources([str(adapters[0])], str(base))
    assert Writer.load(sources, quantize="nf4").model.is_quantized
    assert generate(adapters[0], "--prompt", "once", "--quantize", "nf4", "--merge") == 1
    assert "merging needs the base's weights whole; leave out --quantize or --merge" in capsys.readouterr().err


def test_the_base_is_loaded_as_in_training(base, tmp_path, capsys):
    folder = save_moved(tmp_path / "trained", base)
    Information("text-generation", str(base), "dora", quantize="nf4", dtype="bfloat16").save(folder)
    sources = find_sources([str(folder)])
    model = Writer.load(sources).model
    assert model.is_quantized
    assert model.dtype == torch.bfloat16
    assert generate(folder, "--prompt", "once") == 0
    told = "the base is loaded as in training: --dtype bfloat16 --quantize nf4 (--quantize none: in full precision)\n"
    assert capsys.readouterr().err == told
    assert not hasattr(Writer.load(sources, "float32", quantize=None).model, "hf_quantizer")
    assert generate(folder, "--prompt", "once", "--dtype", "float32", "--quantize", "none") == 0
    assert capsys.readouterr().err == ""
    assert generate(folder, "--prompt", "once", "--merge", "--dtype", "float32") == 0
    assert capsys.readouterr().err.startswith("trained with --quantize nf4; merged into the base in full precision")


def test_adapters_that_share_a_base_and_were_trained_on_it_in_two_ways(base, tmp_path, capsys):
    for name, more in (("one", {"quantize": "nf4", "dtype": "float32"}), ("two", {"dtype": "bfloat16"}), ("three", {})):
        Information("text-generation", str(base), "dora", **more).save(save_moved(tmp_path / name, base))
    assert generate(tmp_path / "one", tmp_path / "two", "--prompt", "once") == 1
    assert capsys.readouterr().err == (
        "error: the base cannot be loaded as in training (2 problems):\n"
        "  - dtype: one float32, two bfloat16; say which with --dtype\n"
        "  - quantize: one nf4, two none; say which with --quantize\n"
    )
    together = (tmp_path / "one", tmp_path / "two", "--prompt", "once", "--dtype", "float32", "--quantize", "nf4")
    assert generate(*together) == 0
    assert capsys.readouterr().err == ""
    assert generate(tmp_path / "two", tmp_path / "three", "--prompt", "once") == 0
    assert capsys.readouterr().err == "the base is loaded as in training: --dtype bfloat16\n"


def test_what_loads_the_base_as_in_training_is_not_installed(base, tmp_path, capsys, monkeypatch):
    folder = save_moved(tmp_path / "trained", base)
    Information("text-generation", str(base), "dora", quantize="nf4").save(folder)
    monkeypatch.setattr("doratune.train.checks.installed", lambda name: name != "bitsandbytes")
    assert generate(folder, "--prompt", "once") == 1
    error = capsys.readouterr().err
    assert "quantize nf4 needs bitsandbytes, which is not installed: pip install" in error
    assert error.endswith("or give --quantize none\n")
    assert generate(folder, "--prompt", "once", "--quantize", "none") == 0


def test_a_dtype_of_the_training_that_needs_a_gpu(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = save_moved(tmp_path / "trained", base)
    Information("text-generation", str(base), "dora", dtype="float16").save(folder)
    assert Writer.load(find_sources([str(folder)])).model.dtype == torch.float32


def test_commands_take_the_base_that_doratune_json_names(base, tmp_path, capsys):
    folder = save_moved(tmp_path / "nameless", None)
    Information("text-generation", str(base), "dora").save(folder)
    assert generate(folder, "--prompt", "once") == 0
    assert capsys.readouterr().out == f"once{written(base, folder)}\n"
    assert main(["merge", str(folder), "--output", str(tmp_path / "merged")]) == 0


def test_side_by_side(base, adapters, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert generate(*adapters, "--prompt", "once", "--compare") == 0
    printed = capsys.readouterr().out
    header = next(line for line in printed.splitlines() if "base" in line)
    assert header.index("base") < header.index("one") < header.index("two")
    assert generate(*adapters, "--prompt", "once") == 0
    assert "base" not in capsys.readouterr().out


def test_json_has_a_line_for_each_text(base, adapters, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "once"}\n{"messages": [{"role": "user", "content": "hello"}]}\n')
    assert generate(adapters[0], "--file", file, "--compare", "--json", "--batch-size", "1") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["adapter"] for row in found] == [None, "one", None, "one"]
    assert [row.get("prompt") for row in found] == ["once", "once", None, None]
    assert found[2]["messages"] == [{"role": "user", "content": "hello"}]
    assert found[1]["text"] == written(base, adapters[0])
    assert generate(adapters[0], "--file", file, "--merge", "--json") == 0
    merged = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert merged == [found[1], found[3]], "null would call it the base"
    assert set(found[0]) == {"prompt", "adapter", "text", "tokens", "ended"}


def test_a_file_is_printed_prompt_by_prompt(base, adapters, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "prompts.txt").write_text("once\nking\n")
    assert generate(adapters[0], "--file", tmp_path / "prompts.txt") == 0
    printed = squeezed(capsys.readouterr().out)
    for prompt in ("once", "king"):
        assert squeezed(prompt + written(base, adapters[0], prompt)) in printed


def test_text_that_goes_to_a_file_keeps_its_lines(base, tmp_path, capsys):
    """Without a terminal rich takes 80 columns."""
    prompts = ["once upon a time there was a king in a forest " * 2, "wolf " * 20]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    assert generate(base, "--file", tmp_path / "prompts.txt") == 0
    assert capsys.readouterr().out == "".join(f"{p}{written(base, prompt=p)}\n\n" for p in prompts)


def test_prompts_of_a_file_are_checked_before_any_is_continued(base, tmp_path, capsys):
    lines = ["once", "", "x" * 200, *["king"] * 20, "y" * 300]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    assert generate(base, "--file", tmp_path / "prompts.txt", "--json", "--batch-size", 1) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert f"{tmp_path / 'prompts.txt'}:3 has 200 tokens, the model's context is 128" in said.err
    assert f"{tmp_path / 'prompts.txt'}:24 has 300 tokens" in said.err
    rows = [{"role": "user", "content": "x" * 200}]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"messages": rows}))
    assert generate(base, "--file", tmp_path / "prompts.jsonl", "--chat") == 1
    assert "prompts.jsonl:2 has" in capsys.readouterr().err


def test_a_message_is_answered_without_showing_it(base, capsys):
    assert generate(base, "--prompt", "hello", "--chat") == 0
    printed = capsys.readouterr().out
    template = "<user>hello\n<assistant>"
    assert printed == written(base, prompt=template) + "\n"


@pytest.mark.parametrize(
    ("arguments", "complaints"),
    [
        ([], ["give a --prompt, a --file of prompts, or --chat"]),
        (["--prompt", "a", "--file", "b"], ["a prompt or a file, not both"]),
        (["--prompt", ""], ["prompt is empty"]),
        (["--chat", "--compare", "--batch-size", "0"], ["2 problems", "switch with /adapter", "batch_size"]),
        (["--chat", "--json"], ["compare and json need a --prompt"]),
        (["--prompt", "a", "--system", "b"], ["add --chat"]),
        (["--prompt", "a", "--merge", "--compare"], ["cannot be compared"]),
        (["--prompt", "a", "--top-p", "2"], ["top_p must lie above 0"]),
        (["--file", "absent.txt"], ["absent.txt: no such file"]),
        (["--prompt", "a", "--compare"], ["compare needs an adapter"]),
        (["nowhere", "--prompt", "a"], ["nowhere does not exist"]),
        (["--prompt", "a", "--dtype", "float16"], ["float16 needs a GPU"]),
    ],
)
def test_what_cannot_work_is_one_message(base, arguments, complaints, capsys):
    assert generate("--base", base, *arguments) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    for part in complaints:
        assert part in said.err


def test_a_classifiers_folder_is_refused_by_name(tmp_path, capsys):
    from transformers import Dinov2Config, Dinov2Model

    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**shape)).save_pretrained(tmp_path / "vit")
    capsys.readouterr()
    assert generate(tmp_path / "vit", "--prompt", "a") == 1
    assert "holds no tokenizer" in capsys.readouterr().err


# The chat.


class Typed:
    """Stands in for the keyboard."""

    def __init__(self, *lines):
        self.lines = iter(lines)

    def __call__(self, _):
        line = next(self.lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line


def chatted(writer, *lines, system=None):
    import io

    from rich.console import Console

    screen = io.StringIO()
    talk(writer, Console(file=screen, width=100), Sampling(max_tokens=4), system, Typed(*lines))
    return screen.getvalue()


@pytest.fixture
def asked(base, adapters, monkeypatch):
    """A writer that notes what it was asked."""
    writer = Writer.load(find_sources([str(adapter) for adapter in adapters]))
    notes = []
    real = writer.write

    def noting(prompts, sampling, adapter, streamer=None):
        found = real(prompts, sampling, adapter, streamer)
        notes.append((adapter, [m["content"] for m in prompts[0].messages], found[0].text))
        return found

    monkeypatch.setattr(writer, "write", noting)
    return writer, notes


def test_a_chat_remembers_switches_and_forgets(asked, capsys):
    writer, notes = asked
    screen = chatted(writer, "hello", "/adapter two", "more", "", "/adapter base", "/reset", "again", "/exit", "never")
    (one, first, answer), (two, second, _), (none, third, _) = notes
    assert (one, two, none) == ("one", "two", None)
    assert first == ["hello"]
    assert second == ["hello", answer, "more"]
    assert third == ["again"]
    assert "Answers come from one." in screen
    assert "Answers come from two." in screen
    assert answer.strip() in capsys.readouterr().out


def test_a_chat_with_a_merged_model_calls_it_by_its_adapter(adapters):
    writer = Writer.load(find_sources([str(adapters[0])]), merged=True)
    screen = chatted(writer, "/adapter base", "/adapter one")
    assert screen.count("Answers come from one.") == 3
    assert "There is no adapter 'base'. There are: one." in screen


def test_a_chat_has_a_system_message(asked):
    writer, notes = asked
    screen = chatted(writer, "a", "/system Be kind.", "b", system="Be short.")
    assert notes[0][1] == ["Be short.", "a"]
    assert notes[1][1] == ["Be kind.", "b"]
    assert "System message: Be kind." in screen


def test_commands_explain_themselves(asked):
    screen = chatted(asked[0], "/adapters", "/adapter three", "/what", "/help")
    assert "There are: base, one, two." in screen
    assert "There is no adapter 'three'" in screen
    assert "There is no command /what" in screen
    assert asked[1] == []


def test_an_interrupted_answer_is_forgotten(asked, monkeypatch):
    writer, notes = asked

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write", interrupted)
        assert "interrupted" in chatted(writer, "hello")
    assert "(/reset forgets what was said)" in chatted(writer, "x" * 200)
    assert "character 7 is \\udcff" in chatted(writer, "\udcff")  # what no UTF-8 is becomes that
    chatted(writer, "more")
    assert notes[-1][1] == ["more"]


def test_a_prompt_that_is_there_several_times_gets_several_samples(base, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("once\n" * 4)
    drawn = ("--file", tmp_path / "prompts.txt", "--json", "--temperature", 1, "--batch-size", 2)
    assert generate(base, *drawn) == 0
    first = capsys.readouterr().out
    assert len(set(first.splitlines())) == 4
    assert generate(base, *drawn) == 0
    assert capsys.readouterr().out == first


def test_the_largest_seed_goes_on_from_the_smallest(base, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("once\n" * 2)
    drawn = ("--file", tmp_path / "prompts.txt", "--json", "--temperature", 1, "--batch-size", 1, "--seed", 2**32 - 1)
    assert generate(base, *drawn) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
