import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dalikd.pipelines.lock import holder, only_writer, take_lock


def test_one_holds_a_lock_at_a_time(tmp_path):
    path = tmp_path / "teachers" / "a.lock"
    assert holder(path) == ""
    lock = take_lock(path)
    assert lock is not None
    assert take_lock(path) is None
    assert holder(path).startswith(f"process {os.getpid()} on {socket.gethostname()} since 20")
    lock.close()
    again = take_lock(path)
    assert again is not None
    assert path.read_text().count("process") == 1
    again.close()


def test_a_killed_process_gives_its_lock_back(tmp_path):
    path = tmp_path / "a.lock"
    code = (
        "import sys, time; from pathlib import Path; from dalikd.pipelines.lock import take_lock; "
        "lock = take_lock(Path(sys.argv[1])); print('locked', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    assert take_lock(path) is None
    assert holder(path).startswith(f"process {process.pid} on ")
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    lock = take_lock(path)
    assert lock is not None
    lock.close()


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(ValueError, match=r"a.lock cannot be locked \(No locks available\), .* name a folder on a file"):
        take_lock(tmp_path / "a.lock")


def test_one_writes_in_a_folder_and_leaves_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run" / ".lock"
    with only_writer(path, "--output run") as lock:
        lock.check()
        with (
            pytest.raises(ValueError, match=rf"^--output run is being written by process {os.getpid()} on .* since 20"),
            only_writer(path, "--output run"),
        ):
            pass
    assert list(tmp_path.iterdir()) == []
    with only_writer(path, "--output run"):
        (path.parent / "file").touch()
    assert [file.name for file in path.parent.iterdir()] == ["file"]


def test_a_folder_that_was_removed_or_replaced_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "run" / ".lock"
    with only_writer(path, "--output run") as lock:
        path.unlink()
        with pytest.raises(OSError, match="run was removed or replaced while this call wrote into it"):
            lock.check()
        path.write_text("of another call")
        with pytest.raises(OSError, match="was removed or replaced"):
            lock.check()
    assert path.read_text() == "of another call"


def test_a_writer_goes_on_without_locks_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with (
        pytest.warns(UserWarning, match=r"on a file system without locks \(No locks available\)"),
        only_writer(tmp_path / ".lock", "--output run") as lock,
    ):
        lock.check()
