import errno
import os
from typing import Any

import pytest

from dalikd.pipelines.lock import Unlockable, take_lock
from dalikd.trainers.study.plan import Cell
from dalikd.trainers.study.state import Record, lock_path, write_record
from dalikd.trainers.study.status import print_status, study_status
from dalikd.trainers.tracking import write_json

RESULT: dict[str, Any] = {"finished": True, "epochs": 1.0, "versions": {}, "fingerprint": {"train": "t", "val": "v"}}
RESULT |= {when: {"epoch": 1, "val": {"loss": 1.0, "top1": 0.5, "top5": 1.0}} for when in ("last", "best")}
CELLS = [Cell(f"distill/{name}", "distill", {}) for name in "abcd"] + [Cell("measure/t.json", "measure", {})]


def test_a_study_is_seen_from_its_folder(tmp_path, capsys):
    """Two runs of 100 s a unit of work are done; one of two units runs, one of three waits."""
    for name in "ab":
        (tmp_path / "distill" / name).mkdir(parents=True)
        write_json(tmp_path / "distill" / name / "results.json", RESULT)
        write_record(tmp_path, f"distill/{name}", Record("done", 100.0))
    lock = take_lock(lock_path(tmp_path, "distill/c"))
    assert lock is not None
    write_record(tmp_path, "distill/d", Record("left", 5.0, 1, "its process was killed", "process 7 on far"))
    write_record(tmp_path, "measure/t.json", Record("failed", 1.0, 0, "measure/t.json: the disk is full"))
    work = {"distill/a": 1.0, "distill/b": 1.0, "distill/c": 2.0, "distill/d": 3.0}
    status = study_status(tmp_path, CELLS, work)
    assert [run["state"] for run in status["runs"]] == ["done", "done", "running", "waiting", "failed"]
    assert (status["seconds_left"], status["at_once"]) == (100.0 * (2 / 2 + 3), 1)
    lock.close()
    print_status(tmp_path, status)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("running  distill/c: process ")
    assert lines[1] == "failed   measure/t.json: measure/t.json: the disk is full"
    assert lines[2] == "waiting  distill/d: last: its process was killed"
    assert lines[3].startswith(f"2 done, 1 running, 1 failed, 1 waiting of 5 runs in {tmp_path}, 20")
    assert lines[3].endswith("; about 7 min left, 1 at once")
    assert study_status(tmp_path, CELLS, work)["at_once"] == 0


@pytest.mark.parametrize("seconds", [-7200, 7200])
def test_clocks_of_other_machines_do_not_matter(tmp_path, monkeypatch, seconds):
    monkeypatch.setattr("dalikd.pipelines.lock._lock", _refuse)
    (tmp_path / "distill/a").mkdir(parents=True)
    write_json(tmp_path / "distill/a/results.json", RESULT)
    write_record(tmp_path, "distill/a", Record("done", 100.0))
    lease = take_lock(lock_path(tmp_path, "distill/b"))
    assert lease is not None
    here = study_status(tmp_path, CELLS, {})
    assert [run["state"] for run in here["runs"]] == ["done", "running", "waiting", "waiting", "waiting"]
    for path in tmp_path.rglob("*"):
        os.utime(path, (path.stat().st_mtime + seconds,) * 2)
    assert take_lock(lock_path(tmp_path, "distill/b")) is None
    assert study_status(tmp_path, CELLS, {}) == here
    lease.close()


def _refuse(path: object) -> None:
    raise Unlockable(f"{path} cannot be locked") from OSError(errno.ENOLCK, "No locks available")


def test_no_time_is_guessed_before_a_run_is_done(tmp_path, capsys):
    print_status(tmp_path, study_status(tmp_path, CELLS * 3, {}))
    out = capsys.readouterr().out
    assert "left" not in out
    assert "waiting  … and 5 more" in out
