"""The first hour: every item is run, recorded and ended; what it runs are commands that exist."""

import json

import psutil
import pytest
import torch

from dalikd.tools.bench import commands, first_hour, main
from dalikd.tools.bench.first_hour import _Item, read_tests
from dalikd.tools.bench.record import load
from dalikd.tools.cli import parse, run_function


def _python(code: str, **more) -> _Item:
    return _Item(("-c", code), **{"seconds": 30, "dali": False, **more})


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Runs items, the command's own or others; returns the rows by item."""

    def call(*arguments: str, root=tmp_path, **items: _Item):
        if items:
            monkeypatch.setattr(first_hour, "items", lambda *_: items)
        main(["first-hour", "--root", str(root), "--device", "cpu", "--output", str(tmp_path / "out"), *arguments])
        record = load(tmp_path / "out/first-hour.json")
        assert record is not None
        return {row["item"]: row for row in record.rows}

    return call


def test_it_runs_on_the_cpu_and_leaves_json_and_a_table(recorded, small_images, tmp_path, capsys):
    """In processes of their own: a function, and what a machine without a GPU lacks."""
    rows = recorded("--only", "decoders", "tests", root=small_images)
    assert {name: row["outcome"] for name, row in rows.items()} == {
        "decoders": "done",
        "tests": "skipped: needs a GPU",
    }
    assert rows["decoders"]["found"].startswith("load 0: 0 of 8 images change with their batch, 0.00 grey levels")
    loads = json.loads((tmp_path / "out/decoders.json").read_text())["loads"]
    assert loads.keys() == {"0.0", "1.0", "0.65"}
    assert "| decoders | done |" in (tmp_path / "out/first-hour.md").read_text()
    assert "tests: skipped: needs a GPU" in capsys.readouterr().out


def test_an_item_that_fails_or_hangs_stops_no_other(recorded, tmp_path):
    """A command that takes too long is ended with what it has started. Each finds those before it recorded."""
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(77.5)']); "
    rows = recorded(
        bad=_python("print('line'); raise SystemExit('no such thing')"),
        long=_python(f"print('begun', flush=True); {child}time.sleep(60)", seconds=1),
        good=_python(
            "import json, pathlib; folder = pathlib.Path(" + repr(str(tmp_path / "out")) + ");"
            "found = json.loads((folder / 'first-hour.json').read_text())['rows'];"
            "(folder / 'good.json').write_text(json.dumps({'found': ' '.join(row['item'] for row in found)}))"
        ),
    )
    assert (rows["bad"]["outcome"], rows["bad"]["last lines"]) == ("failed (exit code 1)", "line / no such thing")
    assert (rows["long"]["outcome"], rows["long"]["last lines"]) == ("cut off after 1 s", "begun")
    assert rows["long"]["seconds"] < 8
    assert (rows["good"]["outcome"], rows["good"]["found"]) == ("done", "bad long")
    assert not [
        one for one in psutil.process_iter(["cmdline"]) if "time.sleep(77.5)" in " ".join(one.info["cmdline"] or [])
    ]


def test_what_is_missing_is_named(recorded, monkeypatch):
    monkeypatch.setattr(first_hour, "_installed", lambda *names: "nvidia" not in names)
    rows = recorded(two=_python("", gpus=2), decodes=_python("", dali=True), plain=_python(""))
    assert [row["outcome"] for row in rows.values()] == [
        "skipped: needs a GPU" if not torch.cuda.is_available() else "skipped: needs 2 GPUs, and here is 1",
        "skipped: no DALI: install nvidia-dali-cuda120 or nvidia-dali-cuda130",
        "done",
    ]


def test_what_would_end_after_the_limit_is_cut_off_or_not_begun(recorded, monkeypatch):
    monkeypatch.setattr(first_hour, "_RESERVE", 2.0)
    monkeypatch.setattr(first_hour, "_LEAST", 0.1)
    rows = recorded("--limit", "3", long=_python("import time; time.sleep(60)"), next=_python(""))
    assert rows["long"]["outcome"] == "cut off after 1 s"
    assert rows["next"]["outcome"] == "skipped: no time left of --limit"


def test_what_pytest_printed_is_read_even_if_it_was_cut_off():
    text = (
        "tests/gpu/test_a.py::test_one[x y] PASSED  [ 25%]\n"
        "tests/gpu/test_a.py::test_two FAILED  [ 50%]\n"
        "tests/gpu/test_a.py::test_two FAILED  [ 60%]\n"
        "tests/gpu/test_b.py::test_three SKIPPED (no DALI)  [ 75%]\n"
        "tests/gpu/test_b.py::test_four"
    )
    assert read_tests(text) == "1 passed, 2 failed, 1 skipped: test_a.py::test_two"
    assert read_tests("") == "none ended"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_items_are_commands_that_parse(tmp_path, monkeypatch, device):
    parsed = []
    monkeypatch.setattr(commands, "run_command", lambda name, _, words: parsed.append(parse(name, words)[0]))
    monkeypatch.setattr(
        commands, "run_function", lambda name, _, *words, **more: run_function(name, parsed.append, *words, **more)
    )
    items = first_hour.items(tmp_path, tmp_path, device)
    for item in items.values():
        if item.words[1] == "dalikd.tools.bench":
            main(list(item.words[2:]))
            if item.words[2] in ("step", "published"):
                assert parsed[-1].batch_size == (384 if device == "cuda" else 16)
                assert (parsed[-1].compile == "off") == (device == "cpu")
        elif item.words[0] == "-c":
            assert callable(getattr(first_hour, item.words[1].rpartition("first_hour.")[2].partition("(")[0]))
    assert len(parsed) == 7
    assert sum(item.seconds for item in items.values()) < 2 * 540


def test_mistakes_are_one_line(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda: this machine has no CUDA device; use --device cpu" in refused(
        "first-hour", "--output", tmp_path
    )
    words = ("first-hour", "--device", "cpu", "--output", tmp_path, "--only", "decoder")
    assert "--only decoder is unknown: did you mean decoders?" in refused(*words)
