import dataclasses
import mmap
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dalikd.pipelines.data import open_source
from dalikd.pipelines.draw_spec import View
from dalikd.pipelines.sources import Source
from dalikd.tools.bench import images, main
from dalikd.tools.bench.images import (
    bring_into_page_cache,
    cached_share,
    draw_images,
    drop_from_page_cache,
    image_paths,
    repeat_images,
)


@pytest.fixture
def folder(tmp_path):
    """Three JPEGs of known sides in two classes, and a file that is none."""
    for name, size in {"a/1.jpg": (40, 30), "a/2.JPG": (20, 10), "b/3.jpg": (60, 50)}.items():
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(tmp_path / "p" / name, format="JPEG")
    (tmp_path / "p" / "a" / "notes.txt").write_text("x")
    return tmp_path / "p"


def _described(source: Source) -> dict[str, Any]:
    found = images.describe(source)
    assert found is not None
    return found


def test_describes_files_by_their_headers_and_arrays(folder):
    source = open_source("imagefolder", folder, "train", split=".")
    found = _described(source)
    sizes = [path.stat().st_size for path in image_paths(folder)]
    assert (found["number"], found["sampled"]) == (3, 3)
    assert found["width"] == {"mean": 40.0, "median": 40.0, "p95": pytest.approx(58.0)}
    assert found["height"] == {"mean": 30.0, "median": 30.0, "p95": pytest.approx(48.0)}
    assert found["encoded_bytes"]["mean"] == pytest.approx(sum(sizes) / 3)
    found = _described(dataclasses.replace(source, files=None, arrays=np.zeros((3, 8, 9, 3), np.uint8)))
    assert (found["number"], found["width"]["median"], found["height"]["median"]) == (3, 9.0, 8.0)
    assert "encoded_bytes" not in found


def test_a_sample_is_without_repetition():
    rows = images.sample_rows(100, 10)
    assert np.array_equal(rows, images.sample_rows(100, 10))
    assert len(set(rows.tolist())) == 10
    assert np.array_equal(images.sample_rows(5, 10), np.arange(5))


def test_stores_are_named_after_what_a_source_is(small_images, tmp_path):
    source = open_source("imagefolder", small_images, "train", split=".")
    assert images.own_store(source) == "files"
    for store in images.STORES:
        found = images.open_store(store, source, View(32, "pad_crop"), tmp_path)
        assert images.own_store(found) == store
        assert (found.labels == source.labels).all()
        assert bool(images.stored_files(found)) == (store != "resident")
        assert all(Path(path).is_file() for path in images.stored_files(found))
        assert (images.describe(found) is None) == (store in ("webdataset", "tfrecord"))


@pytest.fixture
def cold(tmp_path):
    """Two files of 64 pages out of the page cache."""
    paths = [tmp_path / "1", tmp_path / "2"]
    for path in paths:
        path.write_bytes(bytes(64 * mmap.PAGESIZE))
    drop_from_page_cache(paths)
    if cached_share(paths) == 1:
        pytest.skip("this file system keeps or does not tell what is cached")
    return paths


def test_files_leave_the_page_cache_and_come_back(cold, tmp_path):
    assert cached_share(cold) == 0
    bring_into_page_cache(cold[:1])
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    assert [cached_share([cold[0], empty]), cached_share(cold), cached_share([empty])] == [1, 0.5, 0]


def test_reading_ahead_stops_at_half_of_the_memory(cold, monkeypatch):
    free = namedtuple("free", "available")(2 * 64 * mmap.PAGESIZE)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    bring_into_page_cache(cold)
    assert [cached_share([path]) for path in cold] == [1, 0]


def test_repeats_images_as_real_bytes(folder, tmp_path):
    assert repeat_images(folder, tmp_path / "more", count=7) == 7
    copies = image_paths(tmp_path / "more")
    names = [path.relative_to(tmp_path / "more").as_posix() for path in copies]
    assert names == [f"a/1-{i}.jpg" for i in range(3)] + [f"a/2-{i}.JPG" for i in range(2)] + [
        f"b/3-{i}.jpg" for i in range(2)
    ]
    assert copies[2].read_bytes() == (folder / "a/1.jpg").read_bytes()
    assert len({path.stat().st_ino for path in [*copies, folder / "a/1.jpg"]}) == 8
    sizes = [path.stat().st_size for path in image_paths(folder)]
    assert repeat_images(folder, tmp_path / "by size", size=sum(sizes) + 1) == 4


def test_wrong_repetitions_are_refused(folder, tmp_path, refused):
    (tmp_path / "none").mkdir()
    for source, target, more, message in (
        (folder, "more", (), "give either --count, how many images, or --size, how many bytes"),
        (tmp_path / "none", "more", ("--count", 1), "holds no images"),
        (folder, "p", ("--count", 1), "is not empty"),
        (folder, "more", ("--size", 1 << 60), "GB"),
    ):
        assert message in refused("images", source, tmp_path / target, *more)
    assert not (tmp_path / "more").exists()
    main(["images", str(folder), str(tmp_path / "more"), "--count", "5"])
    assert len(image_paths(tmp_path / "more")) == 5


def test_drawn_images_are_decodable_and_differ(tmp_path):
    draw_images(tmp_path, count=6, width=40, height=30, classes=2)
    paths = image_paths(tmp_path)
    assert [path.parent.name for path in paths] == ["class0"] * 3 + ["class1"] * 3
    assert len({Image.open(path).convert("RGB").tobytes() for path in paths}) == 6
    assert {Image.open(path).size for path in paths} == {(40, 30)}
