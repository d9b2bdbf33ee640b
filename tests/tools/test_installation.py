import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version

import pytest

from dalikd.pipelines.doctor import Decoder
from dalikd.tools import doctor, installation


@pytest.fixture
def child(monkeypatch) -> Callable[[str], None]:
    """Puts a line of code in the place of the training run, which takes seconds to start."""
    begin = subprocess.Popen

    def put(code: str) -> None:
        def started(command, **options):
            assert command[:3] == [sys.executable, "-m", "dalikd.tools.train"]
            return begin([sys.executable, "-c", code], **options)

        monkeypatch.setattr(installation.subprocess, "Popen", started)

    put("")
    return put


@pytest.fixture
def call(child, capsys, tmp_path, monkeypatch) -> Callable[[], tuple[int, list[str], dict]]:  # noqa: ARG001
    """Calls the command; exit code, lines, and what its JSON file holds."""
    monkeypatch.setenv("DALIKD_CACHE", str(tmp_path / "cache"))

    def call() -> tuple[int, list[str], dict]:
        code = 0
        try:
            doctor.main(["--json", str(tmp_path / "report.json")])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, capsys.readouterr().out.splitlines(), json.loads((tmp_path / "report.json").read_text())

    return call


def test_an_installation_that_is_fine(call, tmp_path):
    code, lines, report = call()
    assert (code, lines[-1], report["fine"], report["faults"]) == (0, "fine", True, [])
    assert report["versions"]["torch"] == version("torch")
    kinds = [line.partition(":")[0] for line in lines]
    assert kinds == ["versions", "GPU", "CPU", "cache", "decode", "training", "written", "fine"]
    assert report["cache"]["folder"] == str(tmp_path / "cache")
    assert report["decode"]["cpu"].startswith("fine (")
    assert report["training"].startswith("fine (")
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import sys; print('dalikd train: error: no', file=sys.stderr); sys.exit(2)", "dalikd train: error: no"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "signal 11 (SIGSEGV) has ended it"),
    ],
)
def test_a_run_that_fails_is_what_is_to_be_mended(call, child, code, words):
    child(code)
    ended, lines, report = call()
    assert ended == 1
    assert lines[-1] == f"mend first: a training run of two steps fails: {words}"
    assert report["training"] == f"it fails: {words}"


def test_the_first_thing_to_mend_comes_last(call, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setattr(installation, "requires", lambda _: ["numpy<1", "absent-package>=2", "ruff; extra == 'test'"])
    monkeypatch.setattr(Decoder, "decode", lambda *_: ["the JPEG is damaged"])
    code, lines, report = call()
    numpy, absent, cache, jpeg = report["faults"]
    assert numpy == f"dalikd needs numpy<1, and {version('numpy')} is installed: pip install 'numpy<1'"
    assert absent == "dalikd needs absent-package>=2, and it is not installed: pip install 'absent-package>=2'"
    assert cache.startswith("the cache folder (DALIKD_CACHE): ")
    assert "DALI does not decode a JPEG on the CPU (the JPEG is damaged)" in jpeg
    assert (code, lines[-1]) == (1, f"mend first: {numpy}")
    assert [line for line in lines if line.startswith("to mend: ")] == [
        f"to mend: {fault}" for fault in report["faults"]
    ]


def test_a_gpu_that_torch_cannot_see_is_named_and_the_rest_is_looked_at(call, monkeypatch):
    def start(*_):
        raise ValueError("this machine has a GPU (/dev/nvidia0) that torch cannot see")

    monkeypatch.setattr(installation, "start", start)
    code, lines, report = call()
    assert code == 1
    assert lines[-1] == "mend first: this machine has a GPU (/dev/nvidia0) that torch cannot see"
    assert report["training"].startswith("fine (")
