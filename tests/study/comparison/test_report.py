import csv
import dataclasses
import json

import numpy as np
import pytest

from doratune.study.comparison import figures, sentences
from doratune.study.comparison.findings import find
from doratune.study.comparison.report import write_report
from study.browser import browser, opened  # noqa: F401
from study.comparison import simulated


def findings(shift=0.0, task="text-classification", collapsed=None, **grid):
    options = {"methods": ("lora r", "dora r", "dora r/2", "head"), "ranks": (8,), "sweep_seeds": 2, "seeds": 6}
    of = simulated.comparison(task=task, **{**simulated.SWEPT, **options, **grid})
    random = np.random.default_rng(0)

    def score(trial):
        better = shift if trial.contestant.startswith("dora") else 0.0
        if trial.contestant == "head" and trial.seed == 3:
            return None
        accuracy = 0.7 + better + random.normal(0, 0.01) + 10 * trial.learning_rate
        if trial.contestant == "lora-8" and trial.stage == "test" and trial.seed == collapsed:
            accuracy = 0.2
        return accuracy, 2 - accuracy

    return find(of, simulated.outcomes(of, score))


def test_sentences_of_a_difference_that_is_there():
    made = findings(0.1)
    told = sentences.about_gap(made, made.gaps[0]).replace("\u00a0", " ")
    d = made.gaps[0].difference
    assert told == (
        f"DoRA rank 8 is better than LoRA rank 8 here: +{d.mean:.2f} points (95 % for all 2 differences together: "
        f"+{d.low:.2f} to +{d.high:.2f}; 6 seeds); 6 seeds could have seen {d.detectable:.2f} with a chance of 80 %."
    )
    assert d.mean == pytest.approx(10, abs=2)
    assert sentences.lead(made).count("is better than") == 2


def test_a_lower_loss_is_better():
    made = findings(0.1, "text-generation")
    assert made.gaps[0].difference.mean < 0
    assert "DoRA rank 8 is better than LoRA rank 8 here: −0." in sentences.about_gap(made, made.gaps[0])


def test_sentences_of_no_difference():
    made = findings()
    d = made.gaps[0].difference
    told = sentences.about_gap(made, made.gaps[0])
    assert told.startswith("No difference between DoRA rank 8 and LoRA rank 8 was found: ")
    assert f"One larger than {d.largest:.2f} points is unlikely; 6 seeds could have seen {d.detectable:.2f}" in told


def test_one_collapsed_run_widens_the_mean_and_not_the_typical_seed():
    quiet, made = findings(seeds=30), findings(seeds=30, collapsed=7)
    mean, typical = made.gaps[0].difference, made.gaps[0].typical
    assert mean.detectable > 3 * quiet.gaps[0].difference.detectable
    assert typical.detectable < 1.2 * quiet.gaps[0].typical.detectable
    assert made.as_json()["differences"][0]["typical"] == dataclasses.asdict(typical)
    assert (
        f". In the typical seed: {sentences.number(typical.middle, 'points', signed=True)} points "
        f"({sentences.interval(typical, 'points')}); {typical.detectable:.2f} could have been seen."
    ) in sentences.about_gap(made, made.gaps[0])


def test_seeds_that_are_mostly_equal_do_not_promise_that_everything_is_seen(tmp_path):
    of = simulated.comparison(methods=("lora 4", "dora 4"), seeds=20)

    def score(trial):
        return (0.9 if (trial.contestant, trial.seed) == ("dora-4", 5) else 0.8), 1.0

    made = find(of, simulated.outcomes(of, score))
    told = sentences.about_gap(made, made.gaps[0])
    assert "typical seed: +0.00 points (+0.00 to +0.00); too many seeds are equal to tell what could have been" in told
    write_report(made, tmp_path)
    (row,) = csv.DictReader((tmp_path / "differences-table.csv").read_text().splitlines())
    assert row["typical could be seen"] == "nan"


def test_runs_that_diverged_are_left_out_of_pairs_and_said():
    made = findings()
    head = made.gaps[-1]
    assert (head.pair.other.name, head.seeds, head.together) == ("head only", [2, 4, 5, 6, 7], 1)
    assert made.problems == ["head only, learning rate 0.001, seed 3: the loss is nan"]
    assert next(one for one in made.standings if one.contestant.method == "head").diverged == 1


def test_learning_rates_and_ranks_in_words():
    told = list(sentences.about_learning_rates(findings()))
    assert len(told) == 4
    assert "best at 0.001 with" in told[0]
    assert "worst at 0.0001" in told[0]
    assert "the chosen rate is the highest that was tried" in told[0]
    ranked = findings(methods=("lora r", "dora r"), ranks=(2, 4, 8), **simulated.FIXED)
    told = list(sentences.about_ranks(ranked))
    assert told[0].startswith("LoRA: over the ranks 2, 4, 8 the best and the worst test score of a seed lie ")
    assert told[2].startswith("No difference in sensitivity to rank was found: ")
    assert ranked.gaps[0].together == 3


def test_equal_differences_are_told_as_such():
    of = simulated.comparison(methods=("lora 4", "dora 4"), seeds=2)
    made = find(of, simulated.outcomes(of, lambda trial: (0.9 if trial.contestant == "dora-4" else 0.8, 1.0)))
    told = "DoRA rank 4 minus LoRA rank 4: +10.00 points in every one of 2 pairs."
    assert sentences.about_gap(made, made.gaps[0]) == sentences.lead(made) == told
    assert made.as_json()["differences"][0]["found"] is False


def test_rates_at_an_end_are_told_first():
    assert sentences.lead(findings()).endswith(
        " Best at an end of the learning rates that were tried, so that a better one may lie beyond: LoRA rank 8 the "
        "highest, DoRA rank 8 the highest, DoRA rank 4 the highest, head only the highest."
    )
    assert sentences.about_edges(findings(**simulated.FIXED)) == ""


def test_ranks_are_compared_where_both_methods_have_them():
    made = findings(methods=("lora r", "dora r", "dora r/2"), ranks=(4, 8, 16), **simulated.FIXED)
    assert [(one.method, list(one.ranks)) for one in made.rank_spreads] == [("lora", [4, 8, 16]), ("dora", [4, 8, 16])]
    assert made.rank_difference is not None


def test_every_rank_is_on_the_axis_whoever_has_it():
    figure, _ = figures.ranks(findings(methods=("dora r", "lora r", "lora r/2"), ranks=(4, 8, 16), **simulated.FIXED))
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["2", "4", "8", "16"]


@pytest.mark.parametrize(("share", "told"), [(0.95, "95"), (0.995, "99.5"), (0.975, "97.5"), (0.57, "57")])
def test_shares(share, told):
    assert sentences.percent(share) == f"{told}\u00a0%"


def test_costs():
    one = next(s for s in findings().standings if s.contestant.key == "dora-8")
    assert (one.extra_over_lora, one.extra_over_model) == (0.1, 0.001)
    assert one.step_seconds == 0.5
    assert one.step_ratio == (1, 1, 1)
    assert "1,000 parameters of A and B: 10.00\u00a0% more than LoRA of that rank, 0.100\u00a0%" in next(
        sentences.about_cost(findings())
    )


@pytest.mark.parametrize(("seeds", "said"), [(1, "One seed; the chosen rate"), (2, "Mean of 2 seeds; the chosen rate")])
def test_the_learning_rates_say_of_how_many_seeds_they_are(tmp_path, seeds, said):
    assert said in write_report(findings(0.1, sweep_seeds=seeds), tmp_path / "report").read_text()


def test_the_page_and_its_files(tmp_path):
    made = findings(0.1)
    page = write_report(made, tmp_path / "report")
    plots = {f"{name}.{kind}" for name in ("differences", "scores", "learning-rates") for kind in ("png", "svg")}
    tables = {f"{name}.csv" for name in ("differences-table", "scores-table", "seeds", "sweep", "costs", "runs")}
    assert {path.name for path in page.parent.iterdir()} == {"report.html", "numbers.json", *plots, *tables}
    numbers = json.loads((page.parent / "numbers.json").read_text())
    assert numbers["differences"][0]["found"] is True
    assert numbers["differences"][0]["mean"] == pytest.approx(made.gaps[0].difference.mean)
    assert numbers["standings"][1]["scores"]["2"] == pytest.approx(made.standings[1].scores[2])
    with (page.parent / "runs.csv").open() as file:
        assert len(list(csv.reader(file))) == 1 + made.runs == 1 + 4 * 2 * 2 + 4 * 6
    assert page.stat().st_size < 3e6


RANKS = {"text-classification": {}, "text-generation": {"methods": ("lora r", "dora r"), "ranks": (2, 4, 8)}}


@pytest.fixture(scope="module", params=RANKS)
def written(request, tmp_path_factory):
    """A report of a task, and the options of its ranks."""
    ranks = RANKS[request.param]
    return write_report(findings(0.05, request.param, **ranks), tmp_path_factory.mktemp("report") / "report"), ranks


@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(written, opened, width):  # noqa: F811
    report, ranks = written
    found = opened(report, width)
    shown = found.page.locator("figure svg")
    assert shown.count() == (4 if ranks else 3)
    assert found.page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    for box in (plot.bounding_box() for plot in shown.all()):
        assert 0 <= box["x"] < box["x"] + box["width"] <= width, "a part of the picture is out of sight"
    found.page.locator('[data-plot="differences"] [data-tip]').first.hover()
    assert ("rank 2" if ranks else "rank 8") in found.page.locator("#tip").inner_text()
    found.sort("runs", 3)
    assert found.complaints == []
    assert len(found.requests) == 1
