"""The command lines of the benchmarks, and `bench all`."""

import subprocess
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from dalikd.tools.bench import commands, main
from dalikd.tools.bench.commands import BENCHMARKS, planned, run_all
from dalikd.tools.bench.record import check_names
from dalikd.tools.cli import parse, run_function
from dalikd.tools.layers import OPTIONS


@pytest.fixture
def started(monkeypatch):
    """Three plans, a machine with one GPU, and what was started on it; commands with --x fail."""
    monkeypatch.setattr(commands, "_PLANS", "loader --a 'b c'\n1 step --x\n2 step --y PICKS")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    started = []

    def run(command, check):
        assert not check
        started.append(command[1:])
        return SimpleNamespace(returncode=int("--x" in command))

    monkeypatch.setattr(subprocess, "run", run)
    return started


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


def test_commands_run_one_after_the_other_and_are_listed(started, tmp_path, capsys):
    output = str(tmp_path / "results")
    with pytest.raises(ValueError, match=r"1 of the benchmarks failed: python -m dalikd\.tools\.bench step --x"):
        run_all(tmp_path, tmp_path / "results")
    assert started == [
        ["-m", "dalikd.tools.bench", "loader", "--a", "b c", "--output", output],
        ["-m", "dalikd.tools.bench", "step", "--x", "--output", output],
    ]
    assert capsys.readouterr().out.splitlines() == [
        f"python -m dalikd.tools.bench loader --a 'b c' --output {output}",
        f"python -m dalikd.tools.bench step --x --output {output}",
        "not run, as it needs 2 GPU(s) and this machine has 1: "
        f"python -m dalikd.tools.bench step --y --augmentation cutmixpick_teacher --output {output}",
    ]


def test_only_some_are_run_and_a_dry_run_starts_nothing(started, tmp_path, capsys):
    run_all(tmp_path, tmp_path / "results", dry=True)
    assert started == []
    with pytest.raises(SystemExit):  # step fails
        main(["all", "--root", str(tmp_path), "--output", str(tmp_path / "results"), "--only", "step", "loader"])
    assert [command[2] for command in started] == ["step", "loader"]
    with pytest.raises(ValueError, match="--only lader is unknown: did you mean loader"):
        run_all(tmp_path, only=["lader"])
    with pytest.raises(FileNotFoundError, match=r"--root .*nowhere is not a folder"):
        run_all(tmp_path / "nowhere")
    assert "not run" in capsys.readouterr().out


def test_every_plan_is_a_command_that_parses(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(
        commands, "run_function", lambda name, _, *rest, **more: run_function(name, ran.append, *rest, **more)
    )
    monkeypatch.setattr(commands, "run_command", lambda name, _, words: ran.append(parse(name, words)[0]))
    plans = planned(tmp_path)
    assert {plan.name for plan in plans} == set(BENCHMARKS) - {"first-hour", "all", "images", "tables"}
    for name, arguments, gpus in plans:
        main([name, *arguments])
        if f"bench {name}" in OPTIONS:
            assert ran[-1].data.root == str(tmp_path)
            assert ran[-1].batch_size % ran[-1].mix.group == 0
            assert (ran[-1].device == "cuda") == bool(gpus) or name in ("teacher", "passes", "published")
        if name in ("step", "scaling"):
            ran[-1].check_warm_up()
    assert len(ran) == len(plans)


def test_rows_on_a_gpu_give_it_enough_to_do(tmp_path):
    """Small batches and eager code would measure launches; one row of step is eager, to be compared with."""
    given = [dict(pairwise(plan.arguments)) for plan in planned(tmp_path) if plan.gpus]
    assert min(int(one["--batch_size"]) for one in given) >= 384
    assert {one["--precision"] for one in given} == {"bf16"}
    assert [one["--compile"] for one in given if "--teacher.name" in one].count("off") == 1


def test_names_are_checked():
    assert check_names("--x", ["b", "a", "b"], ("a", "b", "c")) == ["b", "a"]
    assert check_names("--x", ["all"], ("a", "b")) == ["a", "b"]
    with pytest.raises(ValueError, match=r"--x bcd is unknown: did you mean abcd\? there are abcd, z"):
        check_names("--x", ["bcd"], ("abcd", "z"))
