"""The command lines of the benchmarks, `bench all`, and the first hour: every item is run, recorded and ended."""

import json
from itertools import pairwise

import psutil
import pytest
import torch

from dalikd.tools.bench import commands, first_hour, main
from dalikd.tools.bench.commands import BENCHMARKS, planned, run_all
from dalikd.tools.bench.first_hour import Item, read_tests
from dalikd.tools.bench.record import load
from dalikd.tools.cli import parse, run_function
from dalikd.tools.layers import OPTIONS


@pytest.fixture
def parsed(monkeypatch):
    """Options of the commands that are called, which do not run."""
    found = []
    monkeypatch.setattr(commands, "run_command", lambda name, _, words: found.append(parse(name, words)[0]))
    monkeypatch.setattr(
        commands, "run_function", lambda name, _, *words, **more: run_function(name, found.append, *words, **more)
    )
    return found


@pytest.mark.parametrize("arguments", [[], ["-h"]])
def test_help_lists_the_benchmarks(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out and text in out for name, (_, text) in BENCHMARKS.items())


def test_an_unknown_benchmark_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["laoder"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        f"dalikd bench: error: unknown benchmark laoder; there are {', '.join(BENCHMARKS)}\n"
    )


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_explains_its_options(capsys, name):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: dalikd bench {name}")


def test_commands_run_one_after_the_other_and_are_listed(monkeypatch, tmp_path, capsys):
    """On a machine with one GPU; a command with --x fails. A dry run starts nothing."""
    started = []

    def run(command):
        started.append(command[1:])
        return int("--x" in command)

    monkeypatch.setattr(commands, "_PLANS", "0 loader --a 'b c'\n1 step --x\n2 step --y PICKS")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(commands, "run_process", run)
    output = str(tmp_path / "results")
    run_all(tmp_path, tmp_path / "results", dry=True)
    assert started == []
    with pytest.raises(ValueError, match=r"1 of the benchmarks failed: python -m dalikd\.tools\.bench step --x"):
        run_all(tmp_path, tmp_path / "results")
    assert started == [
        ["-m", "dalikd.tools.bench", "loader", "--a", "b c", "--output", output],
        ["-m", "dalikd.tools.bench", "step", "--x", "--output", output],
    ]
    assert capsys.readouterr().out.splitlines()[3:] == [
        f"python -m dalikd.tools.bench loader --a 'b c' --output {output}",
        f"python -m dalikd.tools.bench step --x --output {output}",
        "not run, as it needs 2 GPU(s) and this machine has 1: "
        f"python -m dalikd.tools.bench step --y --augmentation cutmixpick_teacher --output {output}",
    ]
    with pytest.raises(SystemExit):  # step fails
        main(["all", "--root", str(tmp_path), "--output", output, "--only", "step", "loader"])
    assert [command[2] for command in started[2:]] == ["step", "loader"]
    with pytest.raises(ValueError, match="--only lader is unknown: did you mean loader"):
        run_all(tmp_path, only=["lader"])
    with pytest.raises(FileNotFoundError, match=r"--root .*nowhere is not a folder"):
        run_all(tmp_path / "nowhere")


def test_every_plan_is_a_command_that_parses(tmp_path, parsed):
    """Rows on a GPU give it enough to do: small batches and eager code would measure launches."""
    plans = planned(tmp_path)
    assert {name for _, name, _ in plans} == set(BENCHMARKS) - {"first-hour", "all", "images", "tables"}
    for gpus, name, arguments in plans:
        main([name, *arguments])
        if f"bench {name}" in OPTIONS:
            assert parsed[-1].data.root == str(tmp_path)
            assert parsed[-1].batch_size % parsed[-1].mix.group == 0
            assert (parsed[-1].device == "cuda") == bool(gpus) or name in ("teacher", "passes", "published")
    assert len(parsed) == len(plans)
    given = [dict(pairwise(arguments)) for gpus, _, arguments in plans if gpus]
    assert min(int(one["--batch_size"]) for one in given) >= 384
    assert {one["--precision"] for one in given} == {"bf16"}
    assert [one["--compile"] for one in given if "--teacher.name" in one].count("off") == 1  # to be compared with


def _python(code: str, seconds: float = 30, kind: str = "own") -> Item:
    return Item(seconds, kind, ("-c", code))


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Runs items in place of the command's own; returns the rows by item, and the exit code."""

    def call(*arguments: str, **items: Item):
        monkeypatch.setattr(first_hour, "items", lambda *_: items)
        words, code = ["--root", str(tmp_path), "--device", "cpu", "--output", str(tmp_path / "out"), *arguments], 0
        words += ["--json", str(tmp_path / "told.json")]
        try:
            main(["first-hour", *words])
        except SystemExit as stop:
            code = stop.code
        record = load(tmp_path / "out/first-hour.json")
        assert record is not None
        assert record == load(tmp_path / "told.json")
        return {row["item"]: row for row in record.rows}, code

    return call


def test_an_item_that_fails_or_hangs_stops_no_other_and_ends_with_an_error(recorded, tmp_path, capsys):
    """A command that takes too long is ended with what it has started. Each finds those before it recorded."""
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(77.5)']); "
    out = str(tmp_path / "out")
    rows, code = recorded(
        bad=_python("print('line'); raise SystemExit('no such thing')"),
        long=_python(f"print('begun', flush=True); {child}time.sleep(60)", seconds=1),
        good=_python(
            f"import json, pathlib; folder = pathlib.Path({out!r});"
            "found = json.loads((folder / 'first-hour.json').read_text())['rows'];"
            "(folder / 'good.json').write_text(json.dumps({'found': ' '.join(row['item'] for row in found)}))"
        ),
        tests=_python("", kind="tests"),
    )
    assert code == 2
    assert "2 of 4 items did not end well: bad failed (exit code 1); long cut off after 1 s" in capsys.readouterr().err
    assert (rows["bad"]["outcome"], rows["bad"]["last lines"]) == ("failed (exit code 1)", "line / no such thing")
    assert (rows["long"]["outcome"], rows["long"]["last lines"]) == ("cut off after 1 s", "begun")
    assert rows["long"]["seconds"] < 8
    assert (rows["good"]["outcome"], rows["good"]["found"]) == ("done", "bad long")
    assert rows["tests"]["outcome"] == "skipped: needs a GPU" or torch.cuda.is_available()
    assert "| bad | failed (exit code 1) |" in (tmp_path / "out/first-hour.md").read_text()
    alive = (" ".join(one.info["cmdline"] or []) for one in psutil.process_iter(["cmdline"]))
    assert not any("time.sleep(77.5)" in line for line in alive)


def test_what_is_missing_is_named_and_what_would_end_after_the_limit_is_cut_off_or_not_begun(recorded, monkeypatch):
    monkeypatch.setattr(first_hour, "find_spec", lambda _: None)
    monkeypatch.setattr(first_hour, "_RESERVE", 2.0)
    monkeypatch.setattr(first_hour, "_LEAST", 0.1)
    long, dali = _python("import time; time.sleep(60)"), _python("", kind="bench:0")
    rows, _ = recorded("--limit", "3", dali=dali, long=long, next=_python(""))
    assert [row["outcome"] for row in rows.values()] == [
        "skipped: no DALI: install nvidia-dali-cuda120 or nvidia-dali-cuda130",
        "cut off after 1 s",
        "skipped: no time left of --limit",
    ]


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


def test_what_items_find_is_told_in_a_line(tmp_path, small_images):
    main(["versions", "--device", "cpu", "--output", str(tmp_path / "v.json")])
    assert first_hour._read(tmp_path / "v.json", "own").startswith("torch ")
    main(["decoders", "--device", "cpu", "--root", str(small_images), "--output", str(tmp_path / "d.json")])
    found = first_hour._read(tmp_path / "d.json", "bench")
    assert found.startswith("load 0: 0 of 8 images change with their batch, 0.00 grey levels")
    assert json.loads((tmp_path / "d.json").read_text())["loads"].keys() == {"0.0", "1.0", "0.65"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_items_are_commands_that_parse(tmp_path, parsed, device):
    items = first_hour.items(tmp_path, tmp_path, device)
    for name, item in items.items():
        assert item.words[1] == ("pytest" if item.kind == "tests" else "dalikd.tools.bench")
        if item.kind != "tests" and name not in ("versions", "decoders"):
            main(list(item.words[2:]))
        if name.startswith(("step", "published")):
            assert parsed[-1].batch_size == (384 if device == "cuda" else 16)
            assert (parsed[-1].compile == "off") == (device == "cpu")
    assert len(parsed) == 7
    assert ("sweep-16" if device == "cuda" else "sweep-2") in items
    assert sum(item.seconds for item in items.values()) < 2 * 540


def test_mistakes_are_one_line(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda: this machine has no CUDA device; use --device cpu" in refused(
        "first-hour", "--output", tmp_path
    )
    words = ("first-hour", "--device", "cpu", "--output", tmp_path, "--only", "decoder")
    assert "--only decoder is unknown: did you mean decoders?" in refused(*words)
