import hashlib
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
from PIL import Image

from dalikd.pipelines.files import (
    LARGEST_TEXT,
    Appended,
    Refused,
    build_once,
    file_digest,
    load_yaml,
    read_json,
    read_npy,
    read_text,
    read_within,
    read_yaml,
    remove_litter,
    write_atomically,
)

ROOT = Path(__file__).parents[2]


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


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """As on a full disk: no file of this process may grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _draw(file: BinaryIO) -> None:
    from matplotlib.figure import Figure

    Figure(figsize=(9, 9)).savefig(file, format="png", dpi=200)


NUMBERS = np.random.default_rng(0).random(100_000)
WRITERS: dict[str, bytes | Callable[[BinaryIO], object]] = {
    "bytes": bytes(100_000),
    "torch.save": lambda file: torch.save({"weight": torch.zeros(100_000), "other": torch.ones(9)}, file),
    "np.save": lambda file: np.save(file, NUMBERS),
    "np.savez": lambda file: np.savez_compressed(file, numbers=NUMBERS),
    "matplotlib": _draw,
    "PIL": lambda file: Image.fromarray((NUMBERS[:90_000].reshape(300, 300) * 255).astype(np.uint8)).save(file, "PNG"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_named_whoever_writes(tmp_path: Path, writer: str) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with (
        small_files(2000),
        pytest.raises(OSError, match=rf"^{re.escape(str(path))} cannot be written: File too large$"),
    ):
        write_atomically(path, WRITERS[writer])
    assert (path.read_bytes(), names(tmp_path)) == (b"old", ["file"])
    write_atomically(path, WRITERS[writer])
    assert path.stat().st_size > 2000


def test_what_cannot_be_read_is_not_said_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        write_atomically(tmp_path / "file", lambda _: (tmp_path / "missing").read_bytes())
    assert names(tmp_path) == []


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").touch()
    with pytest.raises(OSError, match=r"folder/file cannot be written: "):
        write_atomically(tmp_path / "folder" / "file", b"")


def test_the_file_of_before_is_kept_by_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, previous = tmp_path / "file", tmp_path / "previous"
    for content in (b"1", b"2", b"3"):
        write_atomically(path, content, previous=previous)
    assert (path.read_bytes(), previous.read_bytes()) == (b"3", b"2")
    with small_files(0), pytest.raises(OSError, match="cannot be written"):
        write_atomically(path, b"4", previous=previous)
    assert (path.read_bytes(), previous.read_bytes(), names(tmp_path)) == (b"3", b"2", ["file", "previous"])

    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    write_atomically(path, b"4", previous=previous)
    assert (path.read_bytes(), previous.read_bytes(), names(tmp_path)) == (b"4", b"3", ["file", "previous"])


def test_of_writers_that_may_not_replace_the_first_wins(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"first", replace=False)
    with pytest.raises(FileExistsError, match="file is already there"):
        write_atomically(path, b"second", replace=False)
    assert (path.read_bytes(), names(tmp_path)) == (b"first", ["file"])


def test_what_is_appended_is_there_or_an_error(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log"
    file = Appended(path)
    file.append(b"one")
    assert path.read_bytes() == b"one"
    with small_files(5), pytest.raises(OSError, match=r"log cannot be written: File too large"):
        file.append(b"two and more")
    file.append(b"!")
    file.close()
    assert path.read_bytes() == b"onetw!"
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/log cannot be written: "):
        Appended(tmp_path / "file" / "log")


def test_litter_of_the_dead_goes_and_that_of_the_living_stays(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from dalikd.pipelines.files import *\n"
        "end = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "path = Path(sys.argv[1])\n"
        "build_once(path, end) if path.name == 'folder' else write_atomically(path, end)"
    )
    for name in ("folder", "file"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=False)
    (tmp_path / ".file.of-the-user").touch()
    assert len(names(tmp_path)) == 3
    begun, done = threading.Event(), threading.Event()

    def write(file: BinaryIO) -> None:
        begun.set()
        assert done.wait(30)
        file.write(b"whole")

    def build(folder: Path) -> None:
        write((folder / "file").open("wb"))

    writers = [
        threading.Thread(target=write_atomically, args=(tmp_path / "living", write)),
        threading.Thread(target=build_once, args=(tmp_path / "built", build)),
    ]
    for writer in writers:
        begun.clear()
        writer.start()
        assert begun.wait(30)
    remove_litter(tmp_path)
    assert len(names(tmp_path)) == 3
    done.set()
    for writer in writers:
        writer.join()
    assert names(tmp_path) == [".file.of-the-user", "built", "living"]
    remove_litter(tmp_path / "missing")


#: what is written past `write_atomically`: files that grow, what other programs write, and pixels in memory
PAST = {
    ("pipelines/files.py", 'part.open("xb")'): 1,
    ("pipelines/files.py", 'path.open("ab", buffering=0)'): 1,
    ("pipelines/lock.py", 'path.open("a+", encoding="utf-8")'): 1,
    ("pipelines/lock.py", 'own.open("x+b", buffering=0)'): 1,
    ("pipelines/lock.py", 'open("xb")'): 1,
    ("pipelines/datasets/file_list.py", '"sides.lock").open("w")'): 1,
    ("pipelines/objects.py", '".lock").open("w")'): 1,
    ("pipelines/datasets/object_list.py", '.lock").open("w")'): 1,
    ("tools/bench/first_hour.py", 'log.open("wb")'): 1,
    ("tools/bench/scaling.py", '"log").open("w+b")'): 1,
    ("trainers/teacher_cache/layout.py", 'path.open("r+b")'): 1,
}


def test_every_file_is_written_so() -> None:
    found: dict[tuple[str, str], int] = {}
    opened = re.compile(r"""[\w"./) ]*open\("[rwxa+b]*[wxa+][rwxa+b]*"[^)]*\)|\.write_(?:text|bytes)\(|save_file\(""")
    saved = re.compile(r"(?:torch\.save|np\.savez?(?:_compressed)?|savefig|json\.dump|yaml\.dump)\((?!.*file)[^)]*")
    for file in (path for room in ("pipelines", "kd", "trainers", "tools") for path in (ROOT / room).rglob("*.py")):
        for line in file.read_text("utf-8").splitlines():
            for match in (*opened.findall(line), *saved.findall(line)):
                key = file.relative_to(ROOT).as_posix(), match.strip().removeprefix("with ")
                found[key] = found.get(key, 0) + 1
    assert {key: count for key, count in found.items() if not any(key[0] == f and e in key[1] for f, e in PAST)} == {}
    assert len(found) >= len(PAST)


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

    def test_a_full_one_is_replaced_once_another_is_whole(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "old").touch()

        def fail(_: Path) -> None:
            assert (tmp_path / "a" / "old").exists()
            raise RuntimeError("stopped")

        with pytest.raises(RuntimeError, match="stopped"):
            build_once(tmp_path / "a", fail, replace=True)
        assert (tmp_path / "a" / "old").exists()
        build_once(tmp_path / "a", lambda folder: (folder / "x").touch(), replace=True)
        assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["a", "a/x"]

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


# ------------------------------------------------------------------------------------------------- reading


def test_yaml_comes_as_it_is_meant_and_as_it_is_written() -> None:
    text = "a: &a {x: 010, y: yes}\nb: {<<: *a, y: 3}\nc: [*a, ~]\n"
    content, written = load_yaml(text, "c.yaml")
    assert content["b"] == {"x": 8, "y": 3}
    assert written["a"] == {"x": "010", "y": "yes"}
    assert written["c"] == [{"x": "010", "y": "yes"}, "~"]
    assert load_yaml("# nothing\n", "c.yaml") == (None, None)


_LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_LAUGHS, "line 6: its aliases stand for more than 50000 values"),
        (
            _LAUGHS.replace("[x]", "{x: 1}").replace("[*", "{<<: [*").replace("]\n", "]}\n"),
            "its aliases stand for more",
        ),
        ("[" * 40_000, "line 1: more than 32 groups lie in each other"),
        ("{a: " * 40, "line 1: more than 32 groups lie in each other"),
        ("a: &a [*a]", "line 1: an alias means what it is a part of"),
        ("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n", "line 5: c is given twice in one group"),
        ("x" * 70_000, "is longer than 64 Ki characters"),
        ("a: !!int x", "is not YAML"),
        ("a: !!timestamp x", "is not YAML: "),
        ("a: 2001-13-01", "is not YAML: month must be in 1..12"),
        ("a: " + "9" * 5000, "is not YAML: Exceeds the limit"),
        ("a: !!python/object/apply:os.getcwd []", "is not YAML: could not determine a constructor"),
    ],
)
def test_yaml_that_costs_too_much_or_means_nothing_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/c\.yaml.*{message}") as caught:
        read_yaml(tmp_path / "c.yaml")
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, Refused) == ("is not YAML" not in message)


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"\xff", b"9" * 5000, b" " * (LARGEST_TEXT + 1)])
def test_json_that_cannot_be_read_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/c\.json"):
        read_json(tmp_path / "c.json")


def test_a_text_takes_no_more_memory_than_the_file(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("abc")
    assert read_text(tmp_path / "t", largest=1 << 60) == "abc"
    with pytest.raises(ValueError, match=rf"^{tmp_path}/t is larger than 0 KiB"):
        read_text(tmp_path / "t", largest=2)


@pytest.mark.parametrize("mode", [None, "r", "r+"])
@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (4000000000,)}", "it has 32 bytes of an array that takes"),
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (-1,)}", "an array of"),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (4,)}", "an array of object"),
        ("{'descr': '<f8', 'shape': (4,)}", ""),
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (4,", ""),
        ("(" * 9000, ""),
    ],
)
def test_an_array_larger_than_its_file_is_refused(tmp_path: Path, header: str, message: str, mode: str | None) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.arange(4.0))
    assert read_npy(path, mode=mode).tolist() == [0, 1, 2, 3]
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(32))
    with pytest.raises(ValueError, match=rf"^{path} is damaged or not an \.npy file: {message}"):
        read_npy(path, mode=mode)
