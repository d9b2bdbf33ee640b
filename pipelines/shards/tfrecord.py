"""TFRecord without TensorFlow: records framed with their checksums, and tf.train.Example as bytes.

A record is its payload's length (8 bytes, little-endian), the masked CRC-32C of the length, the payload, and the masked
CRC-32C of the payload. The payload is a protocol buffer: Example { Features { map<string, Feature> } }, where a Feature
is a list of bytes (field 1) or of int64 (field 3).
"""

import struct
from functools import cache

import numpy as np

__all__ = ["decode_example", "encode_example", "frame", "masked_crc32c", "unframe"]

_FRAME_BYTES = 16  # that a frame adds to its payload
_POLYNOMIAL = 0x82F63B78  # Castagnoli's, bits reversed
_BLOCK = 1024  # bytes that are looked up at once; the table is 1 MiB
_LENGTH_DELIMITED = 2  # the only wire type that is needed
_BYTES_LIST, _INT64_LIST = 1, 3  # fields of a Feature


def frame(payload: bytes) -> bytes:
    """One record of a file."""
    length = struct.pack("<Q", len(payload))
    return b"".join((length, _checksum(length), payload, _checksum(payload)))


def unframe(record: bytes) -> bytes:
    """The payload of one record.

    Raises:
        ValueError: a length or a checksum does not fit.
    """
    if len(record) < _FRAME_BYTES or struct.unpack_from("<Q", record)[0] != len(record) - _FRAME_BYTES:
        raise ValueError("not a TFRecord: its length does not fit")
    length, payload = record[:8], record[12:-4]
    if (record[8:12], record[-4:]) != (_checksum(length), _checksum(payload)):
        raise ValueError("damaged TFRecord: its checksum does not fit")
    return payload


def encode_example(features: dict[str, bytes | int]) -> bytes:
    """A tf.train.Example of features with one value each: bytes, or an integer in 0..2**63 - 1."""
    entries = (_field(1, _field(1, name.encode()) + _field(2, _feature(value))) for name, value in features.items())
    return _field(1, b"".join(entries))


def decode_example(payload: bytes) -> dict[str, bytes | int]:
    """The features that `encode_example` was given.

    Raises:
        ValueError: it is no such message.
    """
    [(_, entries)] = _fields(payload)
    features: dict[str, bytes | int] = {}
    for _, entry in _fields(entries):
        (_, name), (_, feature) = _fields(entry)
        [(kind, values)] = _fields(feature)
        [(_, value)] = _fields(values)
        features[bytes(name).decode()] = bytes(value) if kind == _BYTES_LIST else _read_varint(value, 0)[0]
    return features


def masked_crc32c(data: bytes) -> int:
    """The checksum of four bytes or more: CRC-32C, turned and shifted; about 0.2 GB a second."""
    crc = _crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


# ---------------------------------------------------------------------------------------------- checksum


def _checksum(data: bytes) -> bytes:
    return struct.pack("<I", masked_crc32c(data))


def _crc32c(data: bytes) -> int:
    """A CRC is linear: a block's is the exclusive or of one table entry a byte, by the byte and its place.

    The register starts with all bits set, which is the same as inverting the first four bytes; zeros in front of them
    change nothing. A block's result enters the next one through that one's first four bytes.
    """
    assert len(data) >= 4
    entries, carries, places = _tables()
    padded = np.zeros(-(-len(data) // _BLOCK) * _BLOCK, np.uint8)
    message = padded[len(padded) - len(data) :]
    message[:] = np.frombuffer(data, np.uint8)
    message[:4] ^= 0xFF
    looked_up = entries.take(padded.reshape(-1, _BLOCK) + places)
    first, second, third, fourth = carries
    crc = 0
    for block in np.bitwise_xor.reduce(looked_up, axis=1).tolist():
        crc = block ^ first[crc & 255] ^ second[crc >> 8 & 255] ^ third[crc >> 16 & 255] ^ fourth[crc >> 24]
    return crc ^ 0xFFFFFFFF


@cache
def _tables() -> tuple[np.ndarray, list[list[int]], np.ndarray]:
    """What a byte at a place of a block adds to the block's CRC: uint32 [block x 256]; its first four rows as lists;
    and where each row starts, int32 [block]."""
    table = np.empty((_BLOCK, 256), np.uint32)
    last = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        last = (last >> 1) ^ np.where(last & 1, np.uint32(_POLYNOMIAL), np.uint32(0))
    table[-1] = last
    for place in range(_BLOCK - 2, -1, -1):
        table[place] = (table[place + 1] >> 8) ^ last[table[place + 1] & 255]
    return table.ravel(), table[:4].tolist(), np.arange(0, table.size, 256, dtype=np.int32)


# --------------------------------------------------------------------------------------- protocol buffers


def _feature(value: bytes | int) -> bytes:
    if isinstance(value, bytes):
        return _field(_BYTES_LIST, _field(1, value))
    return _field(_INT64_LIST, _field(1, _varint(value)))  # a list of numbers is packed: its varints as one field


def _field(number: int, content: bytes) -> bytes:
    return b"".join((_varint(number << 3 | _LENGTH_DELIMITED), _varint(len(content)), content))


def _varint(number: int) -> bytes:
    assert 0 <= number < 1 << 63
    groups = bytearray()
    while number > 127:
        groups.append(number & 127 | 128)
        number >>= 7
    return bytes((*groups, number))


def _fields(message: bytes | memoryview) -> list[tuple[int, memoryview]]:
    """(number, content) of each field; all that stand in such a message are length-delimited."""
    view, place, fields = memoryview(message), 0, []
    while place < len(view):
        tag, place = _read_varint(view, place)
        length, place = _read_varint(view, place)
        if length > len(view) - place:
            raise ValueError("damaged Example: a field is longer than what it is in")
        fields.append((tag >> 3, view[place : place + length]))
        place += length
    return fields


def _read_varint(view: memoryview, place: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        if place >= len(view) or shift > 63:
            raise ValueError("damaged Example: a number has no end")
        group = view[place]
        number |= (group & 127) << shift
        place, shift = place + 1, shift + 7
        if group < 128:
            return number, place
