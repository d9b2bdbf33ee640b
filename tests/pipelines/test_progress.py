import pytest

from dalikd.pipelines import progress as module
from dalikd.pipelines.progress import progress


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(module, "_LINES_EVERY", 0.0)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("leave", [True, False])
def test_a_file_gets_whole_lines(capsys, leave):
    assert list(progress("scanning", range(3), unit=" classes", leave=leave)) == [0, 1, 2]
    with progress("writing", total=4, leave=leave) as bar:
        bar.update(4)
    text = capsys.readouterr().err
    assert "\r" not in text
    lines = text.splitlines()
    assert [line for line in lines if not line.startswith(("scanning: ", "writing: "))] == []
    assert "3/3" in next(line for line in reversed(lines) if line.startswith("scanning"))
    assert "4/4" in lines[-1]
    assert text.endswith("\n")


def test_labels_make_no_lines(capsys):
    with progress("rounds", total=9) as bar:
        for number in range(9):
            bar.set_description(f"round {number}")
            bar.update()
        bar.start_t -= 11  # as if it had taken longer than a line's ten seconds
    assert capsys.readouterr().err.count("\n") == 1


def test_what_is_soon_done_says_nothing(capsys):
    assert list(progress("scanning", range(3))) == [0, 1, 2]
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("name", ["RANK", "TQDM_DISABLE"])
def test_one_process_shows_it_unless_told_not_to(monkeypatch, capsys, name):
    monkeypatch.setenv(name, "1")
    assert list(progress("scanning", range(3))) == [0, 1, 2]
    assert capsys.readouterr().err == ""
