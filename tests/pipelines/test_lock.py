import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dalikd.pipelines import lock
from dalikd.pipelines.lock import Unlockable, holder, is_held, only_writer, take_lock


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


# ---------------------------------------------------------------------------------------------------------- leases


def _refuse(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.fixture
def leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks, and short heartbeats."""
    monkeypatch.setattr("fcntl.flock", _refuse)
    monkeypatch.setattr(lock, "HEARTBEAT", 0.2)
    monkeypatch.setattr(lock, "_seen", {})


def _until(ready: Callable[[], Any], seconds: float = 20) -> Any:
    end = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < end
        time.sleep(0.005)
    return found


@pytest.mark.usefixtures("leases")
def test_a_lease_keeps_others_out_as_long_as_its_holder_lives(tmp_path: Path) -> None:
    path = tmp_path / "teachers" / "a.lock"
    lease = take_lock(path)
    assert lease is not None
    assert holder(path).startswith(f"process {os.getpid()} on {socket.gethostname()} since 20")
    end = time.monotonic() + 1.2  # six heartbeats
    while time.monotonic() < end:
        assert take_lock(path) is None
        assert is_held(path)
        time.sleep(0.005)
    lease.close()
    assert not is_held(path)
    assert [file.name for file in path.parent.iterdir()] == ["a.lock"]
    again = take_lock(path)
    assert again is not None
    again.close()


def _abandon(path: Path) -> bytes:
    """A lease whose holder was killed, in hours that this machine has not come to yet. Returns its content."""
    content = b"0000000007 %s\nprocess 1 on elsewhere\n" % (b"0" * 32)
    path.write_bytes(content)
    os.utime(path, (time.time() + 7200,) * 2)
    return content


@pytest.mark.usefixtures("leases")
def test_a_silent_lease_is_taken_by_one_of_many(tmp_path: Path) -> None:
    """Whatever the clocks of their machines; each of the rounds has a lease of its own."""
    for number in range(3):
        path, won = tmp_path / f"{number}.lock", list[Any]()
        _abandon(lock._lease_path(path))
        begun, over = time.monotonic(), threading.Event()

        def seek(path: Path = path, won: list[Any] = won, over: threading.Event = over) -> None:
            while not over.is_set():
                if (lease := take_lock(path)) is not None:
                    won.append((time.monotonic(), lease))
                time.sleep(0.001)

        takers = [threading.Thread(target=seek) for _ in range(6)]
        for taker in takers:
            taker.start()
        _until(lambda won=won: won)
        time.sleep(0.4)  # two heartbeats, in which another could win too
        over.set()
        for taker in takers:
            taker.join()
        assert len(won) == 1
        assert won[0][0] - begun >= 3 * lock.HEARTBEAT
        won[0][1].close()
        assert [file.name for file in tmp_path.iterdir() if "lease" in file.name] == []


@pytest.mark.usefixtures("leases")
def test_a_taker_that_was_killed_halfway_keeps_no_other_out(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    token = lock._token(_abandon(lock._lease_path(path)))
    (tmp_path / f".a.lock.lease.{token}.0").touch()
    lease = _until(lambda: take_lock(path))
    lease.close()
    assert [file.name for file in tmp_path.iterdir()] == ["a.lock"]


@pytest.mark.usefixtures("leases")
def test_a_holder_whose_lease_was_taken_learns_of_it_and_leaves_the_new_one_alone(tmp_path: Path) -> None:
    path, said = tmp_path / "a.lock", list[str]()
    lease = take_lock(path, said.append)
    assert lease is not None
    lock._lease_path(path).unlink()
    taken = _abandon(lock._lease_path(path))
    _until(lambda: said)
    assert said == [f"{path}.lease was taken by process 1 on elsewhere"]
    lease.close()
    assert lock._lease_path(path).read_bytes() == taken


@pytest.mark.usefixtures("leases")
def test_a_holder_that_cannot_write_ends_before_others_take_its_lease(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("os.pwrite", lambda *_: _refuse())
    said, begun = list[float](), time.monotonic()
    lease = take_lock(tmp_path / "a.lock", lambda _: said.append(time.monotonic() - begun))
    assert lease is not None
    assert _until(lambda: said)[0] > 2 * lock.HEARTBEAT
    lease.close()


@pytest.mark.usefixtures("leases")
def test_a_file_system_with_neither_locks_nor_links_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("os.link", lambda *_: _refuse())
    with pytest.raises(
        Unlockable, match=r"with neither locks nor hard links \(No locks available\), .* another folder"
    ):
        take_lock(tmp_path / "a.lock")
    assert [file.name for file in tmp_path.iterdir()] == ["a.lock"]


def test_other_errors_are_no_reason_for_a_lease(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("fcntl.flock", fail)
    with pytest.raises(Unlockable, match=r"a.lock cannot be locked \(Input/output error\), .* name a folder on a file"):
        take_lock(tmp_path / "a.lock")


def test_whether_a_lock_is_held_is_seen_without_taking_it(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    assert not is_held(path)
    held = take_lock(path)
    assert held is not None
    assert is_held(path)
    held.close()
    assert not is_held(path)


# --------------------------------------------------------------------------------------------------------- folders


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
    monkeypatch.setattr("fcntl.flock", _refuse)
    with (
        pytest.warns(UserWarning, match=r"on a file system without locks \(No locks available\)"),
        only_writer(tmp_path / ".lock", "--output run") as lock,
    ):
        lock.check()


def test_a_signal_that_comes_as_the_file_is_made_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take = lock._lock

    def interrupted(path: Path) -> None:
        monkeypatch.setattr(lock, "_lock", take)
        taken = take(path)
        assert taken is not None
        taken.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(lock, "_lock", interrupted)
    with pytest.raises(KeyboardInterrupt), only_writer(tmp_path / "new" / ".lock", "--output"):
        pass
    assert not list(tmp_path.iterdir())
