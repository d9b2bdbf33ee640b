import pytest

from dalikd.tools.bench.options import check_alone, check_names, check_rounds


def test_names_are_checked():
    assert check_names("--x", ["b", "a", "b"], ("a", "b", "c")) == ["b", "a"]
    assert check_names("--x", ["all"], ("a", "b")) == ["a", "b"]
    with pytest.raises(ValueError, match=r"--x bcd is unknown: did you mean abcd\? there are abcd, z"):
        check_names("--x", ["bcd"], ("abcd", "z"))


def test_a_spread_needs_repetitions():
    check_rounds(5)
    with pytest.raises(ValueError, match="--rounds 4: give at least 5"):
        check_rounds(4)


def test_one_process_is_asked_for_by_name():
    check_alone("teacher", 1)
    with pytest.raises(ValueError, match="bench teacher measures one process: start it without a launcher"):
        check_alone("teacher", 2)
