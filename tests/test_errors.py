from doratune import AdapterError
from doratune.errors import first_line


def test_one_problem_is_a_line_and_several_are_a_list():
    assert str(AdapterError.of("file", ["gone"])) == "file: gone"
    assert str(AdapterError.of("file", ["a", "b"])) == "file (2 problems):\n  - a\n  - b"


def test_of_many_the_first_are_shown_and_the_others_counted():
    error = AdapterError.of("file", map(str, range(12)), at_most=10)
    assert str(error).splitlines()[0] == "file (12 problems):"
    assert error.problems == [*map(str, range(10)), "and 2 more"]
    assert AdapterError.of("file", map(str, range(10)), at_most=10).problems == [*map(str, range(10))]


def test_what_an_error_lists_can_be_listed_with_others():
    assert AdapterError.of("file", ["gone"]).problems == ["gone"]
    assert AdapterError.of("file", ["two\nlines", "b"]).problems == ["two\nlines", "b"]
    assert AdapterError("two\nlines").problems == ["two\nlines"]


def test_the_first_line_of_an_error():
    assert first_line(RuntimeError("\nno room left.\nhelp: clear some")) == "no room left"
    assert first_line(MemoryError()) == "MemoryError"
