import zlib

import numpy as np
import pytest

from dalikd.pipelines.shards.layout import ends_checksum, image_checksum


@pytest.mark.parametrize("length", [0, 1, 32 * 1024 - 1])
def test_the_checksum_of_a_small_image_is_its_crc32(length):
    content = np.random.default_rng(0).bytes(length)
    assert image_checksum(content) == zlib.crc32(content)


@pytest.mark.parametrize("length", [32 * 1024, 9 * 4072, 100_003])
def test_the_checksum_of_a_large_image_changes_with_any_part(length):
    content = np.random.default_rng(0).bytes(length)
    whole = image_checksum(content)
    array = np.frombuffer(b"?" + content, np.uint8)[1:]
    assert image_checksum(array) == whole  # wherever it lies in memory
    for place in (0, 4071, 4072, length // 2, length - 1):
        changed = bytearray(content)
        changed[place] ^= 1
        assert image_checksum(bytes(changed)) != whole
    pages = [content[start : start + 4096] for start in range(0, length, 4096)]
    swapped = b"".join([pages[1], pages[0], *pages[2:]])
    assert image_checksum(swapped) != whole
    assert image_checksum(content[:4096] + bytes(4096) + content[8192:]) != whole
    assert image_checksum(content[:-1]) != whole
    assert image_checksum(content + b"\0") != whole


@pytest.mark.parametrize("length", [0, 100, 1024, 1500, 5000])
def test_the_checksum_of_the_ends(tmp_path, length):
    content = np.random.default_rng(0).bytes(length)
    (tmp_path / "shard").write_bytes(content)
    assert ends_checksum(tmp_path / "shard") == zlib.crc32(content[:1024] + content[-1024:])
