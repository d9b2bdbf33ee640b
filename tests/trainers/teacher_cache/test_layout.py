import json
import resource
from dataclasses import replace
from types import SimpleNamespace
from uuid import uuid4

import numpy as np
import pytest
import torch
from torch import nn

from dalikd.kd.known_weights import weights_digest
from dalikd.kd.picking import pick_rows
from dalikd.trainers.teacher_cache.layout import (
    CacheLayout,
    TeacherCache,
    differing,
    from_group_picks,
    pack_logits,
    to_group_picks,
    unpack_logits,
)

_FILE_SIZE = resource.RLIMIT_FSIZE
SMALL = CacheLayout(
    rows=6, classes=3, epochs=2, augmented=True, pool=8, fingerprint={"seed": 0, "view.scale": [0.5, 1]}
)


def _rows(count, classes=3, seed=0):
    random = np.random.default_rng(seed)
    logits, augmented = random.normal(0, 3, (2, count, classes)).astype(np.float32)
    return {"logits": logits, "augmented": augmented, "picks": random.integers(0, 8, count)}


# ------------------------------------------------------------------------------------------------------- logits


def _logits(rows=5, classes=12, scale=3.0, dtype=torch.float32):
    return scale * torch.randn(rows, classes, generator=torch.Generator().manual_seed(0), dtype=dtype)


def test_float32_is_exact_and_float16_rounds():
    logits = _logits()
    assert torch.equal(unpack_logits(pack_logits(logits, "float32", 0), 12), logits)
    half = unpack_logits(pack_logits(logits, "float16", 0), 12)
    assert torch.equal(half, logits.half().float())
    assert half.dtype == torch.float32


def test_topk_with_all_classes_is_exact_up_to_a_constant():
    logits = torch.randint(-80, 80, (7, 12), generator=torch.Generator().manual_seed(0)) / 8  # float16 holds eighths
    restored = unpack_logits(pack_logits(logits, "topk", 12), 12)
    assert torch.equal(restored, logits - logits.amax(1, keepdim=True))


def test_topk_by_hand():
    """The third to the fifth class share 0.2 equally."""
    logits = torch.tensor([[0.06, 0.5, 0.04, 0.3, 0.1]]).log() + 7
    parts = pack_logits(logits, "topk", 2)
    assert parts["_classes"].tolist() == [[1, 3]]
    assert parts["_values"].dtype == torch.float16
    torch.testing.assert_close(parts["_values"].float(), torch.tensor([[0.0, np.log(0.6)]]).float(), rtol=0, atol=3e-4)
    torch.testing.assert_close(parts["_rest"], torch.tensor([0.2]))
    expected = torch.tensor([[0.2 / 3, 0.5, 0.2 / 3, 0.3, 0.2 / 3]])
    torch.testing.assert_close(unpack_logits(parts, 5).softmax(1), expected, rtol=0, atol=2e-4)


def test_topk_of_a_certain_teacher_stays_finite():
    """The others' mass is far below the smallest float32."""
    logits = torch.zeros(2, 100)
    logits[:, 7] = 500.0
    restored = unpack_logits(pack_logits(logits, "topk", 4), 100)
    assert torch.isfinite(restored).all()
    assert torch.equal(restored.argmax(1), torch.tensor([7, 7]))
    torch.testing.assert_close(restored.softmax(1), logits.softmax(1), rtol=0, atol=1e-30)


def test_topk_keeps_a_small_residual_mass():
    """1 - sum would lose it in float32."""
    logits = torch.tensor([[30.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    rest = pack_logits(logits, "topk", 1)["_rest"]
    assert rest.item() == pytest.approx(3 * np.exp(-30.0), rel=1e-6)


def test_the_error_of_topk_at_other_temperatures():
    """At temperature 1 the others' mass is exact and only their spread is lost. At 4 their mass grows too, and more."""
    logits = _logits(64, 100, dtype=torch.float64)
    parts = pack_logits(logits, "topk", 16)
    restored, others = unpack_logits(parts, 100).double(), torch.ones(64, 100, dtype=torch.bool)
    others.scatter_(1, parts["_classes"], False)
    distances, excess = {}, {}
    for temperature in (1, 4):
        true, found = ((rows / temperature).softmax(1) for rows in (logits, restored))
        distances[temperature] = ((true - found).abs().sum(1) / 2).mean().item()
        excess[temperature] = ((found - true) * others).sum(1).mean().item()
    assert abs(excess[1]) < 1e-4
    assert distances[1] < 0.05
    assert 0.05 < excess[4] < 0.15
    assert excess[4] < distances[4] < 0.25


# -------------------------------------------------------------------------------------------------------- picks


def test_picks_of_a_group_by_hand():
    """Batches of 10 in groups of 4, two runs: the last group has 2 originals and a pool of 4."""
    picks = np.array([0, 3, 10, 13, 4, 7, 14, 17, 8, 19])  # in the batch's pool of 2 x 10
    local = to_group_picks(picks, 10, 4)
    assert local.tolist() == [0, 3, 4, 7, 0, 3, 4, 7, 0, 3]
    assert from_group_picks(local, 10, 4).tolist() == picks.tolist()


@pytest.mark.parametrize("batch", [8, 16, 40])
def test_picks_of_groups_do_not_depend_on_the_batch(batch):
    scores = torch.rand(3, 40, generator=torch.Generator().manual_seed(0))
    whole = to_group_picks(pick_rows(scores, 8).numpy(), 40, 8)
    pieces = [
        to_group_picks(pick_rows(scores[:, start : start + batch], 8).numpy(), min(batch, 40 - start), 8)
        for start in range(0, 40, batch)
    ]
    assert np.array_equal(np.concatenate(pieces), whole)


# -------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (replace(SMALL, augmented=False, pool=0), {"logits": ("<f4", (6, 3))}),
        (
            replace(SMALL, storage="float16"),
            {"logits": ("<f2", (6, 3)), "augmented": ("<f2", (6, 3)), "picks": ("<i2", (6,))},
        ),
        (
            replace(SMALL, storage="topk", k=2, augmented=False, classes=40_000, pool=40_000),
            {
                "logits_classes": ("<i4", (6, 2)),
                "logits_values": ("<f2", (6, 2)),
                "logits_rest": ("<f4", (6,)),
                "picks": ("<i4", (6,)),
            },
        ),
    ],
)
def test_an_epoch_is_a_folder_of_arrays(tmp_path, layout, expected):
    TeacherCache.create(tmp_path / "cache", layout)
    expected = {**expected, "filled": ("|u1", (6,))}
    size = 0
    for epoch in ("epoch-0000", "epoch-0001"):
        files = {path.stem: np.load(path) for path in (tmp_path / "cache" / epoch).iterdir()}
        assert {name: (array.dtype.str, array.shape) for name, array in files.items()} == expected
        assert not any(array.any() for array in files.values())
        size += sum(array.nbytes for array in files.values())
    assert layout.epochs * layout.epoch_bytes == size


def test_disk_space_is_reserved(tmp_path):
    TeacherCache.create(tmp_path / "cache", replace(SMALL, rows=100_000))
    path = tmp_path / "cache" / "epoch-0001" / "logits.npy"
    assert path.stat().st_blocks * 512 >= path.stat().st_size > 1_200_000


def test_a_full_disk_leaves_no_half_epoch(tmp_path):
    layout, before = replace(SMALL, rows=10_000, classes=1, augmented=False, pool=0), resource.getrlimit(_FILE_SIZE)
    for size, file in ((20_000, "logits"), (39_000, "logits")):
        resource.setrlimit(_FILE_SIZE, (size, before[1]))
        try:
            with pytest.raises(OSError, match=rf"epoch-0000/{file}.npy cannot be written: File too large"):
                TeacherCache.create(tmp_path / "cache", layout)
        finally:
            resource.setrlimit(_FILE_SIZE, before)
        assert [path.name for path in (tmp_path / "cache").iterdir()] == ["cache.json"]
    (tmp_path / "cache" / "epoch-0000").mkdir()
    (tmp_path / "cache" / "epoch-0000" / "logits.npy").touch()  # as an earlier dalikd left it, when it was killed
    cache = TeacherCache.create(tmp_path / "cache", layout)
    assert not cache.filled(0, np.arange(3))


def test_rows_are_read_as_they_were_written(tmp_path):
    TeacherCache.create(tmp_path / "cache", SMALL)
    writers = [TeacherCache(tmp_path / "cache", writable=True) for _ in range(2)]  # as of two processes
    reader, rows, order = TeacherCache(tmp_path / "cache"), _rows(6), np.array([4, 0, 2, 5, 1, 3])
    for writer, half in zip(writers, (slice(0, 3), slice(3, 6)), strict=True):
        assert not reader.filled(1, order[half])
        writer.write(1, order[half], {name: array[half] for name, array in rows.items()})
        assert reader.filled(1, order[half])
    assert not reader.filled(0, order)
    found = reader.read(1, order[[5, 1]])
    assert found.keys() == rows.keys()
    for name, array in rows.items():
        assert np.array_equal(found[name], array[[5, 1]])
    with pytest.raises(ValueError, match="epoch 0 of 2 has 0 of 6 rows; call the same dalikd cache again"):
        reader.check_filled()
    writers[0].write(0, order, rows)
    reader.check_filled()


def test_what_is_read_is_ones_own_and_what_is_open_cannot_be_written(tmp_path):
    TeacherCache.create(tmp_path / "cache", SMALL).write(0, np.arange(6), _rows(6))
    reader = TeacherCache(tmp_path / "cache")
    reader.read(0, np.arange(2))["logits"][:] = 9
    assert not (reader.read(0, np.arange(2))["logits"] == 9).any()
    with pytest.raises(ValueError, match="read-only"):
        reader.write(0, np.arange(6), _rows(6))


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("name", ["logits", "augmented", "picks", "filled", "checksums"])
def test_a_changed_byte_is_found_when_an_epoch_is_first_read(tmp_path, name, place):
    cache = TeacherCache.create(tmp_path / "cache", SMALL)
    for epoch in range(2):
        cache.write(epoch, np.arange(6), _rows(6, seed=epoch))
    cache.seal()
    path = tmp_path / "cache" / "epoch-0001" / f"{name}.{'json' if name == 'checksums' else 'npy'}"
    content = bytearray(path.read_bytes())
    content[-1 if place == "last" and name != "checksums" else 130 if name != "checksums" else 20] ^= 2
    path.write_bytes(content)
    reader = TeacherCache(tmp_path / "cache")
    reader.check_filled()
    for _ in range(2):
        assert np.array_equal(reader.read(0, np.arange(6))["logits"], _rows(6, seed=0)["logits"])
    with pytest.raises(
        ValueError, match=r"is not what dalikd cache has written .* copy the cache again, or make it anew"
    ):
        reader.read(1, np.arange(6))


def test_checksums_are_of_whole_epochs_and_made_once(tmp_path):
    """Those of an epoch that is made anew go; a cache of an earlier version has none, and is read all the same."""
    cache = TeacherCache.create(tmp_path / "cache", SMALL)
    cache.write(0, np.arange(6), _rows(6))
    cache.write(1, np.arange(6), _rows(6))
    assert not TeacherCache(tmp_path / "cache").check_bytes(0)
    cache.seal()
    assert TeacherCache(tmp_path / "cache").check_bytes(0)
    first, second = (tmp_path / "cache" / f"epoch-000{epoch}" / "checksums.json" for epoch in range(2))
    before = first.stat().st_mtime_ns
    second.with_name("filled.npy").unlink()
    cache = TeacherCache.create(tmp_path / "cache", SMALL)
    assert not second.exists()
    cache.write(1, np.arange(6), _rows(6, seed=3))
    cache.seal()
    assert first.stat().st_mtime_ns == before
    assert np.array_equal(TeacherCache(tmp_path / "cache").read(1, np.arange(6))["logits"], _rows(6, seed=3)["logits"])


def test_flushing_reaches_the_maps(tmp_path, monkeypatch):
    cache, flushed = TeacherCache.create(tmp_path / "cache", SMALL), []
    monkeypatch.setattr(np.memmap, "flush", lambda array: flushed.append(array.shape))
    cache.flush(1)
    assert sorted(flushed) == [(6,), (6,), (6, 3), (6, 3)]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_outputs_must_be_finite(tmp_path, value):
    cache, rows = TeacherCache.create(tmp_path / "cache", SMALL), _rows(6)
    rows["augmented"][3, 1] = value
    with pytest.raises(ValueError, match="teacher's outputs are not finite in epoch 1, augmented"):
        cache.write(1, np.arange(6), rows)
    assert not cache.filled(1, np.arange(1))


def test_a_cache_gets_more_epochs_and_keeps_its_rows(tmp_path):
    TeacherCache.create(tmp_path / "cache", SMALL).write(1, np.arange(6), rows := _rows(6))
    longer = TeacherCache.create(tmp_path / "cache", replace(SMALL, epochs=3))
    assert longer.layout.epochs == 3
    assert np.array_equal(longer.read(1, np.arange(6))["logits"], rows["logits"])
    assert not longer.filled(2, np.arange(1))


@pytest.mark.parametrize(
    ("name", "value"),
    [("rows", 0), ("classes", 1 << 40), ("epochs", "2"), ("storage", "int8"), ("k", -1), ("pool", None)],
)
def test_a_description_of_no_cache_is_refused(tmp_path, name, value):
    TeacherCache.create(tmp_path / "cache", SMALL)
    path = tmp_path / "cache" / "cache.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(ValueError, match=rf"{path} describes no teacher cache that can be"):
        TeacherCache(tmp_path / "cache")


@pytest.mark.parametrize(("name", "value"), [("picks", 8), ("picks", -1), ("logits_classes", 4)])
def test_places_that_are_none_are_not_given_to_a_device(tmp_path, name, value):
    layout = CacheLayout(6, 4, 1, "topk", k=2, pool=8)
    cache = TeacherCache.create(tmp_path / "cache", layout)
    arrays = {each: np.zeros((6, *row.shape), row.dtype) for each, row in layout.columns().items() if each != "filled"}
    arrays[name][2] = value
    cache.write(0, np.arange(6), arrays)
    assert (cache.read(0, np.array([0, 1]))[name] == 0).all()
    with pytest.raises(ValueError, match=rf"epoch-0000/{name}\.npy holds a number outside of 0\.\."):
        cache.read(0, np.array([1, 2]))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            replace(SMALL, fingerprint={**SMALL.fingerprint, "seed": 1}),
            "holds another teacher cache: seed: cache has 0, this run has 1. Name another folder",
        ),
        (replace(SMALL, storage="float16"), "storage: cache has float32, this run has float16"),
        (replace(SMALL, epochs=1), "holds a teacher cache of 2 epochs, --epochs asks for 1: give at least 2"),
    ],
)
def test_another_cache_is_not_touched(tmp_path, layout, message):
    cache = TeacherCache.create(tmp_path / "cache", SMALL)
    before = (tmp_path / "cache" / "cache.json").read_text()
    with pytest.raises(ValueError, match=message):
        TeacherCache.create(tmp_path / "cache", layout)
    assert (tmp_path / "cache" / "cache.json").read_text() == before
    assert cache.layout == SMALL


def test_a_cache_whose_first_file_was_not_finished_is_begun_again(tmp_path):
    (tmp_path / f".cache.json.{uuid4().hex}").write_text("{")
    TeacherCache.create(tmp_path, SMALL)


def test_a_folder_of_other_files_is_not_touched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files and is not touched: name another folder"):
        TeacherCache.check_target(tmp_path, SMALL)


def test_the_disk_is_checked_first(tmp_path, monkeypatch):
    monkeypatch.setattr("dalikd.trainers.teacher_cache.layout.shutil.disk_usage", lambda _: SimpleNamespace(free=359))
    needed = 2 * 6 * (12 + 12 + 2 + 1)
    assert TeacherCache.check_target(tmp_path / "cache", SMALL) == (needed, 359)
    with pytest.raises(ValueError, match=r"the teacher cache needs .* GiB, the disk has .* GiB free: use --storage"):
        TeacherCache.create(tmp_path / "cache", replace(SMALL, epochs=3))
    assert not (tmp_path / "cache").exists()


def _break_description(folder, **changes):
    path = folder / "cache.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "cache.json").unlink(), "is no teacher cache"),
        (lambda folder: (folder / "cache.json").write_text("[1]"), "does not describe a teacher cache"),
        (lambda folder: (folder / "cache.json").write_text("{"), "does not describe a teacher cache"),
        (lambda folder: _break_description(folder, color="red"), "does not describe a teacher cache"),
        (lambda folder: _break_description(folder, version=2), "has version 2, this program reads 1"),
        (lambda folder: _break_description(folder, rows=7), "cache.json says otherwise: make the cache anew"),
        (lambda folder: (folder / "epoch-0001" / "picks.npy").unlink(), "picks.npy is missing: call the same dalikd"),
    ],
)
def test_a_spoilt_folder_is_refused(tmp_path, spoil, message):
    cache = TeacherCache.create(tmp_path, SMALL)
    for epoch in range(2):
        cache.write(epoch, np.arange(6), _rows(6))
    spoil(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        TeacherCache(tmp_path).check_filled()


# ------------------------------------------------------------------------------------------------- fingerprints


def test_every_difference_is_named(tmp_path):
    cache = TeacherCache.create(tmp_path, SMALL)
    cache.check_made_for({"seed": 0}, "")
    cache.check_made_for({"view.scale": (0.5, 1)}, "")
    own = {"seed": 3, "view.scale": (0.5, 1), "decoder": "cpu"}
    assert differing(SMALL.fingerprint, own) == [
        "seed: cache has 0, this run has 3",
        "decoder: cache has None, this run has cpu",
    ]
    earlier, now = {"data.fingerprint": "0" * 16}, {"data.fingerprint": "1" * 20}
    assert differing(earlier, now)[0].endswith(
        f"{'1' * 20} (which holds file sizes, as none did in earlier versions of dalikd: they cannot be compared)"
    )
    assert differing(now, {"data.fingerprint": "2" * 20})[0].endswith("2")
    with pytest.raises(ValueError, match=r"seed: cache has 0, this run has 3; decoder: .* has cpu. Do this"):
        cache.check_made_for(own, "Do this")


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


def test_the_digest_is_of_the_weights():
    first, counted, changed, renamed = _net(), _net(), _net(), nn.Sequential(nn.Identity(), *_net())
    assert weights_digest(first) == weights_digest(_net())
    counted.get_buffer("1.num_batches_tracked").add_(5)
    assert weights_digest(counted) == weights_digest(first)
    changed.get_buffer("1.running_var")[3] += 1e-6
    assert weights_digest(changed) != weights_digest(first)
    assert weights_digest(renamed) != weights_digest(first)
    assert weights_digest(first.to(memory_format=torch.channels_last)) == weights_digest(_net())
