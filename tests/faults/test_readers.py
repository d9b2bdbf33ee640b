"""No file, however damaged or made, does more to a reader than be refused: the readers of all kinds of files, fuzzed.

Each reader runs in a process of its own, over seeded mutations of a file that is whole: bytes turned, cut, put in and
doubled, numbers made huge, and changes that keep the outer form (JSON with other values, a zip of another pickle, a
deflated array of another size). It may raise ValueError or OSError that names the file, and takes under five seconds of
a processor and 500 MB.
"""

import faulthandler
import io
import json
import pickle
import random
import re
import resource
import shutil
import struct
import sys
import time
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dalikd.kd.checkpoints import read_origin, read_state_dict
from dalikd.kd.correlation import read_points
from dalikd.kd.entropy_log import EntropyLog
from dalikd.kd.known_weights import open_weights
from dalikd.pipelines.data import open_source
from dalikd.pipelines.datasets import file_list
from dalikd.pipelines.datasets.arrays import find_arrays
from dalikd.pipelines.datasets.classes import read_class_list
from dalikd.pipelines.datasets.spec import SplitSpec
from dalikd.pipelines.files import Refused, read_json, read_npy
from dalikd.pipelines.shards.read import ShardSet
from dalikd.pipelines.shards.write import WriteOptions, write_shards
from dalikd.tools.cli import parse
from dalikd.tools.distill import read_students
from dalikd.tools.layers import grammar, read_layers
from dalikd.trainers.checkpoint import read_state, save_state, save_weights
from dalikd.trainers.teacher_cache.layout import CacheLayout, TeacherCache

pytestmark = pytest.mark.faults

_HUGE = (-1, 0, 255, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
_SECONDS, _BYTES = 5, 500 << 20

Mutate = Callable[[random.Random, bytes], bytes]


class Reader(NamedTuple):
    """What makes a whole file and those beside it in a folder, what reads it, and how it may be changed.

    `make` returns the files that are changed, each with the ways besides those for any file.
    """

    make: Callable[[Path], dict[Path, tuple[Mutate, ...]]]
    read: Callable[[Path], object]


# ------------------------------------------------------------------------------------------------- mutations


def _bytes_turned(draw: random.Random, content: bytes) -> bytes:
    changed = bytearray(content or b"\0")
    for _ in range(draw.choice((1, 1, 2, 8))):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def _cut(draw: random.Random, content: bytes) -> bytes:
    first, last = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    return draw.choice((content[:first], content[first:], content[:first] + content[last:]))


def _put_in(draw: random.Random, content: bytes) -> bytes:
    place = draw.randrange(len(content) + 1)
    return content[:place] + draw.randbytes(draw.choice((1, 4, 100))) + content[place:]


def _doubled(draw: random.Random, content: bytes) -> bytes:
    first, last = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    return content[:last] + content[first:last] * draw.choice((1, 2, 20)) + content[last:]


def _huge_binary(draw: random.Random, content: bytes) -> bytes:
    width = draw.choice((1, 2, 4, 8))
    number = (draw.choice(_HUGE) % (1 << 8 * width)).to_bytes(width, draw.choice(("little", "big")))
    place = draw.randrange(min(len(content), draw.choice((64, 512, 1 << 30))) + 1)
    return content[:place] + number + content[place + width :]


def _huge_text(draw: random.Random, content: bytes) -> bytes:
    found = list(re.finditer(rb"-?\d+(\.\d+)?", content))
    if not found:
        return _put_in(draw, content)
    number = draw.choice(found)
    new = draw.choice((*map(str, _HUGE), "1e999", "NaN", "Infinity", "9" * 5000, "1.5", "null", "'x'", "[]", "1_0"))
    return content[: number.start()] + new.encode() + content[number.end() :]


_ANY: tuple[Mutate, ...] = (_bytes_turned, _cut, _put_in, _doubled, _huge_binary, _huge_text)


def _other_value(draw: random.Random) -> Any:
    deep: Any = 0
    for _ in range(draw.choice((3, 40, 900))):
        deep = draw.choice(([deep], {"a": deep}))
    others = None, True, "", "x" * 9, "../../etc/passwd", "\0", [], {}, [None], {"": 1}, 1.5, float("nan"), 1e308
    return draw.choice((*others, *_HUGE, 10**400, deep))


def _changed(draw: random.Random, content: Any) -> Any:
    """A structure in which a value, a key or an entry is another one."""
    if not content or not isinstance(content, dict | list) or draw.random() < 0.2:
        return _other_value(draw)
    keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    key, copy = draw.choice(keys), content.copy()
    way = draw.random()
    if way < 0.15:
        del copy[key]
    elif way < 0.3 and isinstance(copy, dict):
        copy[draw.choice(("x", "class_path", "init_args", "task", "import"))] = copy.pop(key)
    else:
        copy[key] = _changed(draw, copy[key])
    return copy


def _json(draw: random.Random, content: bytes) -> bytes:
    try:
        return json.dumps(_changed(draw, json.loads(content))).encode()
    except RecursionError:
        return b"[" * draw.choice((100, 100_000)) + content


def _yaml(draw: random.Random, content: bytes) -> bytes:
    way = draw.randrange(6)
    if way == 0:
        laughs = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, draw.randrange(2, 40)))
        return f"a0: &a0 [x]\n{laughs}".encode() + content
    if way == 1:
        merges = "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12))
        return f"a0: &a0 {{x: 1}}\n{merges}".encode() + content
    if way == 2:
        return content + b"seed: " + draw.choice((b"[", b"{a: ", b"- ", b"? ")) * draw.choice((5, 31, 33, 1000, 30_000))
    if way == 3:
        tag = draw.choice(("int", "float", "bool", "timestamp", "binary", "set", "omap", "pairs", "python/name:os.dup"))
        return content.replace(b": ", f": !!{tag} ".encode(), draw.randrange(1, 3))
    if way == 4:
        texts = b"seed: &a [*a]\n", b"seed: '{a: &a [1], b: [*a, *a]}'\n", b"? [1]\n: 2\n", content
        return content + draw.choice(texts)
    try:
        return yaml.safe_dump(_changed(draw, yaml.safe_load(content))).encode()
    except RecursionError:
        return content + b"seed: " + b"[" * 900


def _pickled(draw: random.Random, content: bytes) -> bytes:
    """Operations that ask for memory, at a place among the others or in front."""
    number = draw.choice((1 << 20, (1 << 28) + 7, (1 << 31) - 1))
    bombs = (
        b"r" + struct.pack("<I", number),  # a place in the memo
        b"B" + struct.pack("<I", number),  # bytes of that length
        b"X" + struct.pack("<I", number),
        b"\x8e" + struct.pack("<Q", number << draw.choice((0, 8, 30))),
        b"\x96" + struct.pack("<Q", number),  # bytearray
        b"\x95" + struct.pack("<Q", number << 20),  # frame
        b"\x8b" + struct.pack("<I", number),  # an integer of so many bytes
        b"cbuiltins\nbytearray\n" + b"J" + struct.pack("<i", number) + b"\x85R",
        b"c_codecs\nencode\n" + b"X" + struct.pack("<I", 1000) + b"x" * 1000 + b"X\x06\0\0\0latin1\x86R" * 50,
        b"cnumpy\nndarray\n" + b"J" + struct.pack("<i", number) + b"\x85R",
        b"ctorch\nFloatStorage\n" + b"J" + struct.pack("<i", number) + b"\x85R",
        b")" + b"\x85" * draw.choice((100, 400_000)),  # tuples in tuples
        b"]" * draw.choice((100, 100_000)),
        b"(" * 1000,
        b"h\0" * 1000,
    )
    place = draw.choice((2, draw.randrange(len(content) + 1)))
    return content[:place] + draw.choice(bombs) + draw.choice((b"", b"0")) + content[place:]


def _zipped(draw: random.Random, content: bytes) -> bytes:
    """The same zip, its sums right, with one member changed, deflated, or listed under more names."""
    archive = zipfile.ZipFile(io.BytesIO(content))
    members = {info.filename: archive.read(info) for info in archive.infolist()}
    name = draw.choice([*members, *(name for name in members if name.endswith(".pkl"))])
    members[name] = draw.choice((*_ANY, _pickled))(draw, members[name])
    way = draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    if way == zipfile.ZIP_DEFLATED and draw.random() < 0.1:
        members[name] += bytes(64 << 20)
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", way) as made:
        for member, inner in members.items():
            made.writestr(member, inner)
    return target.getvalue()


def _safetensors(draw: random.Random, content: bytes) -> bytes:
    """Another header, of its right length."""
    length = int.from_bytes(content[:8], "little")
    header = draw.choice((_json, _huge_text))(draw, content[8 : 8 + length])
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def _npy(draw: random.Random, content: bytes) -> bytes:
    """Another header, of its right length."""
    length = int.from_bytes(content[8:10], "little")
    kinds = b"'<f8'", b"'|O'", b"'<U99999999'", b"[('a', '<i8', (99999, 99999))]", b"'<M8[s]'", b"'|V2147483647'"
    header = content[10 : 10 + length]
    header = _huge_text(draw, header) if draw.random() < 0.5 else re.sub(rb"'[<|]\w+'", draw.choice(kinds), header)
    header = header if draw.random() < 0.7 else draw.choice(_ANY)(draw, header)[:9999]
    return content[:8] + len(header).to_bytes(2, "little") + header + content[10 + length :]


def _mat(draw: random.Random, content: bytes) -> bytes:
    """The first variable changed before it is deflated, or long zeros."""
    _, size = struct.unpack_from("<II", content, 128)
    inner = zlib.decompress(content[136 : 136 + size])
    if draw.random() < 0.02:
        inner = inner[:8] + bytes(300 << 20)
    else:
        inner = draw.choice((_huge_binary, _bytes_turned, _cut))(draw, inner[:200]) + inner[200:]
    packed = zlib.compress(inner, 1)
    return content[:128] + struct.pack("<II", 15, len(packed)) + packed + content[136 + size :]


# --------------------------------------------------------------------------------------------------- readers


def _write(path: Path, content: bytes, *ways: Mutate) -> dict[Path, tuple[Mutate, ...]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return {path: ways}


def _make_config(folder: Path) -> dict[Path, tuple[Mutate, ...]]:
    content = {
        "model": "resnet20",
        "epochs": 3,
        "data": {"name": "cifar10", "root": "DATA", "image_size": 32},
        "mean": [0.5, 0.5, 0.5],
        "model_args": {"width": 2},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1, "betas": [0.9, 0.99]}},
        "train": {"seed": 3},
        "distill": {"teacher": {"name": "resnet56"}, "loss": {"class_path": "KD", "init_args": {"temperature": 2.0}}},
    }
    return _write(folder / "config.yaml", yaml.safe_dump(content).encode(), _yaml, _yaml, _yaml)


def _read_config(folder: Path) -> None:
    words = ["--config", str(folder / "config.yaml")]
    read_layers(words, grammar("train"))
    if zlib.crc32((folder / "config.yaml").read_bytes()) % 50 == 0:  # it takes a hundred times as long
        parse("train", words)


def _make_students(folder: Path) -> dict[Path, tuple[Mutate, ...]]:
    entries = [{"name": "a", "model": "resnet8", "seed": 1, "loss": "KD"}, {"name": "b", "model": "resnet20"}]
    return _write(folder / "students.yaml", yaml.safe_dump(entries).encode(), _yaml, _yaml)


def _make_points(folder: Path) -> dict[Path, tuple[Mutate, ...]]:
    points = [{"da": f"a{n}", "t_stddev": 0.1 * n, "s_test_loss": 1.0 + n} for n in range(4)]
    return _write(folder / "points.json", json.dumps({"points": points}).encode(), _json, _json, _json)


def _make_tree(folder: Path) -> dict[Path, tuple[Mutate, ...]]:
    for name in ("ant", "bee"):
        (folder / "tree" / name).mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (8, 8)).save(folder / "tree" / name / f"{number}.jpg")
    time.sleep(2.1)  # or the folders are too young to be remembered
    _open_tree(folder)
    kept = next((folder / "cache" / "manifests").iterdir())
    listed = [path for path in kept.glob("*-*.npy") if path.name.startswith(file_list._ARRAYS)]
    arrays = {path: (_npy, _npy, _manifest(kept, path.name)) for path in listed}
    return {kept / "manifest.json": (_json, _json, _json), **arrays}


def _manifest(kept: Path, name: str) -> Mutate:
    """Another array, with the right checksum: lets the JSON beside it, and the names of the files, be of it."""

    def change(draw: random.Random, content: bytes) -> bytes:
        array = np.load(io.BytesIO(content)).copy()
        array.flat[draw.randrange(array.size)] = draw.choice((0, 1, 47, 200) if array.itemsize == 1 else _HUGE[:9])
        note = json.loads((kept / "manifest.json").read_text())
        old = note["checksum"]
        arrays = [array if name.startswith(each) else np.load(kept / f"{each}-{old}.npy") for each in file_list._ARRAYS]
        note["checksum"] = file_list._checksum(arrays)
        for each, values in zip(file_list._ARRAYS, arrays, strict=True):
            np.save(kept / f"{each}-{note['checksum']}.npy", values)
        (kept / "manifest.json").write_text(json.dumps(note))
        return content

    return change


def _open_tree(folder: Path) -> None:
    file_list.cache_folder = lambda: folder / "cache"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        tree = file_list.open_tree(folder / "tree", ("ant", "bee"), remember_above=1)
    assert len(tree.labels) == 10
    assert set(tree.labels.tolist()) <= {0, 1}
    assert all(Path(tree.files.path(row)).is_relative_to(folder / "tree") for row in range(10))
    tree.files.sides()
    for warning in told:  # the list is refused, and the folder scanned anew
        if warning.category is UserWarning:
            raise ValueError(str(warning.message))


def _make_cifar(folder: Path) -> dict[Path, tuple[Mutate, ...]]:
    rows = np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072)
    batch = pickle.dumps({b"data": rows, b"labels": [1, 2], b"filenames": [b"a", b"b"]}, 2)
    names = pickle.dumps({"label_names": [f"class{n}" for n in range(10)]}, 4)
    for number in range(1, 6):
        _write(folder / f"data_batch_{number}", b"")
    return _write(folder / "test_batch", batch, _pickled, _pickled) | _write(folder / "batches.meta", names, _pickled)


def _make_svhn(folder: Path) -> dict[Path, tuple[Mutate, ...]]:
    def element(kind: int, content: bytes) -> bytes:
        return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)

    written = []
    for name, array in (("X", np.zeros((32, 32, 3, 2), np.uint8)), ("y", np.array([[1], [10]], np.uint8))):
        sides = struct.pack(f"<{array.ndim}i", *array.shape)
        parts = element(6, struct.pack("<II", 9, 0)), element(5, sides), element(1, name.encode())
        packed = zlib.compress(element(14, b"".join(parts) + element(2, array.tobytes(order="F"))))
        written.append(struct.pack("<II", 15, len(packed)) + packed)
    header = b"MATLAB 5.0 MAT-file".ljust(116) + bytes(8) + b"\0\1IM"
    return _write(folder / "test_32x32.mat", header + b"".join(written), _mat, _mat)


def _make_stl(folder: Path) -> dict[Path, tuple[Mutate, ...]]:
    for name in ("train_X.bin", "train_y.bin"):
        _write(folder / name, b"")
    images = _write(folder / "test_X.bin", bytes(2 * 3 * 96 * 96))
    return images | _write(folder / "test_y.bin", b"\x01\x0a")


def _find(name: str) -> Callable[[Path], object]:
    return lambda folder: find_arrays(SplitSpec(name, folder, "val", "test"))


def _weights() -> dict[str, torch.Tensor]:
    return {"conv.weight": torch.zeros(4, 3, 3, 3), "bn.running_mean": torch.zeros(4), "fc.bias": torch.ones(2)}


def _make_safetensors(folder: Path) -> dict[Path, tuple[Mutate, ...]]:
    save_weights(folder / "net.safetensors", torch.nn.Linear(3, 2), class_names=("a", "b"))
    return {folder / "net.safetensors": (_safetensors, _safetensors)}


def _read_safetensors(folder: Path) -> None:
    read_origin(folder / "net.safetensors")
    read_state_dict(folder / "net.safetensors")


def _make_torch(folder: Path) -> dict[Path, tuple[Mutate, ...]]:
    torch.save({"model": _weights(), "epoch": 3}, folder / "net.pt")
    return {folder / "net.pt": (_zipped, _zipped)}


def _make_old_torch(folder: Path) -> dict[Path, tuple[Mutate, ...]]:
    torch.save({"state_dict": _weights()}, folder / "net.pth", _use_new_zipfile_serialization=False)
    return {folder / "net.pth": (_pickled,)}


def _make_state(folder: Path) -> dict[Path, tuple[Mutate, ...]]:
    save_state(folder / "trainer.pt", {"step": 3, "task": _weights(), "identity": {"a": 1}, "loader": {"seen": [1]}})
    return {folder / "trainer.pt": (_zipped, _zipped)}


def _make_cache(folder: Path) -> dict[Path, tuple[Mutate, ...]]:
    layout = CacheLayout(6, 4, 1, "topk", k=2, pool=8, fingerprint={"seed": 0, "mix.group": 2})
    cache = TeacherCache.create(folder / "cache", layout)
    rows = np.arange(6)
    columns = {name: np.zeros((6, *row.shape), row.dtype) for name, row in layout.columns().items() if name != "filled"}
    cache.write(0, rows, columns)
    cache.flush(0)
    arrays = dict.fromkeys((folder / "cache" / "epoch-0000").glob("*.npy"), (_npy, _npy))
    return {folder / "cache" / "cache.json": (_json, _json, _json), **arrays}


def _read_cache(folder: Path) -> None:
    cache = TeacherCache(folder / "cache")
    cache.check_made_for({"seed": 0}, "")
    cache.check_filled()
    found = cache.read(0, np.arange(cache.layout.rows))
    assert all(array.max() < 8 for name, array in found.items() if name == "picks")


def _make_shards(format: str) -> Callable[[Path], dict[Path, tuple[Mutate, ...]]]:
    def make(folder: Path) -> dict[Path, tuple[Mutate, ...]]:
        for split in ("train", "val"):
            for name in ("ant", "bee"):
                (folder / "tree" / split / name).mkdir(parents=True)
                for number in range(3):
                    Image.new("RGB", (8, 8)).save(folder / "tree" / split / name / f"{number}.jpg")
        source = open_source("imagefolder", folder / "tree", "train")
        options: Any = {"format": format, "shard_images": 3}
        write_shards(source, folder / "shards", WriteOptions(**options))
        files = dict.fromkeys((folder / "shards").glob("*.npy"), (_npy, _npy))
        parts = (folder / "shards").glob("train-*")
        files |= {path: () for path in parts if format == "tfrecord" or path.suffix == ".idx"}
        return {folder / "shards" / "dataset.json": (_json, _json, _json), **files}

    return make


def _read_shards(folder: Path) -> None:
    shards = ShardSet(folder / "shards")
    for row in range(len(shards)):
        shards.name(row)
        shards.read(row)


def _make_npy(folder: Path) -> dict[Path, tuple[Mutate, ...]]:
    np.save(folder / "a.npy", np.arange(20.0).reshape(4, 5))
    return {folder / "a.npy": (_npy, _npy, _npy)}


def _make_tar(folder: Path) -> dict[Path, tuple[Mutate, ...]]:
    import tarfile

    with tarfile.open(folder / "nets.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("a/net.pt", "b/" + "x" * 200 + ".pt"):
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = 600, {"comment": "x"}
            archive.addfile(member, io.BytesIO(bytes(600)))

    def header(draw: random.Random, content: bytes) -> bytes:
        """A header with another entry and the right sum."""
        place = 512 * draw.randrange(len(content) // 512)
        block = bytearray(content[place : place + 512])
        start, size = draw.choice(((0, 100), (124, 12), (156, 1), (157, 100), (345, 155)))
        texts = b"/etc/passwd", b"../../x", b"77777777777", b"\xff" * 12, b"\x80" + b"\xff" * 11, b"S", b"2", b"L", b"x"
        block[start : start + size] = draw.choice(texts)[:size].ljust(size, b"\0")
        block[148:156] = b" " * 8
        block[148:156] = f"{sum(block):06o}\0 ".encode()
        return content[:place] + bytes(block) + content[place + 512 :]

    return {folder / "nets.tar": (header, header, header)}


def _read_tar(folder: Path) -> None:
    with open_weights(f"{folder / 'nets.tar'}:a/net.pt") as file:
        assert len(file.read()) <= (folder / "nets.tar").stat().st_size


def _make_log(folder: Path) -> dict[Path, tuple[Mutate, ...]]:
    log = EntropyLog(2)
    log.add(2, torch.ones(4), torch.ones(8), torch.ones(4))
    with (folder / "log.npz").open("wb") as file:
        log.save(file)
    return {folder / "log.npz": (_zipped, _zipped)}


READERS: dict[str, Reader] = {
    "config": Reader(_make_config, _read_config),
    "students": Reader(_make_students, lambda folder: read_students(folder / "students.yaml")),
    "class list": Reader(
        lambda folder: _write(folder / "classes.txt", b"ant\nbee # a remark\n# all\ncat\n"),
        lambda folder: read_class_list(folder / "classes.txt"),
    ),
    "points": Reader(_make_points, lambda folder: read_points(folder / "points.json")),
    "json": Reader(_make_points, lambda folder: read_json(folder / "points.json")),
    "manifest": Reader(_make_tree, _open_tree),
    "cifar": Reader(_make_cifar, _find("cifar10")),
    "svhn": Reader(_make_svhn, _find("svhn")),
    "stl10": Reader(_make_stl, _find("stl10")),
    "safetensors": Reader(_make_safetensors, _read_safetensors),
    "torch": Reader(_make_torch, lambda folder: read_state_dict(folder / "net.pt")),
    "old torch": Reader(_make_old_torch, lambda folder: read_state_dict(folder / "net.pth")),
    "run state": Reader(_make_state, lambda folder: read_state(folder / "trainer.pt")),
    "teacher cache": Reader(_make_cache, _read_cache),
    "webdataset": Reader(_make_shards("webdataset"), _read_shards),
    "tfrecord": Reader(_make_shards("tfrecord"), _read_shards),
    "npy": Reader(_make_npy, lambda folder: read_npy(folder / "a.npy").sum()),
    "tar": Reader(_make_tar, _read_tar),
    "entropy log": Reader(_make_log, lambda folder: EntropyLog.load(folder / "log.npz")),
}


# ------------------------------------------------------------------------------------------------------ runs


def fuzz(name: str, folder: Path, first: int, cases: int) -> dict[str, Any]:
    """Counts of outcomes, the worst time and memory, and what went wrong, ten cases at most."""
    reader, start = READERS[name], folder / "whole"
    start.mkdir(parents=True)
    files = reader.make(start)
    reader.read(start)
    kept = {path: path.read_bytes() for path in start.rglob("*") if path.is_file()}
    names = [path.name for path in kept]
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    base, worst = _peak(), 0.0
    for case in range(first, first + cases):
        draw = random.Random(f"{name} {case}")
        path = draw.choice(list(files))
        mutate = draw.choice(_ANY + files[path] * 2)
        changed = mutate(draw, kept[path])
        if changed != kept[path]:
            path.write_bytes(changed)
        if case % 100 == 0:  # it starts a thread
            faulthandler.dump_traceback_later(900, exit=True)
        began = time.process_time()
        outcome, fault = _outcome(reader, start, names)
        worst, grown = max(worst, time.process_time() - began), _peak() - base
        if time.process_time() - began > _SECONDS or grown > _BYTES:
            fault, base = f"{time.process_time() - began:.1f} s, {grown >> 20} MB", base + grown
        counts[outcome] += 1
        if fault:
            wrong.append(f"case {case} ({mutate.__name__} of {path.name}): {fault}")
        if len(wrong) >= 10:
            break
        _restore(start, kept, path)
    faulthandler.cancel_dump_traceback_later()
    return {"reader": name, **counts, "seconds": round(worst, 2), "mb": (_peak() - base) >> 20, "wrong": wrong}


def _peak() -> int:
    """Most bytes that this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _outcome(reader: Reader, folder: Path, names: list[str]) -> tuple[str, str]:
    """Whether a file was read or refused, and what is wrong with that; empty: nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.read(folder)
    except (ValueError, OSError) as error:
        named = str(folder) in str(error) or any(name in str(error) for name in names)
        plain = type(error) in (ValueError, FileNotFoundError, Refused) or getattr(error, "errno", None) is not None
        return "refused", "" if named and plain else f"{type(error).__name__}: {str(error)[:200]}"
    except BaseException as error:
        return "failed", f"{type(error).__name__}: {str(error)[:200]}"
    return "read", ""


def _restore(folder: Path, kept: dict[Path, bytes], changed: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and path not in kept:
            path.unlink()
    for path, content in kept.items():
        if path == changed or not path.is_file() or (path.suffix == ".json" and path.read_bytes() != content):
            path.write_bytes(content)


if __name__ == "__main__":
    words = sys.argv[1:]
    found = fuzz(words[0], Path(words[1]), int(words[2]), int(words[3]))
    print(json.dumps(found))


@pytest.mark.parametrize("name", READERS)
def test_a_reader_of_changed_files_refuses_them_by_name(name: str, tmp_path: Path, start_forked, full: bool) -> None:
    process = start_forked(tmp_path / "streams", __file__, name, tmp_path / "fuzz", 0, 10_000 if full else 100)
    assert process.wait(7200) == 0, process.err[-3000:]
    found = json.loads(process.out)
    shutil.rmtree(tmp_path / "fuzz", ignore_errors=True)
    assert found["wrong"] == [], found
    if name != "manifest":  # a damaged one is made anew, with a warning
        assert found["refused"] > 0, found  # the changes are such as matter
