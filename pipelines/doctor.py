"""Names the files that cannot be decoded. DALI's error for a bad file often does not say which one it was."""

import warnings
from collections.abc import Iterable
from io import BytesIO
from typing import NamedTuple

from PIL import Image

from dalikd.pipelines.sources import Source

__all__ = ["BadFile", "find_bad_files"]

# By content, whatever the extension. Pillow also opens GIF, AVIF and others, on which DALI fails.
_DALI_FORMATS = ("JPEG", "MPO", "PNG", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000")


class BadFile(NamedTuple):
    """A file that cannot be decoded: its `row` in the source, its `path`, and the `reason` in one line."""

    row: int
    path: str
    reason: str


def find_bad_files(source: Source, rows: Iterable[int]) -> list[BadFile]:
    """Decode the files of `rows` completely and return those that fail, in the order of `rows`.

    Every file is read by Pillow on the CPU, some milliseconds each. Images in memory are never bad.
    """
    if source.arrays is not None:
        return []
    rows = [int(row) for row in rows]
    reasons = (_why_bad(source, row) for row in rows)
    return [
        BadFile(row, source.path(row), reason) for row, reason in zip(rows, reasons, strict=True) if reason is not None
    ]


def _why_bad(source: Source, row: int) -> str | None:
    try:
        encoded = source.read(row)
        return _why_undecodable(encoded) if encoded else "the file is empty"
    except FileNotFoundError as error:
        return "the file is missing" + str(error).partition(" is missing")[2]
    except Image.DecompressionBombError:
        return None  # a huge picture: slow, but DALI reads it
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, ValueError, struct.error and others
        return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _why_undecodable(encoded: bytes) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on metadata and size are not what is asked for
        with Image.open(BytesIO(encoded)) as image:
            if image.format not in _DALI_FORMATS:
                return f"the content is {image.format}, which DALI does not decode"
            image.convert("RGB").load()
    return None
