import io
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from dalikd.pipelines.datasets.file_list import FileList
from dalikd.pipelines.doctor import BadFile, Decoder, find_bad_files
from dalikd.pipelines.sources import Source


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))


def make_source(paths: list[Path], root: Path) -> Source:
    return Source(
        name="imagefolder",
        split="train",
        classes=("a",),
        labels=np.zeros(len(paths), np.int64),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        image_size=32,
        files=FileList.from_paths([str(path) for path in paths], root),
    )


def test_good_files_of_every_kind(tmp_path: Path, photo: Image.Image) -> None:
    for name in ("a.jpg", "a.png", "a.bmp", "a.webp", "a.tif", "a.ppm"):
        photo.save(tmp_path / name)
    photo.convert("L").save(tmp_path / "grey.jpg")
    photo.convert("CMYK").save(tmp_path / "cmyk.jpg")
    photo.convert("P").save(tmp_path / "palette.png")
    photo.save(tmp_path / "png_named.jpg", format="PNG")
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 10
    assert find_bad_files(make_source(paths, tmp_path), range(10)) == []


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda _: b"", "the file is empty"),
        (lambda content: content[:100], "the JPEG is truncated"),
        (lambda content: content[: len(content) // 2], "the JPEG is truncated"),
        (lambda content: content[:-20], "the JPEG is truncated"),
        (lambda content: content[:200] + bytes(100) + content[300:], "DALI fails on this JPEG"),
        (lambda _: b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "the PNG is truncated"),
    ],
    ids=["empty", "header cut", "half", "end cut", "zeros in the header", "PNG header only"],
)
def test_bad_file_is_named(tmp_path: Path, photo: Image.Image, damage, reason: str) -> None:
    paths = [tmp_path / f"{number}.jpg" for number in range(3)]
    for path in paths:
        photo.save(path)
    paths[1].write_bytes(damage(paths[1].read_bytes()))
    (bad,) = find_bad_files(make_source(paths, tmp_path), np.arange(3))
    assert (bad.row, bad.path) == (1, str(paths[1]))
    assert reason in bad.reason
    assert "\n" not in bad.reason


def test_missing_file_and_order_of_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    source = make_source([tmp_path / "a.jpg", tmp_path / "b.jpg"], tmp_path)
    assert find_bad_files(source, [1, 0]) == [
        BadFile(1, str(tmp_path / "b.jpg"), "the file is missing"),
        BadFile(0, str(tmp_path / "a.jpg"), "the file is empty"),
    ]
    assert find_bad_files(source, []) == []
    assert source.files is not None
    (bad,) = find_bad_files(replace(source, files=replace(source.files, kept_in="KEPT")), [1])
    assert bad.reason.startswith("the file is missing; the list of files is remembered in KEPT: restore the file, or")


def test_one_bad_file_does_not_blame_its_batch(tmp_path: Path, photo: Image.Image) -> None:
    """What Pillow refuses may be well, and what it reads may be bad: the decoder that trains is asked."""
    for number in range(9):
        photo.save(tmp_path / f"{number}.png")
    photo.save(tmp_path / "2.png", icc_profile=bytes(3_000_000))
    photo.convert("1").save(tmp_path / "5.png", "TIFF")
    paths, looked = sorted(tmp_path.iterdir()), []
    bad = find_bad_files(make_source(paths, tmp_path), range(9), threads=2, done=looked.append)
    assert bad == [BadFile(5, str(paths[5]), "DALI fails on this TIFF: it is damaged, or of a rare kind")]
    assert looked == [4, 4, 1]


def test_images_in_memory_are_never_bad() -> None:
    source = Source(
        name="cifar10",
        split="train",
        classes=("a",),
        labels=np.zeros(2, np.int64),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        image_size=32,
        arrays=np.zeros((2, 32, 32, 3), np.uint8),
    )
    assert find_bad_files(source, [0, 1]) == []


def test_what_a_gpu_may_decode_to_grey_is_decoded_on_the_cpu(photo: Image.Image) -> None:
    """JPEGs that are cut off; whatever follows a JPEG's end is no part of it."""
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG")
    whole = buffer.getvalue()
    decoder = Decoder(1)
    decoder._here = Mock(decode=lambda encoded: ["by the GPU"] * len(encoded))
    cut, trailed = decoder.decode([whole[: len(whole) // 2], whole + b"tail"])
    assert (cut, trailed) == ("the JPEG is truncated", "by the GPU")
