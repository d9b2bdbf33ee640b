import subprocess
from itertools import pairwise
from types import SimpleNamespace

import pytest

from dalikd.tools.bench import all as every
from dalikd.tools.bench.dispatch import BENCHMARKS, Planned


@pytest.fixture
def started(monkeypatch):
    """Three benchmarks with plans of their own, a machine with one GPU, and what was started on it."""
    plans = {
        "loader": [Planned(("--a", "b c"))],
        "step": [Planned(("--x",), gpus=1), Planned(("--y",), gpus=2)],
    }
    names = {name: SimpleNamespace(plan=lambda _, steps=steps: steps) for name, steps in plans.items()}
    monkeypatch.setattr(every, "BENCHMARKS", [*plans, "all"])
    monkeypatch.setattr(every.importlib, "import_module", lambda name: names[name.rpartition(".")[2]])
    monkeypatch.setattr(every.torch.cuda, "device_count", lambda: 1)
    commands = []

    def run(command, check):
        assert not check
        commands.append(command[1:])
        return SimpleNamespace(returncode=int("--x" in command))

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_commands_run_one_after_the_other_and_are_listed(started, tmp_path, capsys):
    output = str(tmp_path / "results")
    with pytest.raises(ValueError, match=r"1 of the benchmarks failed: python -m dalikd\.tools\.bench\.step --x"):
        every.run(tmp_path, tmp_path / "results")
    assert started == [
        ["-m", "dalikd.tools.bench.loader", "--a", "b c", "--output", output],
        ["-m", "dalikd.tools.bench.step", "--x", "--output", output],
    ]
    assert capsys.readouterr().out.splitlines() == [
        f"python -m dalikd.tools.bench.loader --a 'b c' --output {output}",
        f"python -m dalikd.tools.bench.step --x --output {output}",
        "not run, as it needs 2 GPU(s) and this machine has 1: "
        f"python -m dalikd.tools.bench.step --y --output {output}",
    ]


def test_a_dry_run_starts_nothing(started, tmp_path, capsys):
    every.run(tmp_path, tmp_path / "results", dry=True)
    assert started == []
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_only_some_benchmarks(started, tmp_path):
    every.run(tmp_path, tmp_path / "results", only=["loader"])
    assert len(started) == 1
    with pytest.raises(ValueError, match="--only lader is no benchmark: there are loader, step"):
        every.run(tmp_path, only=["lader"])


def test_the_command_line_takes_several_benchmarks(started, tmp_path):
    with pytest.raises(SystemExit):  # step fails
        every.main(["--root", str(tmp_path), "--output", str(tmp_path / "results"), "--only", "step", "loader"])
    assert [command[1] for command in started] == ["dalikd.tools.bench.step", "dalikd.tools.bench.loader"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--root .*nowhere is not a folder"):
        every.run(tmp_path / "nowhere")


def test_every_benchmark_has_a_plan(tmp_path):
    steps = every.planned(tmp_path)
    assert {name for name, _ in steps} == set(BENCHMARKS) - {"first-hour", "all"}
    assert all(isinstance(step, Planned) for _, step in steps)


def test_rows_on_a_gpu_give_it_enough_to_do(tmp_path):
    """Small batches and eager code would measure launches; one row of step is eager, to be compared with."""
    words = [step.arguments for _, step in every.planned(tmp_path) if step.gpus]
    given = [dict(pairwise(one)) for one in words]
    assert min(int(one["--batch_size"]) for one in given) >= 384
    assert {one["--precision"] for one in given} == {"bf16"}
    assert [one["--compile"] for one in given if "--teacher.name" in one].count("off") == 1
