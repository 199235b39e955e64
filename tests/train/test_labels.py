import itertools

from doratune.train.labels import ordered


def test_numbers_are_sorted_as_numbers_and_the_same_every_time():
    names = ("-1", "2", "02", "10", "010")
    expected = ("-1", "02", "2", "010", "10")
    assert all(ordered(one) == expected for one in itertools.permutations(names))


def test_signs_that_are_no_whole_numbers_are_names():
    assert ordered(["1", "²"]) == ("1", "²")
    assert ordered(["--5", "4"]) == ("--5", "4")
