import dataclasses
import mmap
from collections import namedtuple

import numpy as np
import pytest
from PIL import Image

from dalikd.pipelines.sources import open_source
from dalikd.tools.bench import main
from dalikd.tools.bench.images import (
    bring_into_page_cache,
    cached_share,
    describe,
    draw_images,
    drop_from_page_cache,
    image_paths,
    repeat_images,
    sample_rows,
)


@pytest.fixture
def folder(tmp_path):
    """Three JPEGs of known sides in two classes, and a file that is none."""
    for name, size in {"a/1.jpg": (40, 30), "a/2.JPG": (20, 10), "b/3.jpg": (60, 50)}.items():
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(tmp_path / "p" / name, format="JPEG")
    (tmp_path / "p" / "a" / "notes.txt").write_text("x")
    return tmp_path / "p"


def test_describes_files_by_their_headers(folder):
    found = describe(open_source("imagefolder", folder, "train", split="."))
    sizes = [path.stat().st_size for path in image_paths(folder)]
    assert (found["number"], found["sampled"]) == (3, 3)
    assert found["width"] == {"mean": 40.0, "median": 40.0, "p95": pytest.approx(58.0)}
    assert found["height"] == {"mean": 30.0, "median": 30.0, "p95": pytest.approx(48.0)}
    assert found["encoded_bytes"]["mean"] == pytest.approx(sum(sizes) / 3)


def test_describes_arrays(folder):
    source = open_source("imagefolder", folder, "train", split=".")
    arrays = np.zeros((3, 8, 9, 3), np.uint8)
    found = describe(dataclasses.replace(source, files=None, arrays=arrays))
    assert (found["number"], found["width"]["median"], found["height"]["median"]) == (3, 9.0, 8.0)
    assert "encoded_bytes" not in found


def test_a_sample_is_seeded_and_without_repetition():
    rows = sample_rows(100, 10, seed=3)
    assert np.array_equal(rows, sample_rows(100, 10, seed=3))
    assert not np.array_equal(rows, sample_rows(100, 10, seed=4))
    assert len(set(rows.tolist())) == 10
    assert np.array_equal(sample_rows(5, 10), np.arange(5))


def test_files_leave_the_page_cache_and_come_back(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(64 * mmap.PAGESIZE))
    drop_from_page_cache([path])
    cold = cached_share([path])
    if cold == 1:
        pytest.skip("this file system keeps or does not tell what is cached")
    assert cold == 0
    bring_into_page_cache([path])
    assert cached_share([path]) == 1
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    assert cached_share([empty]) == 0
    assert cached_share([path, empty]) == 1


def test_reading_ahead_stops_at_half_of_the_memory(tmp_path, monkeypatch):
    paths = [tmp_path / "1", tmp_path / "2"]
    for path in paths:
        path.write_bytes(bytes(64 * mmap.PAGESIZE))
    drop_from_page_cache(paths)
    if cached_share(paths):
        pytest.skip("this file system keeps or does not tell what is cached")
    free = namedtuple("free", "available")(2 * 64 * mmap.PAGESIZE)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    bring_into_page_cache(paths)
    assert [cached_share([path]) for path in paths] == [1, 0]


def test_repeats_images_as_real_bytes(folder, tmp_path):
    assert repeat_images(folder, tmp_path / "more", count=7) == 7
    copies = image_paths(tmp_path / "more")
    assert [path.relative_to(tmp_path / "more").as_posix() for path in copies] == [
        "a/1-0.jpg",
        "a/1-1.jpg",
        "a/1-2.jpg",
        "a/2-0.JPG",
        "a/2-1.JPG",
        "b/3-0.jpg",
        "b/3-1.jpg",
    ]
    original = folder / "a" / "1.jpg"
    assert copies[2].read_bytes() == original.read_bytes()
    assert len({path.stat().st_ino for path in [*copies, original]}) == 8


def test_repeats_images_up_to_a_size(folder, tmp_path):
    sizes = [path.stat().st_size for path in image_paths(folder)]
    assert repeat_images(folder, tmp_path / "more", size=sum(sizes) + 1) == 4


def test_wrong_repetitions_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="either"):
        repeat_images(folder, tmp_path / "more")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        repeat_images(tmp_path / "none", tmp_path / "more", count=1)
    with pytest.raises(FileExistsError, match="not empty"):
        repeat_images(folder, folder, count=1)
    with pytest.raises(ValueError, match="GB"):
        repeat_images(folder, tmp_path / "more", size=1 << 60)
    assert not (tmp_path / "more").exists()


def test_images_are_repeated_from_the_command_line(small_images, tmp_path, capsys):
    main(["images", str(small_images), str(tmp_path / "many"), "--count", "305"])
    assert len(list((tmp_path / "many").glob("*/*.jpg"))) == 305
    with pytest.raises(SystemExit):
        main(["images", str(small_images), str(tmp_path / "more")])
    assert "give either --count, how many images, or --size, how many bytes" in capsys.readouterr().err


def test_drawn_images_are_decodable_and_differ(tmp_path):
    draw_images(tmp_path, count=6, width=40, height=30, classes=2)
    paths = image_paths(tmp_path)
    assert [path.parent.name for path in paths] == ["class0"] * 3 + ["class1"] * 3
    assert len({Image.open(path).convert("RGB").tobytes() for path in paths}) == 6
    assert {Image.open(path).size for path in paths} == {(40, 30)}
