import os
import runpy
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from dalikd import tools
from dalikd.pipelines.hardware import package_versions
from dalikd.tools.main import COMMANDS, main
from dalikd.trainers.signals import EXIT_CODES, SIGNALS


def _call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["dalikd", *arguments])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize("arguments", [(), ("-h",), ("--help",)])
def test_help_lists_the_commands(monkeypatch, capsys, arguments):
    code, out, err = _call(monkeypatch, capsys, *arguments)
    assert (code, err) == (0, "")
    assert out.startswith("usage: dalikd COMMAND")
    for name, text in COMMANDS.items():
        assert f"  {name} " in out
        assert text in out


def test_exit_codes_stand_once_and_in_the_guide(monkeypatch, capsys):
    for code, text in EXIT_CODES.items():
        assert f"  {code:<4} {text}\n" in _call(monkeypatch, capsys, "--help")[1]
    assert {*EXIT_CODES} == {0, 1, 2, 75, *(128 + number for number in (*SIGNALS, signal.SIGPIPE))}
    guide = (Path(__file__).parents[2] / "docs/guides/training.md").read_text()
    _, found, table = guide.partition("| exit code | what it means |\n|--:|:--|\n")
    rows = [line.strip("| ").split(" | ") for line in table.split("\n\n")[0].splitlines()]
    assert found
    assert {int(code): text for code, text in rows} == EXIT_CODES


def test_an_unknown_command_is_one_line(monkeypatch, capsys):
    code, out, err = _call(monkeypatch, capsys, "distil")
    assert (code, out) == (2, "")
    assert err == f"dalikd: error: unknown command distil; there are {', '.join(COMMANDS)}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_in_both_ways(monkeypatch, capsys, name):
    code, out, _ = _call(monkeypatch, capsys, name, "--help")
    assert code == 0
    assert out.startswith(f"usage: dalikd {name}")
    monkeypatch.setattr(sys, "argv", ["x", "--help"])
    monkeypatch.delitem(sys.modules, f"dalikd.tools.{name}", raising=False)
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(f"dalikd.tools.{name}", run_name="__main__")
    assert stop.value.code == 0
    assert capsys.readouterr().out == out


@pytest.mark.parametrize("name", COMMANDS)
def test_mistakes_end_with_exit_code_2(monkeypatch, capsys, name):
    code, _, err = _call(monkeypatch, capsys, name, "--no-such-option", "1")
    assert code == 2
    assert err.count("\n") == 1
    assert err.startswith(f"dalikd {name}: error: ")


def test_versions_are_one_line(monkeypatch, capsys):
    code, out, err = _call(monkeypatch, capsys, "--version")
    assert (code, err) == (0, "")
    found = package_versions()
    assert found.keys() >= {"dali", "nvimgcodec", "torch_cuda"}
    monkeypatch.setattr("dalikd.tools.main.package_versions", lambda: {**found, "driver": "580.65.06"})
    _, with_driver, _ = _call(monkeypatch, capsys, "--version")
    dali, codec, cuda = (found[name] for name in ("dali", "nvimgcodec", "torch_cuda"))
    assert (
        out
        == f"dalikd {version('dalikd')}, torch {version('torch')} (CUDA {cuda}), DALI {dali}, nvImageCodec {codec}\n"
    )
    assert with_driver == out.replace("\n", ", driver 580.65.06\n")


def _fresh(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_", "KMP_"))}
    command = [sys.executable, "-c", f"import os, sys, dalikd.tools.main; assert 'torch' not in sys.modules; {code}"]
    return subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True, check=False)


def test_help_that_nobody_reads_ends_in_silence():
    ended = _fresh("r, w = os.pipe(); os.close(r); os.dup2(w, 1); sys.argv[1:] = []; dalikd.tools.main.main()")
    assert (ended.returncode, ended.stderr) == (141, "")
    ended = _fresh("sys.stdout = None; sys.argv[1:] = []; dalikd.tools.main.main()")
    assert (ended.returncode, ended.stderr) == (0, "")


def test_waiting_threads_sleep_soon_unless_the_user_says_else():
    """OpenMP reads its variables when torch is loaded; they are there before, and child processes inherit them."""
    code = "print(os.environ.get('GOMP_SPINCOUNT'))"
    assert int(_fresh(code).stdout) > 0
    assert _fresh(code, GOMP_SPINCOUNT="7").stdout == "7\n"
    assert _fresh(code, OMP_WAIT_POLICY="active").stdout == "None\n"
    assert int(_fresh(code, OMP_NUM_THREADS="1").stdout) > 0


@pytest.mark.parametrize(
    ("taken", "environment", "threads"),
    [
        (0.3, {}, None),  # of four cores: the system's own
        (1.1, {}, 3),
        (9.0, {}, 1),
        (1.1, {"OMP_NUM_THREADS": "4"}, None),
        (1.1, {"LOCAL_WORLD_SIZE": "2"}, None),
    ],
)
def test_cores_that_others_keep_busy_are_left_to_them(monkeypatch, capsys, taken, environment, threads):
    chosen = []
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(tools, "_AT_START", (100.0, 50.0))
    monkeypatch.setattr(tools, "_busy", lambda: (105.0, 50.0 + 5 * taken))
    tools.choose_threads.__wrapped__()
    assert chosen == ([] if threads is None else [threads])
    said = f"other processes keep {taken:.1f} of 4 cores busy: torch computes with {threads} thread(s)"
    assert (said in capsys.readouterr().err) == bool(chosen)


@pytest.mark.parametrize(
    ("words", "program", "number", "ended", "said"),
    [
        ("python /bin/dalikd train --epochs 1", "/bin/dalikd", "SIGINT", 130, "dalikd train: stopped (Ctrl-C)"),
        ("python -m dalikd study", "-m", "SIGHUP", 129, "dalikd study: stopped by signal 1 (SIGHUP)"),
        ("python -m dalikd.tools.bench", "-m", "SIGUSR2", 140, "dalikd bench: stopped by signal 12 (SIGUSR2)"),
        ("python -m theirs", "-m", "SIGINT", -2, None),
    ],
)
def test_a_signal_before_a_command_is_loaded_is_one_line(words, program, number, ended, said):
    """A program of others that imports dalikd keeps its own handlers."""
    code = (
        f"import signal, sys; sys.orig_argv[:], sys.argv[:] = {words.split()}, [{program!r}]; import dalikd.tools; "
        f"assert 'torch' not in sys.modules; signal.raise_signal(signal.{number})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == ended
    assert found.stderr == f"{said}\n" if said else found.stderr.endswith("\nKeyboardInterrupt\n")


def test_commands_are_files():
    """No file is named as a module of the standard library, which would shadow it for scripts beside it."""
    folder = Path(tools.__file__).parent
    files = {path.stem for path in folder.glob("*.py")}
    packages = {path.parent.name for path in folder.glob("*/__main__.py")}
    assert set(COMMANDS) <= files | packages
    assert not files & set(sys.stdlib_module_names)
