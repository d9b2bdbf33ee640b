import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dalikd.pipelines import object_cache
from dalikd.pipelines.object_cache import ObjectCache

BODY = bytes(range(250)) * 400  # 100 kB


def _cache(folder: Path, size: int | None = None) -> ObjectCache:
    cache = ObjectCache(str(folder), size)
    _settle(cache)
    return cache


def _settle(cache: ObjectCache) -> None:
    while cache._counting:
        pass


def _keep(cache: ObjectCache, *numbers: int) -> None:
    for number in numbers:
        cache.keep(f"s3://b/{number}", len(BODY), 7, BODY)
        _settle(cache)


def _kept(cache: ObjectCache, count: int) -> list[int]:
    return [number for number in range(count) if cache.read(f"s3://b/{number}", len(BODY), 7) is not None]


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*/*") if path.is_file()]


def test_an_object_is_kept_by_its_url_size_and_tag(tmp_path):
    _keep(_cache(tmp_path), 1)
    cache = _cache(tmp_path)  # of the next run
    assert cache.read("s3://b/1", len(BODY), 7) == BODY
    assert cache.read("s3://b/1", len(BODY), 8) is None
    assert cache.read("s3://b/1", len(BODY) - 1, 7) is None
    assert cache.read("gs://b/1", len(BODY), 7) is None


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:0], lambda b: bytes(len(b)), lambda b: b + b"0"])
def test_a_damaged_file_is_not_an_object(tmp_path, damage):
    cache = _cache(tmp_path)
    _keep(cache, 1)
    [path] = _files(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    assert cache.read("s3://b/1", len(BODY), 7) is None
    _keep(cache, 1)
    assert _kept(cache, 2) == [1]


def test_what_other_runs_used_longest_ago_goes_first_and_what_this_one_used_stays(tmp_path):
    _keep(_cache(tmp_path), *range(9))
    cache = _cache(tmp_path, 10**6)
    for age, path in enumerate(sorted(_files(tmp_path), key=lambda path: path.stat().st_mtime_ns)):
        os.utime(path, (1000 - age, 1000 - age))  # 8 was used the longest time ago
    cache.read("s3://b/7", len(BODY), 7)
    _keep(cache, *range(10, 30))
    kept = _kept(cache, 30)
    assert [number for number in kept if number < 10] == [7]
    assert len(kept) >= 8
    assert sum(path.stat().st_size for path in _files(tmp_path)) <= 10**6


def test_several_processes_fill_one_folder(tmp_path):
    code = (
        "import sys; from dalikd.pipelines.object_cache import ObjectCache\n"
        f"cache = ObjectCache({str(tmp_path)!r}, 2_000_000)\n"
        "for number in range(60):\n"
        "    body = bytes([number]) * 50_000\n"
        "    if cache.read(str(number), 50_000, 1) not in (None, body): sys.exit('wrong')\n"
        "    cache.keep(str(number), 50_000, 1, body)\n"
        "while cache._counting: pass\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [one.wait() for one in running] == [0, 0, 0]
    _cache(tmp_path, 2_000_000)
    assert 1_000_000 < sum(path.stat().st_size for path in _files(tmp_path)) <= 2_000_000
    assert all(len(path.name) == 30 for path in _files(tmp_path))


def test_a_full_disk_is_told_once_and_the_run_goes_on(tmp_path, monkeypatch, capfd):
    cache = _cache(tmp_path)
    _keep(cache, 1)

    def full(path, *_, **__):
        raise OSError(errno.ENOSPC, f"{path} cannot be written: No space left on device")

    monkeypatch.setattr(object_cache, "write_atomically", full)
    _keep(cache, 2, 3)
    assert capfd.readouterr().out.count("No space left on device") == 1
    assert _kept(cache, 4) == [1]


def test_a_folder_that_cannot_be_written_is_an_error_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"--data.cache .*file: .*; free the disk, or name another folder"):
        ObjectCache(str(tmp_path / "file"), None)
