"""What DALI decodes is what Pillow decodes, or it is refused by its header; what is no image for it is told apart."""

import gzip
import io
import math
import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dalikd.pipelines.content import extension_of, image_sides, refusal, why_damaged
from dalikd.pipelines.doctor import Decoder
from dalikd.pipelines.hardware import is_decode_failure

SIDES = (40, 48)  # rows, columns
RGB = np.asarray(
    Image.fromarray(np.random.default_rng(3).integers(30, 220, (4, 4, 3), dtype=np.uint8)).resize(SIDES[::-1], 3)
)
GREY = np.asarray(Image.fromarray(RGB).convert("L"))
ALPHA = np.tile(np.linspace(0, 255, SIDES[1]).astype(np.uint8), (SIDES[0], 1))
RGBA = np.dstack([RGB, ALPHA])
DEEP = GREY.astype(np.uint16) * 250 + 77  # 16 bits whose low bytes are not the high ones


def _save(pixels: np.ndarray, format: str, mode: str | None = None, **options: Any) -> bytes:
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    (image if mode is None else image.convert(mode)).save(buffer, format, **options)
    return buffer.getvalue()


def _without_app14(encoded: bytes) -> bytes:
    place = encoded.index(b"\xff\xee\0\x0eAdobe")
    return encoded[:place] + encoded[place + 16 :]


def _tiff(pixels: np.ndarray, photometric: int, *more: tuple[int, list[int]], planar: int = 1) -> bytes:
    """One uncompressed strip, or one a channel; `more` tags of shorts win."""
    samples, bits = pixels.size // (SIDES[0] * SIDES[1]), 8 * pixels.itemsize
    strips = [pixels] if planar == 1 else [pixels[..., channel] for channel in range(samples)]
    tags = {256: [SIDES[1]], 257: [SIDES[0]], 258: [bits] * samples, 259: [1], 262: [photometric], 277: [samples]}
    tags |= {278: [SIDES[0]], 284: [planar], **dict(more)}
    body, starts = b"", []
    for strip in strips:
        starts.append(8 + len(body))
        body += np.ascontiguousarray(strip).tobytes()
    entries, tail, end = b"", b"", 8 + len(body) + 2 + 12 * (len(tags) + 2) + 4
    for tag, values in sorted({**tags, 273: starts, 279: [strips[0].nbytes] * len(strips)}.items()):
        kind, letter = (4, "I") if tag in (273, 279) else (3, "H")
        packed = struct.pack(f"<{len(values)}{letter}", *values)
        field = packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack("<I", end + len(tail))
        tail += packed if len(packed) > 4 else b""
        entries += struct.pack("<HHI", tag, kind, len(values)) + field
    return (
        b"II*\0"
        + struct.pack("<I", 8 + len(body))
        + body
        + struct.pack("<H", len(tags) + 2)
        + entries
        + bytes(4)
        + tail
    )


def _pnm(kind: int, pixels: np.ndarray, highest: int) -> bytes:
    header = b"P%d # made by hand\n%d %d\n%d\n" % (kind, SIDES[1], SIDES[0], highest)
    if kind < 4:
        return header + " ".join(map(str, pixels.ravel())).encode() + b"\n"
    return header + pixels.astype(">u2" if highest > 255 else np.uint8).tobytes()


def _bmp(bits: int, pixels: np.ndarray, compression: int = 0, masks: tuple[int, ...] = ()) -> bytes:
    body, start = pixels[::-1].tobytes(), 54 + 4 * len(masks)
    header = struct.pack("<IiiHHIIiiII", 40, SIDES[1], SIDES[0], 1, bits, compression, len(body), 0, 0, 0, 0)
    packed = struct.pack(f"<{len(masks)}I", *masks)
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + header + packed + body


def _scaled(levels: np.ndarray, highest: int) -> np.ndarray:
    return np.round(levels / 255 * highest).astype(np.int64)


def _bits(levels: np.ndarray, bits: tuple[int, int, int]) -> np.ndarray:
    """RGB packed into words of 16 bits, red in the highest."""
    red, green, blue = (levels[..., channel].astype(np.uint16) >> (8 - bits[channel]) for channel in range(3))
    return ((red << (bits[1] + bits[2])) | (green << bits[2]) | blue).astype("<u2")


BGRX = np.dstack([RGB[..., ::-1], np.zeros(SIDES, np.uint8)])
FLOATS = (GREY / 255).astype(np.float32)
DEEP_RGB = RGB.astype(np.uint16) * 257
TURNED = Image.Exif()
TURNED[0x0112] = 6

#: Decoded as Pillow does, to within rounding.
AS_PILLOW: dict[str, Callable[[], bytes]] = {
    "JPEG": lambda: _save(RGB, "JPEG", quality=90),
    "JPEG, grey": lambda: _save(GREY, "JPEG"),
    "JPEG, RGB inside": lambda: _save(RGB, "JPEG", keep_rgb=True),
    "JPEG, CMYK": lambda: _save(RGB, "JPEG", "CMYK", quality=95),
    "JPEG, CMYK without APP14": lambda: _without_app14(_save(RGB, "JPEG", "CMYK", quality=95)),
    "JPEG, CMYK not inverted, without APP14": lambda: _without_app14(_save(255 - RGB, "JPEG", "CMYK", quality=95)),
    "JPEG, progressive CMYK without APP14": lambda: _without_app14(_save(RGB, "JPEG", "CMYK", progressive=True)),
    "JPEG, YCCK": lambda: (
        (encoded := _save(RGB, "JPEG", "CMYK"))[: (place := encoded.index(b"Adobe") + 11)]
        + b"\2"
        + encoded[place + 1 :]
    ),
    "JPEG, turned": lambda: _save(RGB, "JPEG", exif=TURNED),
    "PNG": lambda: _save(RGB, "PNG"),
    "PNG, turned": lambda: _save(RGB, "PNG", exif=TURNED),
    "PNG, grey": lambda: _save(GREY, "PNG"),
    "PNG, 1 bit": lambda: _save(GREY, "PNG", "1"),
    "PNG, grey and transparency": lambda: _save(RGBA, "PNG", "LA"),
    "PNG, transparency": lambda: _save(RGBA, "PNG"),
    "PNG, palette": lambda: _save(RGB, "PNG", "P"),
    "PNG, palette with a transparent color": lambda: _save(RGB, "PNG", "P", transparency=5),
    "PNG, palette with transparencies": lambda: _save(RGB, "PNG", "P", transparency=bytes(range(256))),
    "WebP": lambda: _save(RGB, "WEBP"),
    "WebP, transparency": lambda: _save(RGBA, "WEBP", lossless=True, exact=True),
    "BMP": lambda: _save(RGB, "BMP"),
    "BMP, grey": lambda: _save(GREY, "BMP"),
    "BMP, palette": lambda: _save(RGB, "BMP", "P"),
    "BMP, 32 bits": lambda: _bmp(32, BGRX),
    "BMP, 32 bits with the usual masks": lambda: _bmp(32, BGRX, 3, (0xFF0000, 0xFF00, 0xFF)),
    "PNM": lambda: _save(RGB, "PPM"),
    "PNM, ASCII": lambda: _pnm(3, RGB, 255),
    "PNM, ASCII to 15": lambda: _pnm(3, _scaled(RGB, 15), 15),
    "PNM, 16 bits": lambda: _pnm(6, _scaled(RGB, 65535), 65535),
    "TIFF": lambda: _tiff(RGB, 2),
    "TIFF, 16 bits": lambda: _tiff(DEEP_RGB, 2),
    "TIFF, upright": lambda: _tiff(RGB, 2, (274, [1])),
    "TIFF, grey": lambda: _tiff(GREY, 1),
    "TIFF, grey, white is 0": lambda: _tiff(255 - GREY, 0),
    "TIFF, transparency": lambda: _tiff(RGBA, 2, (338, [2])),
    "TIFF, palette": lambda: _save(RGB, "TIFF", "P"),
    "TIFF, CMYK": lambda: _save(RGB, "TIFF", "CMYK"),
    "TIFF, YCbCr": lambda: _save(RGB, "TIFF", "YCbCr"),
    "TIFF, channels apart": lambda: _tiff(RGB, 2, planar=2),
    "TIFF, LZW": lambda: _save(RGB, "TIFF", compression="tiff_lzw"),
    "TIFF, JPEG inside": lambda: _save(RGB, "TIFF", compression="jpeg"),
    "TIFF, 64 bit": lambda: _save(RGB, "TIFF", big_tiff=True),
    "JPEG 2000": lambda: _save(RGB, "JPEG2000"),
    "JPEG 2000, lossy": lambda: _save(RGB, "JPEG2000", irreversible=True, quality_layers=[10]),
    "JPEG 2000, a bare codestream": lambda: _save(RGB, "JPEG2000", no_jp2=True),
    "JPEG 2000, tiles": lambda: _save(RGB, "JPEG2000", tile_size=(16, 16)),
    "JPEG 2000, grey": lambda: _save(GREY, "JPEG2000"),
    "JPEG 2000, transparency": lambda: _save(RGBA, "JPEG2000"),
}
#: 16 bits of grey keep their level. Pillow's convert("RGB") makes all above 255 white.
DEEP_GREY: dict[str, Callable[[], bytes]] = {
    "PNG": lambda: _save(DEEP, "PNG"),
    "PNM": lambda: _pnm(5, DEEP, 65535),
    "TIFF": lambda: _tiff(DEEP, 1),
    "JPEG 2000": lambda: _save(DEEP, "JPEG2000"),
}
#: DALI decodes these to wrong pixels or not at all.
REFUSED: dict[str, Callable[[], bytes]] = {
    "BMP of 16 bits": lambda: _bmp(16, _bits(RGB, (5, 5, 5))),
    "BMP of 16 bits a pixel": lambda: _bmp(16, _bits(RGB, (5, 6, 5)), 3, (0xF800, 0x7E0, 0x1F)),
    "BMP with channels": lambda: _bmp(32, BGRX, 3, (0xFF, 0xFF00, 0xFF0000)),
    **{
        f"PNM whose highest value is {highest} ": lambda kind=kind, highest=highest: _pnm(
            kind, _scaled(RGB if kind in (3, 6) else GREY, highest), highest
        )
        for kind, highest in ((5, 1), (6, 15), (5, 100), (6, 254), (6, 256), (2, 1000), (5, 4095))
    },
    **{
        rf"TIFF with an orientation tag \({turn}\)": lambda turn=turn: _tiff(RGB, 2, (274, [turn]))
        for turn in (2, 3, 6)
    },
    "TIFF of floating-point": lambda: _tiff(FLOATS, 1, (339, [3])),
    "TIFF of floating-point or": lambda: _save(GREY, "TIFF", "F"),
    "TIFF of floating-point or signed": lambda: _tiff(DEEP // 2, 1, (339, [2])),
    "TIFF .*white is 0, 1 x 16 bits": lambda: _tiff(65535 - DEEP, 0),
    "TIFF .*grey, 2 x 8 bits": lambda: _save(RGBA, "TIFF", "LA"),
    "TIFF .*palette, 2 x 8 bits": lambda: _save(RGBA, "TIFF", "PA"),
    "TIFF .*grey, 1 x 32 bits": lambda: _tiff(GREY.astype(np.uint32) << 24, 1),
    "TIFF .*Lab": lambda: _save(RGB, "TIFF", "LAB"),
    "TIFF whose colors are multiplied": lambda: _tiff(RGBA, 2, (338, [1])),
    "TIFF whose channels are kept apart .*RGB, 3 x 16": lambda: _tiff(DEEP_RGB, 2, planar=2),
    "TIFF whose channels are kept apart .*RGB, 4 x 8": lambda: _tiff(RGBA, 2, (338, [2]), planar=2),
    "GIF, which DALI does not decode; save it": lambda: _save(RGB, "GIF"),
    "AVIF, which": lambda: _save(RGB, "AVIF"),
    "HEIC or a video, which": lambda: b"\0\0\0\x18ftypheic" + bytes(30),
    "SVG, which": lambda: b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>',
    "no image but HTML": lambda: b"\n<!DOCTYPE html><html>404</html>",
    "no image but gzip: unpack it": lambda: gzip.compress(_save(RGB, "JPEG")),
    "no image but a zip archive": lambda: b"PK\3\4" + bytes(30),
    "no image but a Git LFS pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n",
    "no image but text": lambda: "Zugriff nicht möglich\n".encode(),
    "unknown; it begins with the bytes 01 02 03$": lambda: b"\1\2\3",
    "the file is empty": lambda: b"",
    "the header of the TIFF is damaged": lambda: b"II*\0" + b"\xff" * 40,
}
#: Of JPEG 2000 the header does not tell.
REFUSED_ONCE_DECODED: dict[str, Callable[[], bytes]] = {
    "DALI fails on this JPEG 2000": lambda: _save(RGB, "JPEG2000")[:-20],
    "DALI fails on this JPEG 2000: it is damaged, or of a rare kind": lambda: _save(GREY, "JPEG2000", no_jp2=True),
    "DALI decodes this JPEG 2000 .RGB. to other pixels than Pillow; save it": lambda: _save(RGB, "JPEG2000", "YCbCr"),
}


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(1)


def _pillow(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"), np.int64)


@pytest.mark.filterwarnings("ignore:Palette images")
@pytest.mark.parametrize("kind", AS_PILLOW)
def test_pixels_are_those_of_pillow(decoder, kind):
    encoded = AS_PILLOW[kind]()
    assert refusal(encoded) is None
    (pixels,) = decoder.decode([encoded])
    assert isinstance(pixels, np.ndarray)
    assert np.abs(pixels - _pillow(encoded)).max() <= 1


@pytest.mark.parametrize("kind", DEEP_GREY)
def test_grey_of_16_bits_keeps_its_level(decoder, kind):
    encoded = DEEP_GREY[kind]()
    assert refusal(encoded) is None
    (pixels,) = decoder.decode([encoded])
    assert isinstance(pixels, np.ndarray)
    assert np.abs(pixels - DEEP[..., None] / 257).max() <= 1


@pytest.mark.parametrize("reason", REFUSED)
def test_what_dali_gets_wrong_is_refused(reason):
    refused = refusal(REFUSED[reason]())
    assert refused is not None
    assert "\n" not in refused
    assert re.search(reason, refused)


def test_jpeg_2000_is_refused_alone(decoder, crashing_jpeg2000):
    """Whatever it does to the process that decodes it, the images beside it are decoded."""
    good, ends_it = _save(RGB, "JPEG2000"), "this JPEG 2000 ends the process that decodes it .SIGFPE., as damaged ones"
    for reason, encode in {ends_it: lambda: crashing_jpeg2000, **REFUSED_ONCE_DECODED}.items():
        answer, beside = decoder.decode([encode(), good])
        assert isinstance(answer, str)
        assert re.search(reason, answer)
        assert np.array_equal(beside, RGB)


def test_a_tiff_that_ends_the_process_is_refused_alone(crashing_tiff):
    """Those beside it are decoded, among them a JPEG 2000 by the same process."""
    beside = [AS_PILLOW[kind]() for kind in ("TIFF", "JPEG 2000", "PNG")]
    answer, *pixels = Decoder(2).decode([crashing_tiff, *beside])
    assert answer == "this TIFF ends the process that decodes it (SIGFPE), as damaged ones do"
    assert all(np.array_equal(image, RGB) for image in pixels)


def test_an_image_that_takes_too_long_is_given_up(monkeypatch):
    monkeypatch.setattr("dalikd.pipelines.doctor._LONGEST", 0.01)  # less than its imports take
    (answer,) = Decoder(1).decode([_save(RGB, "TIFF")])
    assert answer == "this TIFF ends the process that decodes it (SIGKILL), as damaged ones do"


@pytest.mark.parametrize("kind", [name for name in AS_PILLOW if "," not in name])
def test_more_pixels_than_allowed_are_refused_by_the_header(kind):
    encoded, pixels = AS_PILLOW[kind](), math.prod(SIDES)
    assert refusal(encoded, pixels) is None
    refused = refusal(encoded, pixels - 1)
    assert refused is not None
    assert refused.startswith(
        f"its header gives {SIDES[1]} x {SIDES[0]} pixels: it is damaged, or larger than --data.max_"
    )
    (answer,) = Decoder(1, max_pixels=pixels - 1).decode([encoded])
    assert answer == refused


def test_a_codestream_of_other_sides_than_its_file_is_refused():
    encoded = _save(RGB, "JPEG2000")
    place = encoded.index(b"\xff\x4f\xff\x51") + 8
    refused = refusal(encoded[:place] + struct.pack(">II", 60_000, 50_000) + encoded[place + 8 :])
    assert refused is not None
    assert "60,000 x 50,000 pixels" in refused


def test_a_failure_of_the_process_for_jpeg_2000_is_passed_on(monkeypatch):
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(RuntimeError, match=r"a process that decodes images has failed: ModuleNotFoundError"):
        Decoder(1).decode([_save(RGB, "JPEG2000")])


def test_extensions_follow_the_content():
    kinds = {"JPEG": "jpg", "PNG": "png", "BMP": "bmp", "TIFF": "tiff", "WEBP": "webp", "PPM": "ppm", "JPEG2000": "jp2"}
    assert {kind: extension_of(_save(RGB, kind)) for kind in kinds} == kinds


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_what_ends_early_is_told_from_what_is_damaged(kind):
    encoded = _save(RGB, kind)
    assert "is truncated" in why_damaged(encoded[:-20])
    assert "it is damaged" in why_damaged(encoded)


@pytest.mark.parametrize(
    ("text", "of_the_image"),
    [
        ("Error when executing Mixed operator decoders__Image encountered: Failed to decode a.jpg", True),
        ("CUDA runtime API error cudaErrorMemoryAllocation (2): out of memory", False),
        ("CUDA driver API error CUDA_ERROR_ILLEGAL_ADDRESS (700)", False),
        ("dali::CUDABadAlloc: Can't allocate 1073741824 bytes on device 0.", False),
        ("std::bad_alloc", False),
        ("nvjpeg error (5): NVJPEG_STATUS_ALLOCATOR_FAILURE The user-provided allocator functions failed", False),
    ],
)
def test_a_gpu_that_fails_is_no_bad_image(text, of_the_image):
    assert is_decode_failure(RuntimeError(f"Critical error in pipeline:\n{text}")) is of_the_image


# --------------------------------------------------------------------------------------------- sides by the header


def _sides(encoded: bytes) -> tuple[int, int]:
    return image_sides(lambda offset, count: encoded[offset : offset + count])


@pytest.mark.filterwarnings("ignore:Palette images")
@pytest.mark.parametrize("kind", AS_PILLOW)
def test_sides_are_those_of_the_pixels(kind):
    assert _sides(AS_PILLOW[kind]()) == SIDES


def _with_segments(*lengths: int, fill: int = 0) -> bytes:
    """A JPEG with application segments of these lengths, one holds what looks like a frame's header."""
    encoded = _save(RGB, "JPEG")
    segments = (b"\xff" * fill + b"\xff\xe5" + struct.pack(">H", 2 + length) + bytes(length) for length in lengths)
    decoy = b"\xff\xe6\0\x0d\xff\xc0\0\x0b\x08" + struct.pack(">HH", 7, 9) + b"\1\1"
    return encoded[:2] + decoy + b"".join(segments) + encoded[2:]


@pytest.mark.parametrize("lengths", [(4086,), (4096 - 20,), (65533, 65533, 11), (0, 1, 60000)])
def test_sides_come_after_segments_of_any_length(lengths):
    assert _sides(_with_segments(*lengths)) == _sides(_with_segments(*lengths, fill=3)) == SIDES
    stray = _with_segments(*lengths).replace(b"\xff\xe5", b"stray\xff\xe5")
    assert _sides(stray) == SIDES == Image.open(io.BytesIO(stray)).size[::-1]


@pytest.mark.parametrize("length", [0, 2, 10, 23, 100, 160])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_header_that_ends_early_says_its_sides_or_nothing(format, length):
    assert _sides(_save(RGB, format)[:length]) in (SIDES, (0, 0))


def test_what_is_no_image_has_no_sides():
    damaged = (b"", b"no image", b"\xff\xd8\xff\xd9" + bytes(20), b"\xff\xd8" + bytes(5000), b"II*\0" + b"\xff" * 40)
    assert {_sides(encoded) for encoded in damaged} == {(0, 0)}
