"""What an encoded image holds, by its bytes: its format, and whether DALI decodes it to the pixels that others see."""

import io
import math
import re
import struct
import warnings
from collections.abc import Callable, Iterable
from itertools import islice
from typing import NamedTuple

__all__ = [
    "BYTES_A_PIXEL",
    "LONGEST",
    "MAX_PIXELS",
    "Facts",
    "extension_of",
    "facts_of",
    "goes_apart",
    "image_sides",
    "lacks_app14",
    "lacks_end",
    "refusal",
    "why_damaged",
]

#: of an image where nothing else is said; Pillow refuses to open more. DALI asks for three bytes each, for each thread.
MAX_PIXELS = 178_000_000
BYTES_A_PIXEL = 8  # of a file at most: four channels of 16 bits

LONGEST = (1 << 31) - 1  # pixels of a side, as they are kept in int32
_HEADER_BYTES = 4096  # read at once where a header is looked for: nearly always all of it
_NO_FRAME = {0xC4, 0xC8, 0xCC}  # JPEG's markers from 0xC0 to 0xCF that begin no frame
_ENDS = {0xD9, 0xDA}  # JPEG's markers after which no header comes

_FORMATS = (  # that DALI decodes: first bytes, name, extension
    (b"\xff\xd8\xff", "JPEG", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "PNG", "png"),
    (b"BM", "BMP", "bmp"),
    *((start, "TIFF", "tiff") for start in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    *((b"P%d" % kind, "PNM", "ppm") for kind in range(1, 7)),
    *((start, "JPEG 2000", "jp2") for start in (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")),
)
_APART = ("JPEG 2000", "TIFF")  # a tile, or a strip, without a size is enough: DALI divides by it
_OTHER_IMAGES = (
    (b"GIF8", "GIF"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\1\0", "ICO"),
    (b"8BPS", "PSD"),
    (b"DDS ", "DDS"),
    *((b"P" + kind, "PNM of a rare kind") for kind in (b"7\n", b"f\n", b"F\n")),
)
_NO_IMAGES = (
    (b"\x1f\x8b", "gzip: unpack it"),
    (b"PK\3\4", "a zip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!", "a RAR archive"),
    (b"%PDF", "PDF"),
    (b"version https://git-lfs", "a Git LFS pointer: fetch the file with git lfs pull"),
)


def _format(encoded: bytes) -> tuple[str, str] | None:
    """Name and extension of a format that DALI decodes, by the first bytes, whatever the file is called."""
    if encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP":
        return "WebP", "webp"
    return next((tuple(named) for start, *named in _FORMATS if encoded.startswith(start)), None)  # type: ignore[return-value]


def extension_of(encoded: bytes) -> str:
    """The extension that fits the content of an image that is not refused."""
    found = _format(encoded)
    assert found is not None
    return found[1]


def goes_apart(encoded: bytes) -> str | None:
    """The name of its format if only `doctor.Decoder` may be asked about it: damaged images of it can end the process
    that decodes them. None for other formats, of which no such image is known."""
    found = _format(encoded)
    return found[0] if found is not None and found[0] in _APART else None


def refusal(encoded: bytes, max_pixels: int = MAX_PIXELS) -> str | None:
    """Why an encoded image is not for DALI, as its header tells; None where it is.

    Some microseconds; pixel data are not looked at. JPEG 2000 that is small enough passes: only `doctor.Decoder` can
    tell more of it. `max_pixels`: images of more are refused, before anything is allocated for them.
    """
    found = _format(encoded)
    if found is None:
        return _describe(encoded)
    try:
        kind = _CHECKS[found[0]](encoded) if found[0] in _CHECKS else None
    except (struct.error, ValueError, IndexError, KeyError, OverflowError):
        return f"the header of the {found[0]} is damaged"
    if kind is not None:
        return f"{found[0]} {kind}; save it as PNG or JPEG"
    sides = [image_sides(lambda offset, count: encoded[offset : offset + count])]
    if found[0] == "JPEG 2000":
        sides.append(_codestream_sides(encoded))
    height, width = max(sides, key=math.prod)
    if height * width > max_pixels:
        return (
            f"its header gives {width:,} x {height:,} pixels: it is damaged, or larger than --data.max_pixels "
            f"{max_pixels} allows"
        )
    return None


def _codestream_sides(encoded: bytes) -> tuple[int, int]:
    """Of a JPEG 2000 image as its decoder takes them, which may be others than those of the file around it."""
    place = encoded.find(b"\xff\x4f\xff\x51") + 8
    if place < 8 or len(encoded) < place + 16:
        return 0, 0
    right, bottom, left, top = struct.unpack_from(">4I", encoded, place)
    return bottom - top, right - left


def _describe(encoded: bytes) -> str:
    """What it holds that DALI does not decode."""
    if not encoded:
        return "the file is empty"
    image, other = _named(_OTHER_IMAGES, encoded), _named(_NO_IMAGES, encoded)
    text = encoded[:4096].decode("utf-8", "ignore")
    words = text.lstrip("\ufeff \t\r\n").lower()
    if encoded[4:8] == b"ftyp":
        image = "AVIF" if encoded[8:11] == b"avi" else "HEIC or a video"
    elif "<svg" in words:
        image = "SVG"
    elif words.startswith(("<!doctype html", "<html", "<head", "<body")):
        other = "HTML"
    elif other is None and _is_text(encoded[:4096]):
        other = "text"
    if image is not None:
        return f"the content is {image}, which DALI does not decode; save it as PNG or JPEG"
    if other is not None:
        return f"the content is no image but {other}"
    return f"the content is unknown; it begins with the bytes {encoded[:8].hex(' ')}"


def _is_text(start: bytes) -> bool:
    """Whether the first bytes are UTF-8 without control characters; the last character may be cut off."""
    text = start.decode("utf-8", "ignore")
    return len(start) - len(text.encode()) < 4 and all(sign.isprintable() or sign.isspace() for sign in text)


def _named(kinds: Iterable[tuple[bytes, str]], encoded: bytes) -> str | None:
    return next((name for start, name in kinds if encoded.startswith(start)), None)


def why_damaged(encoded: bytes) -> str:
    """Why DALI fails on an image whose header is not refused."""
    found = _format(encoded)
    assert found is not None
    ends_early = {
        "JPEG": lacks_end(encoded),
        "PNG": b"IEND" not in encoded[-1024:],
        "WebP": len(encoded) < 8 + int.from_bytes(encoded[4:8], "little"),
        "BMP": len(encoded) < int.from_bytes(encoded[2:6], "little"),
    }
    if ends_early.get(found[0], False):
        return f"the {found[0]} is truncated"
    return f"DALI fails on this {found[0]}: it is damaged, or of a rare kind"


def lacks_end(encoded: bytes) -> bool:
    """Whether it is a JPEG without a marker of its end after its pixels, as one that is cut off."""
    pixels = encoded.rfind(b"\xff\xda")
    return encoded.startswith(b"\xff\xd8") and (pixels < 0 or encoded.rfind(b"\xff\xd9") < pixels)


def image_sides(read: Callable[[int, int], bytes]) -> tuple[int, int]:
    """Height and width in pixels as the header says, before any orientation; (0, 0) where it does not.

    Args:
        read: offset and count -> so many bytes of the encoded image, fewer at its end.
    """
    start = read(0, _HEADER_BYTES)
    if start.startswith(b"\xff\xd8"):
        return _jpeg_sides(start, read)
    if start.startswith(b"\x89PNG"):
        return struct.unpack(">II", start[20:24] + start[16:20]) if len(start) >= 24 else (0, 0)
    from PIL import Image

    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(read(0, 1 << 31))) as image:
            return image.height, image.width
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # as Pillow says of damaged headers
        return 0, 0


def _jpeg_sides(chunk: bytes, read: Callable[[int, int], bytes]) -> tuple[int, int]:
    """From the frame's header, which comes after segments of any length."""
    first, place = 0, 2  # where the chunk and the next marker lie in the file
    while True:
        if place + 9 > first + len(chunk):
            chunk, first = read(place, _HEADER_BYTES), place
            if len(chunk) < 9:
                return 0, 0
        filler, marker, *fields = chunk[place - first : place - first + 9]
        if filler != 0xFF:  # stray bytes, which decoders pass over
            found = chunk.find(b"\xff", place - first)
            place = first + (len(chunk) if found < 0 else found)
            continue
        if marker in _ENDS:
            return 0, 0
        if 0xC0 <= marker <= 0xCF and marker not in _NO_FRAME:
            return fields[3] << 8 | fields[4], fields[5] << 8 | fields[6]
        place += 1 if marker == 0xFF else 2 + (fields[0] << 8 | fields[1])  # 0xFF: a fill byte


# ---------------------------------------------------------------------------- what DALI decodes to wrong pixels


def lacks_app14(encoded: bytes) -> bool:
    """Whether it is a JPEG without Adobe's APP14 segment."""
    place = 2
    while encoded[place : place + 1] == b"\xff" and place + 4 <= len(encoded):
        marker, (length,) = encoded[place + 1], struct.unpack_from(">H", encoded, place + 2)
        if marker == 0xEE and encoded[place + 4 : place + 9] == b"Adobe":
            return False
        if marker == 0xDA:
            break
        place += 1 if marker == 0xFF else 2 + length  # 0xFF: a fill byte
    return encoded.startswith(b"\xff\xd8")


def _check_bmp(encoded: bytes) -> str | None:
    (header,) = struct.unpack_from("<I", encoded, 14)
    if header < 40:
        return None
    bits, compression = struct.unpack_from("<HI", encoded, 28)
    if bits == 16:
        return "of 16 bits a pixel"
    if bits == 32 and compression in (3, 6) and struct.unpack_from("<III", encoded, 54) != (0xFF0000, 0xFF00, 0xFF):
        return "with channels in an order of their own"
    return None


def _check_pnm(encoded: bytes) -> str | None:
    kind = encoded[1:2]
    if kind in b"14":
        return None
    gap = rb"(?:\s|#[^\r\n]*[\r\n])+"
    found = re.match(rb"P\d" + gap + rb"\d+" + gap + rb"\d+" + gap + rb"(\d+)", encoded[:65536])
    if found is None:
        raise ValueError("no header")
    highest = int(found[1])
    if highest in (255, 65535) or (kind in b"23" and highest < 255):
        return None
    return f"whose highest value is {highest} instead of 255 or 65535"


_ORIENTATION, _PLANAR, _EXTRA, _SAMPLE_FORMAT, _BITS, _PHOTOMETRIC, _SAMPLES = 274, 284, 338, 339, 258, 262, 277
_TIFF_TAGS = {_ORIENTATION, _PLANAR, _EXTRA, _SAMPLE_FORMAT, _BITS, _PHOTOMETRIC, _SAMPLES}
_TIFF_KINDS = {  # photometric interpretation -> samples, bits of each
    0: {(1, 1), (1, 8)},
    1: {(1, 1), (1, 8), (1, 16)},
    2: {(3, 8), (3, 16), (4, 8), (4, 16)},
    3: {(1, 1), (1, 4), (1, 8)},
    5: {(4, 8)},
    6: {(3, 8)},
}
_INTERPRETATIONS = {
    0: "white is 0",
    1: "grey",
    2: "RGB",
    3: "palette",
    4: "mask",
    5: "CMYK",
    6: "YCbCr",
    8: "Lab",
    9: "Lab",
    10: "Lab",
}


def _check_tiff(encoded: bytes) -> str | None:
    """What DALI decodes to the pixels that others see, kind by kind; in doubt, not."""
    tags = _tiff_tags(encoded)
    orientation = tags.get(_ORIENTATION, (1,))[0]
    if orientation != 1:
        return f"with an orientation tag ({orientation}), which DALI passes over"
    if set(tags.get(_SAMPLE_FORMAT, (1,))) != {1}:
        return "of floating-point or signed numbers"
    photometric, samples = tags[_PHOTOMETRIC][0], tags.get(_SAMPLES, (1,))[0]
    bits = set(tags.get(_BITS, (1,)))
    kind = f"{_INTERPRETATIONS.get(photometric, photometric)}, {samples} x {'/'.join(map(str, sorted(bits)))} bits"
    if len(bits) != 1 or (samples, *bits) not in _TIFF_KINDS.get(photometric, ()):
        return f"of a kind that DALI decodes otherwise or not ({kind})"
    if samples == 4 and photometric == 2 and tags.get(_EXTRA, (0,))[0] == 1:
        return "whose colors are multiplied with their transparency"
    if tags.get(_PLANAR, (1,))[0] != 1 and samples > 1 and (photometric, samples, *bits) not in ((2, 3, 8), (5, 4, 8)):
        return f"whose channels are kept apart ({kind})"
    return None


def _tiff_tags(encoded: bytes) -> dict[int, tuple[int, ...]]:
    """Those of the first image that say what its numbers mean."""
    order = "<" if encoded[:2] == b"II" else ">"
    big = encoded[2:4] in (b"+\0", b"\0+")
    pointer, count_type, entry, room = ("Q", "Q", 20, 8) if big else ("I", "H", 12, 4)
    (start,) = struct.unpack_from(order + pointer, encoded, 8 if big else 4)
    (count,) = struct.unpack_from(order + count_type, encoded, start)
    first, tags = start + struct.calcsize(count_type), {}
    for place in islice(range(first, first + entry * count, entry), 4096):
        tag, type_, values = struct.unpack_from(f"{order}HH{pointer}", encoded, place)
        if tag not in _TIFF_TAGS:
            continue
        form = {1: "B", 3: "H", 4: "I"}[type_]
        values = min(values, 64)
        at = place + entry - room
        if values * struct.calcsize(form) > room:
            (at,) = struct.unpack_from(order + pointer, encoded, at)
        tags[tag] = struct.unpack_from(f"{order}{values}{form}", encoded, at)
    return tags


_CHECKS: dict[str, Callable[[bytes], str | None]] = {"BMP": _check_bmp, "PNM": _check_pnm, "TIFF": _check_tiff}


# -------------------------------------------------------------------------------------- what a data set is made of


class Facts(NamedTuple):
    """What the header of an encoded image says.

    Attributes:
        format: JPEG, PNG, …; empty: none that DALI decodes.
        height: in pixels, before any orientation; 0 where the header says none.
        width: the same.
        mode: RGB, grey, CMYK, palette, "RGB with alpha", "grey, 16 bit", …; empty where the header does not say.
        orientation: as in EXIF: 1 is upright, and where nothing is said.
    """

    format: str
    height: int
    width: int
    mode: str
    orientation: int = 1


def facts_of(encoded: bytes) -> Facts:
    """Read an image's header, of damaged ones as far as that goes; some microseconds for JPEG and PNG."""
    found = _format(encoded)
    if found is None:
        return Facts("", 0, 0, "")
    try:
        return _FACTS.get(found[0], _facts_of_others)(found[0], encoded)
    except (struct.error, OSError, ValueError, SyntaxError, IndexError, KeyError):  # as Pillow says of damaged headers
        return Facts(found[0], 0, 0, "")


def _facts_of_jpeg(name: str, encoded: bytes) -> Facts:
    place, orientation = 2, 1
    while True:
        filler, marker, length = struct.unpack_from(">BBH", encoded, place)
        if filler != 0xFF:  # stray bytes, which decoders pass over
            place = encoded.index(b"\xff", place)
        elif marker in _ENDS:
            return Facts(name, 0, 0, "")
        elif 0xC0 <= marker <= 0xCF and marker not in _NO_FRAME:
            bits, height, width, channels = struct.unpack_from(">BHHB", encoded, place + 4)
            mode = {1: "grey", 3: "RGB", 4: "CMYK"}.get(channels, f"{channels} channels")
            return Facts(name, height, width, mode if bits == 8 else f"{mode}, {bits} bit", orientation)
        else:
            if marker == 0xE1 and encoded[place + 4 : place + 10] == b"Exif\0\0":
                orientation = _orientation(encoded[place + 10 : place + 2 + length])
            place += 1 if marker == 0xFF else 2 + length  # 0xFF: a fill byte


def _facts_of_png(name: str, encoded: bytes) -> Facts:
    width, height, bits, colors = struct.unpack_from(">IIBB", encoded, 16)
    before = encoded[: max(0, encoded.find(b"IDAT"))]
    mode = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGB with alpha"}[colors]
    if b"tRNS" in before:
        mode += " with alpha"
    exif = before.find(b"eXIf")
    orientation = 1 if exif < 0 else _orientation(before[exif + 4 :])
    return Facts(name, height, width, mode if bits < 16 else f"{mode}, 16 bit", orientation)


def _facts_of_others(name: str, encoded: bytes) -> Facts:
    from PIL import Image

    with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(encoded)) as image:
        plain, _, deep = image.mode.partition(";")
        mode = {
            **{"1": "grey", "L": "grey", "I": "grey", "F": "grey", "P": "palette"},
            **{"LA": "grey with alpha", "RGBA": "RGB with alpha", "PA": "palette with alpha"},
        }.get(plain, plain)
        orientation = image.getexif().get(_ORIENTATION, 1)
        return Facts(name, image.height, image.width, f"{mode}, 16 bit" if deep.startswith("16") else mode, orientation)


def _orientation(exif: bytes) -> int:
    """Of an EXIF block, which has the form of a TIFF; 1 where it is damaged or says none."""
    try:
        value = _tiff_tags(exif).get(_ORIENTATION, (1,))[0]
    except (struct.error, IndexError, KeyError):
        return 1
    return value if 1 <= value <= 8 else 1


_FACTS: dict[str, Callable[[str, bytes], Facts]] = {"JPEG": _facts_of_jpeg, "PNG": _facts_of_png}
