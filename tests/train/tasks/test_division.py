from collections import namedtuple

import pytest

import doratune as dt
from doratune.train import TrainConfig
from doratune.train.tasks.division import divided

Example = namedtuple("Example", "number label")
FOUND = [Example(number, "ab"[number % 4 == 0]) for number in range(40)]


def test_parts_without_data_of_their_own_are_set_aside_class_by_class():
    config = TrainConfig("m", ("d",), test_fraction=0.2, eval_fraction=0.25)
    names, train, held_out, test = divided(FOUND, None, None, config, print)
    assert names == ("a", "b")
    assert sorted([*train, *held_out, *test]) == FOUND
    counts = [[sum(one.label == name for one in part) for name in names] for part in (train, held_out, test)]
    assert counts == [[18, 6], [6, 2], [6, 2]]


def test_parts_with_data_of_their_own_stay_whole():
    config = TrainConfig("m", ("d",), test_fraction=0.2)
    assert divided(FOUND[2:], FOUND[:1], FOUND[1:2], config, print) == (("a", "b"), FOUND[2:], FOUND[:1], FOUND[1:2])


@pytest.mark.parametrize(
    ("found", "others", "message"),
    [
        (FOUND[:1], None, "at least two classes"),
        (FOUND, [Example(0, "c")], "eval_data has classes that the data to train on lack: c"),
        ([FOUND[0], FOUND[1]], None, r"to spare \(2 examples of 2 classes, such as 'a'\): .*--eval-data"),
        (FOUND, [], "no class has an example to spare"),
    ],
)
def test_what_cannot_be_divided_is_said(found, others, message):
    with pytest.raises(dt.AdapterError, match=message):
        divided(found, others, None, TrainConfig("m", ("d",)), print)


def test_a_class_with_one_example_is_not_held_out_to_test_on():
    one_each = [Example(0, "a"), Example(1, "b")]
    with pytest.raises(dt.AdapterError, match="no class has an example to spare"):
        divided(one_each, [Example(2, "a")], None, TrainConfig("m", ("d",), test_fraction=0.5), print)
