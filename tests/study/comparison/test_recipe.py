import dataclasses
from pathlib import Path

import pytest

import doratune as dt
from doratune.study.comparison.contestants import Contestant, Pair, contestants, pairs
from doratune.study.comparison.recipe import load

RUN = 'model = "m"\ndata = ["DATA"]\ntask = "text-classification"\ntest_fraction = 0.2\nrank = 8\nalpha = 16\n'


def write(tmp_path, compare="", run=RUN):
    data = tmp_path / "rows.jsonl"
    data.write_text("{}\n")
    path = tmp_path / "recipe.toml"
    path.write_text(run.replace("DATA", str(data)) + (f"[compare]\n{compare}" if compare else ""))
    return str(path)


def test_methods_at_ranks_each_once():
    names = [one.key for one in contestants(("lora r", "dora r", "dora r/2", "magnitude", "full"), (8, 4))]
    assert names == ["lora-8", "lora-4", "dora-8", "dora-4", "dora-2", "magnitude", "full"]
    assert contestants(("dora r/4", "lora 3"), (4,)) == [Contestant("dora", 1), Contestant("lora", 3)]


def test_everybody_is_compared_with_the_first_at_its_rank():
    found = pairs(("lora r", "dora r", "dora r/2", "head"), (8,))
    lora = Contestant("lora", 8)
    assert found == [Pair(one, lora) for one in (Contestant("dora", 8), Contestant("dora", 4), Contestant("head"))]
    assert [pair.is_claim for pair in found] == [True, True, False]


def test_defaults_are_the_question_that_everybody_asks(tmp_path):
    found = load(write(tmp_path))
    assert [one.name for one in found.contestants] == ["LoRA rank 8", "DoRA rank 8", "DoRA rank 4"]
    assert found.grid.seeds == 10
    assert load(write(tmp_path), seeds=20).grid.seeds == 20


def test_a_run_keeps_alpha_over_rank_and_everything_else(tmp_path):
    found = load(write(tmp_path, 'learning_rates_of = {dora = [1e-5]}\nmethods = ["lora r", "dora 2", "full"]'))
    config = found.config(found.contestants[1], 1e-5, 7, Path("out"))
    adapter = config.adapter_config()
    assert (adapter.method, adapter.rank, adapter.alpha) == ("dora", 2, 4)
    assert (config.learning_rate, config.seed, config.output) == (1e-5, 7, Path("out"))
    changed = dataclasses.replace(config, method=found.train.method, adapter=found.train.adapter)
    changed = dataclasses.replace(changed, learning_rate=found.train.learning_rate, seed=0, output=found.train.output)
    assert changed == found.train
    assert found.config(found.contestants[2], 1e-5, 7, Path("out")).adapter_config() is None
    assert found.grid.rates(found.contestants[1]) == (1e-5,)


def test_a_single_problem_comes_with_the_recipe_named_once(tmp_path):
    with pytest.raises(dt.AdapterError) as caught:
        load(write(tmp_path, 'methods = ["lora r", "dora r"]', RUN + "steps = true\n"))
    assert str(caught.value) == f"recipe {tmp_path / 'recipe.toml'}: steps: expected whole number or 'none', found True"


def test_an_adapter_to_begin_with_is_refused(tmp_path):
    with pytest.raises(dt.AdapterError, match="start_from: the methods and ranks that are compared begin afresh"):
        load(write(tmp_path, run=RUN + 'start_from = "run/adapter"\n'))


def test_the_best_of_several_measurements_is_refused(tmp_path):
    with pytest.raises(dt.AdapterError, match="keep_best: runs that are compared are measured at their end"):
        load(write(tmp_path, run=RUN + "eval_every = 2\nkeep_best = true\npatience = 1\n"))


def test_every_problem_is_listed(tmp_path):
    compare = 'methods = ["lora r"]\nseed = 3\nranks = "8"\nlearning_rates = [0]'
    with pytest.raises(dt.AdapterError) as caught:
        load(write(tmp_path, compare, RUN + "steps = true\n"))
    said = str(caught.value)
    assert "compare: unknown key 'seed'; did you mean 'seeds'?" in said
    assert "compare.ranks: expected a list of whole numbers, found '8'" in said
    assert "steps: expected whole number or 'none', found True" in said
    compare = 'methods = ["lora x"]\nranks = [0]\nlearning_rates = [0.0]\nlearning_rates_of = {lra = [1]}\nseeds = 1'
    with pytest.raises(dt.AdapterError) as caught:
        load(write(tmp_path, compare, RUN.replace("test_fraction = 0.2\n", "")))
    said = str(caught.value)
    assert "7 problems" in said
    for part in (
        "expected 'lora r', 'dora r', 'dora r/2', 'dora 8', 'magnitude', 'full', 'head'; found 'lora x'",
        "at least two are needed",
        "ranks must be at least 1",
        "learning_rates: at least one learning rate above 0",
        "learning_rates_of: expected lora, dora, magnitude, full, head; found 'lra'",
        "seeds must be at least 2: one run of each says nothing",
        "test_data or test_fraction is needed",
    ):
        assert part in said


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ('"lora r", "lora r"', "at least two are needed to compare; found lora r"),
        ('"lora r", "lora 8"', "at least two are needed to compare; lora r, lora 8 are all LoRA rank 8"),
        ('"lora r", "dora r/3", "dora r/2"', r"'dora r/3' needs ranks that can be divided by 3; found \[8\]"),
        ('"lora r", "dora r/0"', "expected 'lora r'.*found 'dora r/0'"),
    ],
)
def test_methods_that_are_no_comparison(tmp_path, methods, said):
    with pytest.raises(dt.AdapterError, match=said):
        load(write(tmp_path, f"methods = [{methods}]"))
    with pytest.raises(dt.AdapterError, match=r"'dora r/2' needs .* by 2; found \[3, 1\]"):
        load(write(tmp_path, "ranks = [4, 3, 1]"))


@pytest.mark.parametrize(
    ("compare", "run", "same"),
    [
        ("seeds = 30\nconfidence = 0.9", RUN + 'output = "elsewhere"\nlog_every = 3\n', True),
        ('methods = ["lora r", "dora r", "dora r/2"]', RUN, True),
        ("sweep_seeds = 3", RUN, False),
        ("", RUN + "steps = 7\n", False),
        ("", RUN + "dropout = 0.1\n", False),
        ("", RUN.replace("alpha = 16", "alpha = 8"), False),
    ],
)
def test_what_makes_it_another_comparison(tmp_path, compare, run, same):
    assert (load(write(tmp_path, compare, run)).identity() == load(write(tmp_path)).identity()) == same


def test_other_data_under_the_same_name_make_it_another(tmp_path):
    recipe = write(tmp_path)
    before = load(recipe).identity()
    (tmp_path / "rows.jsonl").write_text('{"changed": 1}\n')
    assert load(recipe).identity() != before
