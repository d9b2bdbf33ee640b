"""An image set in shards of both formats."""

import io
import struct
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from dalikd.pipelines.data import open_source
from dalikd.pipelines.shards.layout import ShardFormat
from dalikd.pipelines.shards.write import WriteOptions, write_shards
from dalikd.pipelines.sources import Source

FORMATS: tuple[ShardFormat, ...] = ("webdataset", "tfrecord")


@pytest.fixture(scope="session")
def crashing_jpeg2000() -> bytes:
    """Its tiles have no size, by which the process that decodes it ends: SIGFPE."""
    buffer = io.BytesIO()
    Image.new("RGB", (48, 40)).save(buffer, "JPEG2000")
    start, marker, rest = buffer.getvalue().partition(b"\xff\x51")
    return start + marker + rest[:20] + bytes(8) + rest[28:]


@pytest.fixture(scope="session")
def crashing_tiff() -> bytes:
    """Its strips have no rows, by which the process that decodes it ends: SIGFPE."""
    buffer = io.BytesIO()
    Image.new("RGB", (48, 40)).save(buffer, "TIFF")
    encoded = buffer.getvalue()
    place = encoded.index(struct.pack("<HHI", 278, 4, 1)) + 8
    return encoded[:place] + bytes(4) + encoded[place + 4 :]


class Written(NamedTuple):
    """Containers, and what they were made of: `source`, the split's `folder`, its `format`."""

    source: Source
    folder: Path
    format: ShardFormat

    def open(self) -> Source:
        """The same images, from the shards."""
        return open_source(self.format, self.folder.parent, "train")


@pytest.fixture(scope="session", params=FORMATS)
def written(small_images: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Written:
    """The 300 small images in five shards of sixty; read only."""
    folder = tmp_path_factory.mktemp(request.param) / "train"
    source = open_source("imagefolder", small_images, "train", split=".")
    write_shards(source, folder, WriteOptions(request.param, seed=4, shard_images=70, threads=1))
    return Written(source, folder, request.param)
