import io
import struct
from typing import Any

import numpy as np
import pytest

from dalikd.pipelines.shards.tfrecord import decode_example, encode_example, frame, masked_crc32c, unframe


def _unmasked(masked: int) -> int:
    turned = (masked - 0xA282EAD8) & 0xFFFFFFFF
    return (turned >> 17 | turned << 15) & 0xFFFFFFFF


@pytest.mark.parametrize(
    ("data", "crc"),
    [(b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43)],  # RFC 3720, B.4
)
def test_published_checksums(data, crc):
    assert _unmasked(masked_crc32c(data)) == crc


@pytest.mark.parametrize("length", [4, 5, 1023, 1024, 1025, 2048, 5003])
def test_checksums_equal_a_loop_over_bytes(length):
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c as slow

    data = np.random.default_rng(length).bytes(length)
    assert masked_crc32c(data) == slow(data)


def test_frames_are_those_of_tensorboards_writer():
    from tensorboard.summary.writer.record_writer import RecordWriter

    file = io.BytesIO()
    RecordWriter(file).write(b"some payload")
    assert frame(b"some payload") == file.getvalue()
    assert unframe(file.getvalue()) == b"some payload"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record[:-1], "length"),
        (lambda record: record[:0], "length"),
        (lambda record: record[:14] + b"X" + record[15:], "checksum"),
        (lambda record: record[:-1] + b"X", "checksum"),
        (lambda record: record[:8] + b"XXXX" + record[12:], "checksum"),
    ],
)
def test_damage_is_found(change, message):
    with pytest.raises(ValueError, match=message):
        unframe(change(frame(b"some payload")))


def _message_class() -> Any:
    """tf.train.Example, declared to google.protobuf as TensorFlow's feature.proto declares it."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file: Any = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto

    def declare(message: Any, name: str, number: int, kind: int, label: int = kinds.LABEL_OPTIONAL, of: str = ""):
        message.field.add(name=name, number=number, type=kind, label=label, type_name=of or None)

    for name, kind in (("BytesList", kinds.TYPE_BYTES), ("Int64List", kinds.TYPE_INT64)):
        declare(file.message_type.add(name=name), "value", 1, kind, kinds.LABEL_REPEATED)
    feature = file.message_type.add(name="Feature")
    declare(feature, "bytes_list", 1, kinds.TYPE_MESSAGE, of=".t.BytesList")
    declare(feature, "int64_list", 3, kinds.TYPE_MESSAGE, of=".t.Int64List")
    entry = file.message_type.add(name="Features")
    nested = entry.nested_type.add(name="FeatureEntry", options={"map_entry": True})
    declare(nested, "key", 1, kinds.TYPE_STRING)
    declare(nested, "value", 2, kinds.TYPE_MESSAGE, of=".t.Feature")
    declare(entry, "feature", 1, kinds.TYPE_MESSAGE, kinds.LABEL_REPEATED, ".t.Features.FeatureEntry")
    declare(file.message_type.add(name="Example"), "features", 1, kinds.TYPE_MESSAGE, of=".t.Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


FEATURES: dict[str, bytes | int] = {"image": b"\0\xff" * 200, "zero": 0, "large": 2**40 + 3, "empty": b""}


def test_examples_are_what_protobuf_reads():
    features = _message_class().FromString(encode_example(FEATURES)).features.feature
    assert set(features) == set(FEATURES)
    assert list(features["image"].bytes_list.value) == [FEATURES["image"]]
    assert list(features["empty"].bytes_list.value) == [b""]
    assert list(features["zero"].int64_list.value) == [0]
    assert list(features["large"].int64_list.value) == [2**40 + 3]


def test_examples_come_back():
    assert decode_example(encode_example(FEATURES)) == FEATURES


def test_the_length_of_a_frame_is_little_endian():
    assert frame(b"12345")[:8] == struct.pack("<Q", 5)
