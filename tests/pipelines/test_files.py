import hashlib
import os
import signal
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dalikd.pipelines.files import build_once, file_digest, read_within, write_atomically


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("sync", [True, False])
def test_a_file_is_made_and_replaced(tmp_path: Path, sync: bool) -> None:
    path = tmp_path / "new" / "folder" / "file.npy"
    write_atomically(path, b"first", sync=sync)
    assert path.read_bytes() == b"first"
    write_atomically(path, lambda file: np.save(file, np.arange(3)), sync=sync)
    assert np.load(path).tolist() == [0, 1, 2]
    assert names(path.parent) == ["file.npy"]


@pytest.mark.parametrize("error", [OSError("No space left on device"), ValueError("not finite"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path, error: BaseException) -> None:
    def fail(file) -> None:
        file.write(b"half")
        raise error

    path = tmp_path / "file"
    with pytest.raises(type(error)):
        write_atomically(path, fail)
    assert names(tmp_path) == []
    write_atomically(path, b"old")
    with pytest.raises(type(error)):
        write_atomically(path, fail)
    assert (path.read_bytes(), names(tmp_path)) == (b"old", ["file"])


def test_a_failed_move_leaves_no_rest(tmp_path: Path) -> None:
    (tmp_path / "folder" / "in the way").mkdir(parents=True)
    with pytest.raises(OSError, match="folder"):
        write_atomically(tmp_path / "folder", b"content")
    assert names(tmp_path) == ["folder"]


def test_a_kill_in_between_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    code = (
        "import os, signal, sys; from pathlib import Path; from dalikd.pipelines.files import write_atomically\n"
        "def write(file): file.write(b'new'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomically(Path(sys.argv[1]), write)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"


def test_of_several_writers_one_wins_whole(tmp_path: Path) -> None:
    path, contents = tmp_path / "file", [bytes([number]) * 100_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(lambda content: write_atomically(path, content, sync=False), contents * 4):
            assert path.read_bytes() in contents
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_permissions_are_as_the_umask_says(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_the_disk_has_it_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    replace = Path.replace

    def noted(descriptor: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")

    def moved(path: Path, target: Path) -> None:
        steps.append("move")
        replace(path, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "replace", moved)
    write_atomically(tmp_path / "file", b"content")
    assert steps == ["file", "move", "folder"]
    write_atomically(tmp_path / "file", b"content", sync=False)
    assert steps == ["file", "move", "folder", "move"]


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError("Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomically(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


def test_checksums(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    assert file_digest(tmp_path / "file") == hashlib.sha256(content).hexdigest()
    assert file_digest(tmp_path / "file", "md5") == hashlib.md5(content).hexdigest()


class TestBuildOnce:
    def test_whole_or_not_at_all(self, tmp_path: Path) -> None:
        target = tmp_path / "deep" / "target"

        def fail(folder: Path) -> None:
            (folder / "half").touch()
            raise RuntimeError("stopped")

        with pytest.raises(RuntimeError, match="stopped"):
            build_once(target, fail)
        assert list(target.parent.iterdir()) == []
        build_once(target, lambda folder: (folder / "whole").touch())
        assert [path.name for path in target.iterdir()] == ["whole"]
        assert list(target.parent.iterdir()) == [target]

    def test_slower_process_keeps_what_is_there(self, tmp_path: Path) -> None:
        target = tmp_path / "target"

        def overtaken(folder: Path) -> None:
            (folder / "mine").touch()
            target.mkdir()
            (target / "theirs").touch()

        build_once(target, overtaken)
        assert [path.name for path in target.iterdir()] == ["theirs"]

    def test_empty_folder_is_filled_and_a_full_one_is_not(self, tmp_path: Path) -> None:
        build_once(tmp_path / "a", lambda _: None)
        build_once(tmp_path / "a", lambda folder: (folder / "x").touch())
        with pytest.raises(FileExistsError, match="a is already there"):
            build_once(tmp_path / "a", lambda folder: (folder / "y").touch())
        assert [path.name for path in (tmp_path / "a").iterdir()] == ["x"]


class TestReadWithin:
    def test_a_file_or_a_link_to_one(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"content")
        (tmp_path / "b").symlink_to(tmp_path / "a")
        assert read_within(str(tmp_path / "b"), 5, 7) == b"content"
        with pytest.raises(OSError, match=r"its 7 bytes are more than the 6 allowed: .*/a"):
            read_within(str(tmp_path / "a"), 5, 6)

    def test_what_is_no_file(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        for path, kind in ((tmp_path / "pipe", "a pipe"), (tmp_path, "a folder"), (Path("/dev/zero"), "a device")):
            with pytest.raises(OSError, match=f"it is {kind}, not a file: .*{path}"):
                read_within(str(path), 5, 100)
        with pytest.raises(FileNotFoundError):
            read_within(str(tmp_path / "none"), 5, 100)

    def test_a_disk_that_does_not_answer(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "a").touch()
        answers = threading.Event()
        monkeypatch.setattr("dalikd.pipelines.files.os.fdopen", lambda *_, **__: answers.wait())
        with pytest.raises(TimeoutError, match=r"no answer within 0.1 s: .*/a"):
            read_within(str(tmp_path / "a"), 0.1, 100)
        answers.set()
