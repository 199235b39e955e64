"""The studies that are in the repository: what they could have seen is what is asked of them."""

import json
from pathlib import Path

import pytest

STUDIES = Path(__file__).parents[2] / "studies"


@pytest.mark.parametrize("name", ["images-few", "images-more", "encoder"])
def test_a_difference_of_one_point_would_be_seen(name):
    found = json.loads((STUDIES / name / "report" / "numbers.json").read_text(encoding="utf-8"))
    assert len(found["differences"]) == 2
    for one in found["differences"]:
        assert one["count"] >= 10
        # In the encoder's study one collapsed run makes the mean's interval: there it is the typical seed's.
        assert min(one["detectable"], one["typical"]["detectable"]) <= 1.0


def test_a_difference_of_one_point_in_sensitivity_to_the_rank_would_be_seen():
    found = json.loads((STUDIES / "ranks" / "report" / "numbers.json").read_text(encoding="utf-8"))
    assert found["rank_difference"]["count"] >= 10
    assert found["rank_difference"]["detectable"] <= 1.0
