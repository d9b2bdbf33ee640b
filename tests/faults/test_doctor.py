"""`dalikd doctor` as a process: stopped and killed at any time it loses nothing that it had written, and says the same
in the end."""

import json
import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

pytestmark = pytest.mark.faults


def _report(path: Path) -> dict:
    """What it says of the images, whenever they were looked at."""
    content = json.loads(path.read_text())
    for split in content["splits"].values():
        for key in ("known", "seconds", "seconds_of_processes"):
            del split[key]
    return {key: content[key] for key in ("splits", "faults", "fine")}


def test_stopped_or_killed_it_says_the_same_in_the_end(photos, start_forked, full, tmp_path):
    data = tmp_path / "data"
    for number in range(100 if full else 24):
        shutil.copytree(photos, data, dirs_exist_ok=True, copy_function=lambda one, two, n=number: _copy(one, two, n))
    bad = data / "bird/0-portrait.jpg"
    content = bad.read_bytes()
    bad.unlink()  # a hard link, and other tests read what it is one to
    bad.write_bytes(content[:2000])

    def start(cache: str, report: str):
        words = ("doctor", data, "--json", tmp_path / report, "--processes", 2)
        return start_forked(tmp_path / f"{cache}-{report}", *words, DALIKD_CACHE=str(tmp_path / cache))

    assert start("whole", "whole.json").wait() == 1
    expected = _report(tmp_path / "whole.json")
    assert expected["splits"]["train"]["cannot_decode"][0]["path"] == str(bad)
    for number, seconds in enumerate((0.5, 2, 3, 4, 5, 6) if full else (1,)):
        stopped = start("stopped", f"{number}.json")
        time.sleep(seconds)
        with suppress(ProcessLookupError):  # it was faster
            os.kill(stopped.pid, signal.SIGINT if number % 2 == 0 else signal.SIGTERM)
        code = stopped.wait()
        assert code in (1, 130, 143), stopped.err
        assert "Traceback" not in stopped.err
    if full:
        killed = start("stopped", "killed.json")
        time.sleep(3)
        killed.kill()
    again = start("stopped", "again.json")
    assert again.wait() == 1, again.err
    assert _report(tmp_path / "again.json") == expected
    assert not list((tmp_path / "stopped/manifests").glob("*/.*"))


def _copy(one: str, two: str, number: int) -> None:
    os.link(one, os.path.join(os.path.dirname(two), f"{number}-{os.path.basename(two)}"))  # noqa: PTH118, PTH119, PTH120
