from dataclasses import dataclass, field

import pytest

from dalikd.tools.bench.options import check_alone, check_names, check_rounds, listed, run_options


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--names", "a", "b", "--other", "c"], ["--names", '["a", "b"]', "--other", "c"]),
        (["--names", "a,b", "c"], ["--names", '["a", "b", "c"]']),
        (["--names=a,b", "--x=names"], ["--names", '["a", "b"]', "--x=names"]),
        (["--names", "[a]"], ["--names", "[a]"]),
        (["--names", "3", "x4"], ["--names", '[3, "x4"]']),
        (["names", "a", "b"], ["names", "a", "b"]),
        ([], []),
    ],
)
def test_lists_take_several_words(words, expected):
    assert listed(words, ("names",)) == expected


@pytest.mark.parametrize("words", [["--names"], ["--names", "--other", "x"], ["--names="]])
def test_a_list_needs_a_word(words):
    with pytest.raises(ValueError, match="--names needs at least one value"):
        listed(words, ("names",))


def test_names_are_checked():
    assert check_names("--x", ["b", "a", "b"], ("a", "b", "c")) == ["b", "a"]
    assert check_names("--x", ["all"], ("a", "b")) == ["a", "b"]
    with pytest.raises(ValueError, match=r"--x bcd is unknown: did you mean abcd\? there are abcd, z"):
        check_names("--x", ["bcd"], ("abcd", "z"))


def test_a_spread_needs_repetitions():
    check_rounds(5)
    with pytest.raises(ValueError, match="--rounds 4: give at least 5"):
        check_rounds(4)


@dataclass
class Options:
    """Some options.

    Args:
        names: of things.
        count: of them.
    """

    names: list[str] = field(default_factory=list)
    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError("--count must be\nabove 0")


def test_options_reach_the_benchmark():
    found = []
    run_options("some", Options, found.append, ["--names", "a", "b", "--count", "3"], lists=("names",))
    assert found == [Options(["a", "b"], 3)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--count", "0"], "--count must be above 0"),
        (["--cuont", "1"], "--cuont"),
        (["--names"], "--names needs at least one value"),
    ],
)
def test_mistakes_are_one_line(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        run_options("some", Options, print, words, lists=("names",))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("dalikd bench some: error: ")
    assert error.count("\n") == 1
    assert message in error


def test_one_process_is_asked_for_by_name():
    check_alone("teacher", 1)
    with pytest.raises(ValueError, match="bench teacher measures one process: start it without a launcher"):
        check_alone("teacher", 2)
