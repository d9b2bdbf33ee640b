"""One bad file never ends, hangs or silently harms a run: every kind is named, and replaced where that is asked for."""

import gzip
import io
import json
import os
import re
import shutil
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from dalikd.kd.backbones import create_model
from dalikd.trainers.checkpoint import save_weights

pytestmark = pytest.mark.faults

SECONDS = 240  # that a command may take
SIDES = (40, 48)  # height, width
_Y, _X = np.mgrid[: SIDES[0], : SIDES[1]]
PHOTO = Image.fromarray(np.stack([5 * _Y, 4 * _X, 128 + 60 * np.sin(_X / 7)], 2).astype(np.uint8))


def _save(format: str, image: Image.Image = PHOTO, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


JPEG, PNG, BMP, PPM, TIFF, WEBP, JP2 = map(_save, ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "JPEG2000"))
FRAME = JPEG.index(b"\xff\xc0")  # of the JPEG: marker, length, precision, height, width
SIZE = JP2.index(b"\xff\x4f\xff\x51") + 8  # of the codestream: right, bottom, left, top, and the same of a tile


def _put(encoded: bytes, place: int, new: bytes) -> bytes:
    return encoded[:place] + new + encoded[place + len(new) :]


def _png(width: int, height: int, bits: int, color: int, rows: bytes) -> bytes:
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0), b"IDAT" + zlib.compress(rows, 9))
    packed = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    return PNG[:8] + b"".join(packed) + PNG[-12:]


def _tag(number: int, value: int) -> bytes:
    """The TIFF with another value of a tag."""
    place = TIFF.index(struct.pack("<H", number), struct.unpack_from("<I", TIFF, 4)[0])
    return _put(TIFF, place + 8, struct.pack("<I", value))


def _bmp16() -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, SIDES[1], SIDES[0], 1, 16, 0, 0, 0, 0, 0, 0)
    return (
        b"BM" + struct.pack("<IHHI", 54 + 2 * SIDES[0] * SIDES[1], 0, 0, 54) + header + bytes(2 * SIDES[0] * SIDES[1])
    )


def _socket(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)  # an address is short
    with socket.socket(socket.AF_UNIX) as own:
        own.bind(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)


def _link_to_pipe(path: Path) -> None:
    os.mkfifo(path.parent / "pipe")
    path.symlink_to(path.parent / "pipe")


def _sparse(path: Path) -> None:
    path.write_bytes(JPEG)
    os.truncate(path, 3 << 30)


BAD: dict[str, bytes | Callable[[Path], object]] = {
    "empty": b"",
    "one byte": b"\xff",
    "text": b"This is not an image.\n" * 20,
    "a page": b"<!DOCTYPE html><html>404</html>",
    "packed": gzip.compress(JPEG),
    "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n",
    "zeros": bytes(4096),
    "noise": np.random.default_rng(0).bytes(4096),
    "JPEG, its start": JPEG[:100],
    "JPEG, half": JPEG[: len(JPEG) // 2],
    "JPEG, without its end": JPEG[:-20],
    "JPEG, zeros in its header": _put(JPEG, 200, bytes(100)),
    "JPEG, huge": _put(JPEG, FRAME + 5, struct.pack(">HH", 65500, 65500)),
    "JPEG, without height": _put(JPEG, FRAME + 5, bytes(2)),
    "JPEG, lossless": _put(JPEG, FRAME + 1, b"\xc3"),
    "JPEG, 12 bits": _put(JPEG, FRAME + 4, b"\x0c"),
    "PNG, its start": PNG[:40],
    "PNG, without its end": PNG[:-30],
    "PNG, another checksum": _put(PNG, 29, b"1234"),
    "PNG, damaged pixels": _put(PNG, len(PNG) // 2, bytes(30)),
    "PNG, higher than its pixels": _png(8, 4000, 8, 2, bytes(25 * 8)),
    "PNG, huge with a bit a pixel": _png(20_000, 20_000, 1, 0, bytes(2501 * 20_000)),
    "PNG, huge without pixels": _png(2_000_000, 1_900_000, 8, 2, b""),
    "PNG, without width": _png(0, 8, 8, 2, bytes(200)),
    "BMP, 16 bits": _bmp16(),
    "BMP, half": BMP[: len(BMP) // 2],
    "BMP, huge": _put(BMP, 18, struct.pack("<ii", 60_000, 60_000)),
    "PNM, 4 bits": b"P6\n8 8\n15\n" + bytes(192),
    "PNM, half": PPM[: len(PPM) // 2],
    "PNM, huge": b"P6\n60000 60000\n255\n" + bytes(100),
    "PNM, its start": b"P6\n48 ",
    "TIFF, a bit a pixel": _save("TIFF", PHOTO.convert("1")),
    "TIFF, turned": _save("TIFF", tiffinfo={274: 6}),
    "TIFF, strips without rows": _tag(278, 0),
    "TIFF, huge": _tag(256, 1_000_000_000),
    "TIFF, half": TIFF[: len(TIFF) // 2],
    "TIFF, tags elsewhere": _put(TIFF, 4, b"\xff\xff\xff\x7f"),
    "JPEG 2000, tiles without sides": _put(JP2, SIZE + 16, bytes(8)),
    "JPEG 2000, huge": _put(JP2, SIZE, struct.pack(">II", 60_000, 60_000)),
    "JPEG 2000, half": JP2[: len(JP2) // 2],
    "WebP, half": WEBP[: len(WEBP) // 2],
    "WebP, damaged": _put(WEBP, 20, bytes(16)),
    "GIF": _save("GIF"),
    "AVIF": b"\0\0\0\x18ftypavif" + bytes(30),
    "SVG": b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>',
    "JPEG XL": b"\xff\x0a" + bytes(30),
    "PDF": b"%PDF-1.7\n" + bytes(30),
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a socket": _socket,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to a pipe": _link_to_pipe,
    "a link to nothing": lambda path: path.symlink_to(path.parent / "nowhere"),
    "a link to itself": lambda path: path.symlink_to(path),
    "three gigabytes": _sparse,
}
TEXTS = PngImagePlugin.PngInfo()
TEXTS.add_text("long", "words " * 500_000)
TEXTS.add_text("packed", "words " * 500_000, zip=True)
GOOD: dict[str, bytes | Callable[[Path], object]] = {
    **{f"JPEG {number}": _save("JPEG", PHOTO.rotate(7 * number)) for number in range(12)},
    "JPEG and a tail": JPEG + bytes(100),
    "JPEG of four channels": _save("JPEG", PHOTO.convert("CMYK")),
    "PNG": PNG,
    "PNG with long texts": _save("PNG", pnginfo=TEXTS),
    "PNG with a large profile": _save("PNG", icc_profile=bytes(3_000_000)),
    "PNG of 16 bits": _save("PNG", Image.fromarray(np.asarray(PHOTO.convert("L"), np.uint16) * 257)),
    "BMP": BMP,
    "PNM": PPM,
    "TIFF": TIFF,
    "JPEG 2000": JP2,
    "WebP": WEBP,
    "a link": lambda path: path.symlink_to(path.with_name("0.jpg")),
}
#: of which each can do more than fail: end the process, take all memory, or wait for ever
WORST = ("TIFF, strips without rows", "JPEG 2000, tiles without sides", "PNG, huge with a bit a pixel", "a pipe")
COMMANDS = ("train", "evaluate", "measure")
BATCH = 16


def _tree(root: Path, kinds: list[str]) -> dict[str, Path]:
    """Two classes of good images, a whole number of batches with the bad ones. Returns the bad ones by kind."""
    for split in ("train", "val"):
        for number in range(4):
            path = root / split / "bee" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(JPEG)
    made, bad = [*GOOD.items(), *((kind, BAD[kind]) for kind in kinds)], {}
    made += [(f"filling {number}", JPEG) for number in range(-(len(made) + 4) % BATCH)]
    for split in ("val", "train"):
        (root / split / "ant").mkdir()
        for number, (kind, content) in enumerate(made[: None if split == "train" else 4]):
            path = root / split / "ant" / f"{number}.jpg"
            path.write_bytes(content) if isinstance(content, bytes) else content(path)
            bad |= {kind: path} if kind in kinds else {}
    return bad


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    save_weights(path, create_model("resnet8", 2), None, ["ant", "bee"])
    return path


def _words(command: str, root: Path, size: int, weights: Path, policy: str, report: Path) -> list[object]:
    words = [command, "--data.root", root, "--data.image_size", size, "--data.bad_files", policy, "--device", "cpu"]
    words += ["--data.bad_files_limit", len(BAD), "--data.threads", 2]
    of_batches = ["--batch_size", BATCH, "--mix.group", BATCH, "--epochs", 1]
    if command == "train":
        return [*words, *of_batches, "--model", "resnet8", "--output", report.parent]
    if command == "evaluate":
        return [*words, "--data.val_split", "train", "--model", "resnet8", "--weights", weights, "--json", report]
    teacher = ["--teacher.name", "resnet8", "--teacher.weights", weights, "--augmentation", "flip", "--window", BATCH]
    return [*words, *of_batches, *teacher, "--json", report]


def _check(process: Any, policy: str, command: str, bad: dict[str, Path], report: Path) -> None:
    """It has ended, named each bad file and no good one, and counted them where it went on."""
    code, out = process.wait(SECONDS), process.out
    assert "Traceback" not in process.err
    if policy == "stop":
        said = re.findall(rf"^dalikd {command}: error: cannot decode (.*)", process.err, re.M)
        assert (code, len(said)) == (2, 1), (code, process.err)
        named = re.findall(r"/\d+\.jpg (?=\()", said[0])
        assert 0 < len(named) == sum(f"{path} (" in said[0] for path in bad.values()), process.err
        return
    assert code == 0, process.err
    assert all(f"{path} (" in out for path in bad.values()), out
    found = json.loads(report.read_text())
    assert found["replaced_files"].keys() == {str(path) for path in bad.values()}
    if command == "train":
        assert found["replaced"] == {"train": len(bad), "val": 0}
    elif command == "evaluate":
        assert found["replaced"] == len(bad)


@pytest.mark.parametrize(("command", "size"), [("train", 32), ("evaluate", 224), ("measure", 224)])
def test_one_of_every_kind_is_named_and_replaced(tmp_path, start_forked, weights, full, command, size):
    some = 3 if command == "train" else 1  # of five
    kinds = [kind for number, kind in enumerate(BAD) if full or kind in WORST or number % 5 < some]
    bad, report = _tree(tmp_path / "data", kinds), tmp_path / "run" / "results.json"
    report.parent.mkdir()
    words = _words(command, tmp_path / "data", size, weights, "replace", report)
    _check(start_forked(tmp_path / "printed", *words), "replace", command, bad, report)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_worst_stop_a_run_by_name(tmp_path, start_forked, weights, full, command):
    """Alone, so that none is found because of another."""
    chosen = WORST if full else WORST[COMMANDS.index(command) :][:1]
    for number, kind in enumerate(chosen):
        bad, report = _tree(tmp_path / f"data{number}", [kind]), tmp_path / f"run{number}" / "results.json"
        words = _words(command, tmp_path / f"data{number}", 32, weights, "stop", report)
        _check(start_forked(tmp_path / f"printed{number}", *words), "stop", command, bad, report)


@pytest.mark.parametrize("kind", BAD)
def test_every_kind_alone(tmp_path, start_forked, weights, full, kind):
    """Under both policies, in every command, at both sizes."""
    if not full:
        pytest.skip("twelve commands a kind, with --full")
    bad = _tree(tmp_path / "data", [kind])
    for command in COMMANDS:
        for policy in ("stop", "replace"):
            for size in (32, 224):
                report = tmp_path / f"{command}{policy}{size}" / "results.json"
                report.parent.mkdir()
                words = _words(command, tmp_path / "data", size, weights, policy, report)
                _check(start_forked(tmp_path / f"printed-{report.parent.name}", *words), policy, command, bad, report)
                shutil.rmtree(report.parent)


def test_prepare_names_every_kind(tmp_path, start_forked):
    """One at a time of many would take too long: those that it does not name in one call it counts."""
    bad = _tree(tmp_path / "data", list(BAD))
    words = ["prepare", "--data.root", tmp_path / "data", "--split", "train", "--check", "true", "--threads", 2]
    process = start_forked(tmp_path / "printed", *words)
    assert process.wait(SECONDS) == 2
    assert f" and {len(bad) - 5} more: repair or remove them" in process.err, process.err


def test_processes_together_count_what_each_has_replaced(tmp_path, start_joined):
    kinds = ["JPEG, half", "TIFF, strips without rows", "text", "a pipe", "PNG, without its end", "empty"]
    bad, run = _tree(tmp_path / "data", kinds), tmp_path / "run"
    words = _words("train", tmp_path / "data", 32, Path(), "replace", run / "results.json")
    for process in start_joined(2, tmp_path / "printed", *words, "--mix.group", BATCH // 2):
        assert process.wait(SECONDS) == 0, process.err
    found = json.loads((run / "results.json").read_text())
    assert found["replaced_files"].keys() == {str(path) for path in bad.values()}
    assert (found["replaced"], found["processes"]) == ({"train": len(bad), "val": 0}, 2)
