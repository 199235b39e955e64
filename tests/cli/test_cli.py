import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import doratune as dt
from doratune.cli import main
from doratune.errors import Interrupted
from train.tiny import llama, save_model, write_text


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assets")
    return save_model(folder / "model"), write_text(folder / "text.txt")


@pytest.fixture
def adapter(tmp_path):
    model = dt.attach(llama(), dt.AdapterConfig(rank=4))
    with torch.no_grad():
        for parameter in dt.trainable_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    dt.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def shell(*arguments):
    environment = {**os.environ, "COLUMNS": "120"}
    command = [sys.executable, "-m", "doratune", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def train(assets, output, *more):
    fast = ["--max-length", 16, "--steps", 2, "--batch-size", 2, "--rank", 4, "--log-every", 1]
    return main(
        [str(word) for word in ["train", "--model", assets[0], "--data", assets[1], "--output", output, *fast, *more]]
    )


# In a process of their own: exit codes, streams, no traceback.


def test_an_unknown_flag_is_a_usage_error():
    result = shell("train", "--model", "m", "--data", "d", "--rnk", "8")
    assert result.returncode == 2
    assert "--rnk" in result.stderr
    assert "Traceback" not in result.stderr


def test_wrong_input_is_one_message_on_stderr(tmp_path):
    result = shell(
        "train", "--model", tmp_path / "none", "--data", "none.txt", "--rank", "-1", "--output", tmp_path / "o"
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: these options cannot work (3 problems):")
    for part in ("no such folder", "none.txt: no such file", "rank must be a whole number"):
        assert part in result.stderr


def test_a_reader_that_has_seen_enough_is_no_error():
    command = [sys.executable, "-m", "doratune", "train", "--recipe", "quickstart", "--print-recipe"]
    for words in (command, [*command[:3], "train", "--help"]):
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            process.stdout.close()
            said = process.stderr.read()
        assert (said, process.returncode) == (b"", 141)


def test_ctrl_c_during_imports_is_no_traceback():
    program = (
        "import runpy, sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'tyro': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "runpy.run_module('doratune', run_name='__main__')\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "interrupted\n")


def test_one_of_several_processes_ends_before_the_interpreter_does():
    """gloo's threads abort it there now and then; here an object does it every time."""
    program = (
        "import atexit, os, runpy, sys\n"
        "class Late:\n"
        "    def __del__(self, abort=os.abort): abort()\n"
        "late = Late()\n"
        "atexit.register(print, 'cleaned up')\n"
        "sys.argv = ['doratune', '--version']\n"
        "runpy.run_module('doratune', run_name='__main__')\n"
    )
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "0"}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    said = f"doratune {dt.__version__}\ncleaned up\n"
    assert (result.returncode, result.stdout, result.stderr) == (0, said, "")


# In this process.


def test_help_shows_commands_and_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    for words, parts in (
        (["--help"], ("train", "merge", "inspect")),
        (["train", "--help"], ("--rank INT", "(default: 16)", "--learning-rate", "Base model: a folder")),
    ):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 0
        printed = capsys.readouterr().out
        assert all(part in printed for part in parts)


@pytest.mark.parametrize("words", [["train", "--data", "d"], ["nonsense"]])
def test_a_missing_flag_and_an_unknown_command_are_usage_errors(words):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"doratune {dt.__version__}\n"


def test_ctrl_c_is_said_once_wherever_it_comes(monkeypatch, capsys):
    import doratune.cli as cli

    ends = ((KeyboardInterrupt, "interrupted\n", 130), (Interrupted, "", 130), (Interrupted(143), "", 143))
    for error, said, code in ends:

        def interrupt(_, error=error):
            raise error

        monkeypatch.setattr(cli, "_parse", interrupt)
        assert main(["inspect", "a"]) == code
        assert capsys.readouterr().err == said


def test_train_then_inspect_then_merge(assets, tmp_path, capsys):
    prompt = "once upon a time there was a king :100: " * 3  # longer than the 80 columns of what is no terminal
    assert train(assets, tmp_path / "run", "--prompt", prompt) == 0
    printed = capsys.readouterr().out
    assert f"before: {prompt}" in printed
    assert f"after: {prompt}" in printed
    assert "held-out perplexity" in printed
    assert "doratune merge" in printed
    adapter = tmp_path / "run" / "adapter"
    assert main(["inspect", str(adapter), "--base", str(assets[0])]) == 0
    printed = capsys.readouterr().out
    assert "dD" in printed
    assert "1.self_attn.q_proj" in printed
    assert "eff.: effective" in printed
    assert "14 adapted layers" in printed
    assert main(["merge", str(adapter), "--output", str(tmp_path / "merged"), "--verify", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layers"] == 14
    assert found["largest_difference"] < 1e-5
    assert found["logits"]["difference"] < 1e-4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merged", "run"], "something was left behind"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")("once", return_tensors="pt")["input_ids"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    unmerged = dt.load_adapter(AutoModelForCausalLM.from_pretrained(assets[0]), adapter).eval()(ids).logits
    assert torch.allclose(merged, unmerged, atol=1e-5)


def test_resume_goes_on(assets, tmp_path, capsys):
    assert train(assets, tmp_path / "run", "--save-every", 1) == 0
    assert train(assets, tmp_path / "run") == 1
    assert "is not empty" in capsys.readouterr().err
    assert train(assets, tmp_path / "run", "--save-every", 1, "--steps", 3, "--resume") == 0
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-3" / "complete.json").exists()


@pytest.mark.parametrize("fails", [False, True])
def test_an_error_is_told_without_waiting_for_other_processes(assets, tmp_path, capsys, monkeypatch, fails):
    import doratune.cli.train
    import doratune.train.run

    left = []
    monkeypatch.setattr(doratune.cli.train, "leave_group", lambda: left.append(True))
    if fails:

        def fail(*_):
            raise dt.AdapterError("out of memory: try less")

        monkeypatch.setattr(doratune.train.run, "train", fail)
    assert train(assets, tmp_path / "run") == fails
    assert left == ([] if fails else [True])
    assert ("out of memory: try less" in capsys.readouterr().err) == fails


def test_flags_win_over_the_recipe(assets, tmp_path, capsys):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'model = "{assets[0]}"\ndata = ["{assets[1]}"]\nmethod = "lora"\nmax_length = 16\nsteps = 5\n'
        'save_every = 50\nbatch_size = 2\n[adapter]\nrank = 2\nalpha = 2.0\ntargets = ["q_proj"]\n'
    )
    output = tmp_path / "run"
    assert main(["train", "--recipe", str(recipe), "--output", str(output), "--steps", "1", "--rank", "3"]) == 0
    config = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_dora"]) == (3, 2.0, False)
    assert config["target_modules"] == ["q_proj"]
    assert json.loads((output / "results.json").read_text())["steps"] == 1


@pytest.mark.parametrize("word", ["none", "None"])
def test_a_flag_takes_none_as_a_recipe_does(word, tmp_path, capsys):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('save_every = 5\nsteps = 7\neval_every = "none"\nquantize = "nf4"\ntext_column = "tale"\n')
    flags = [w for name in ("save-every", "steps", "quantize", "text-column") for w in (f"--{name}", word)]
    assert main(["train", "--recipe", str(recipe), *flags, "--print-recipe"]) == 0
    printed = capsys.readouterr().out
    for name in ("save_every", "steps", "quantize", "text_column", "eval_every"):
        assert f'{name} = "none"' in printed
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = capsys.readouterr().out
    assert "--steps {none}|INT" in printed
    assert "(default: none)" in printed


def test_a_recipe_with_mistakes_is_an_error(tmp_path, capsys):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("rnk = 2\nsteps = 1.5\n")
    assert main(["train", "--recipe", str(recipe)]) == 1
    assert "did you mean 'rank'" in capsys.readouterr().err


def test_empty_data(assets, tmp_path, capsys):
    (tmp_path / "empty.txt").touch()
    assert train((assets[0], tmp_path / "empty.txt"), tmp_path / "run") == 1
    assert "empty.txt is empty" in capsys.readouterr().err


def test_inspect_json(adapter, assets, capsys):
    assert main(["inspect", str(adapter), "--base", str(assets[0]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["layers"]) == 14
    assert found["layers"][0]["change"]["magnitude"] > 0
    assert 0 < found["layers"][0]["change"]["spectrum"]["effective_rank"] <= 32
    assert found["not_compared"] == {}
    assert found["config"]["rank"] == 4


def test_inspect_of_a_small_file(adapter, capsys):
    size = (adapter / "adapter_model.safetensors").stat().st_size
    assert main(["inspect", str(adapter)]) == 0
    assert f" parameters, {size / 1e3:.1f} KB" in capsys.readouterr().out
    assert size < 1e5


def test_inspect_of_a_broken_adapter(adapter, capsys):
    file = adapter / "adapter_model.safetensors"
    state = load_file(file)
    key = next(key for key in state if key.endswith("lora_B.weight"))
    state[key][0, 0] = float("nan")
    save_file(state, file, metadata={"format": "pt"})
    assert main(["inspect", str(adapter)]) == 1
    assert "NaN or infinite" in capsys.readouterr().out
    assert main(["inspect", str(adapter), "--json"]) == 1
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)  # JSON has no NaN
    assert next(layer for layer in found["layers"] if f"{layer['path']}." in key)["b_largest"] is None
    file.write_bytes(b"nothing")
    assert main(["inspect", str(adapter)]) == 1
    assert "cannot be read" in capsys.readouterr().err
    assert main(["inspect", str(adapter / "absent")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_inspect_prints_lora_and_suspicions(tmp_path, capsys):
    dt.save_adapter(dt.attach(llama(), dt.AdapterConfig(rank=2, method="lora")), tmp_path / "a")
    assert main(["inspect", str(tmp_path / "a")]) == 0
    printed = capsys.readouterr().out
    assert "lora, rank 2" in printed
    assert "B is 0, as before training" in printed


def test_merge_of_a_wrong_adapter_leaves_nothing(adapter, tmp_path, capsys):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=64, n_positions=16)).save_pretrained(
        tmp_path / "gpt"
    )
    capsys.readouterr()
    assert main(["merge", str(adapter), "--base", str(tmp_path / "gpt"), "--output", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "is the file of another model?" in said
    assert "does not fit (14 problems):" in said
    assert [line for line in said.splitlines() if line.startswith("  - ")][10:] == ["  - and 4 more"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "gpt"]


def test_merge_prints_a_table_without_json(adapter, assets, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("TERM", "xterm")
    output = tmp_path / "m[v2]:100:"  # for rich a style and an emoji
    arguments = ["merge", str(adapter), "--base", str(assets[0]), "--output", str(output), "--verify"]
    assert main(arguments) == 0
    printed, status = capsys.readouterr()
    assert f"Merged model written to {output}\n" in printed
    assert f"Writing{output}" in "".join(status.split())
    for part in ("q_proj", "logits of the model", "Merged model written"):
        assert part in printed
    for part in ("Loading", "Comparing layers", "Merging", "Writing"):
        assert part in status


def test_merge_says_when_the_whole_model_is_not_compared(adapter, assets, tmp_path, capsys, monkeypatch):
    from doratune.cli import merge

    monkeypatch.setattr(merge, "random_inputs", lambda model: {})
    arguments = ["merge", str(adapter), "--base", str(assets[0]), "--output", str(tmp_path / "m"), "--verify"]
    assert main(arguments) == 0
    assert "the whole model was not compared" in " ".join(capsys.readouterr().out.split())


def test_merge_refusals(adapter, assets, tmp_path, capsys):
    assert main(["merge", str(adapter), "--output", str(tmp_path / "m")]) == 1
    assert "give it with --base" in capsys.readouterr().err
    assert main(["merge", str(adapter), "--base", str(assets[0]), "--output", str(adapter)]) == 1
    assert "is not empty" in capsys.readouterr().err


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(dt.AdapterError):
        main(["--debug", "inspect", str(tmp_path / "absent")])


def test_an_unforeseen_error_is_one_line_too(monkeypatch, tmp_path, capsys):
    from doratune.cli import RUNNERS
    from doratune.cli.inspect import Inspect

    monkeypatch.setitem(RUNNERS, Inspect, lambda _: 1 / 0)
    assert main(["inspect", str(tmp_path)]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setitem(RUNNERS, Inspect, interrupt)
    assert main(["inspect", str(tmp_path)]) == 130
