import contextlib
import hashlib
import io
import os
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dalikd.pipelines.backends import DaliBackend, GatherBackend
from dalikd.pipelines.data import open_source
from dalikd.pipelines.draw_spec import Batch, DrawSpec, MixRun, View, ViewRun
from dalikd.pipelines.loader import BadFileError, Loader
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.sources import Source

MIXES = (MixRun("derangement", alpha=0.5), MixRun("derangement", 1, alpha=0.5))
TRAINING = DrawSpec(View(32, "pad_crop"), 7, (ViewRun("crop_flip"),), MIXES, mix_group=8)
EVALUATION = DrawSpec(View(32, "center_crop", resize=32))


@pytest.fixture(scope="module")
def source(small_images: Path) -> Source:
    return open_source("imagefolder", small_images, "train", split=".")


@pytest.fixture(scope="module")
def in_memory(source: Source) -> Source:
    return replace(source, files=None, arrays=np.stack([_decode(source, row) for row in range(len(source))]))


@pytest.fixture
def copy_tree(small_images: Path, tmp_path: Path) -> Callable[[], Path]:
    """Makes a tree of 24 copies that a test may spoil."""

    def copy() -> Path:
        for path in sorted(small_images.glob("*/00[0-7].jpg")):
            target = tmp_path / "tree" / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
        return tmp_path / "tree"

    return copy


def _decode(source: Source, row: int) -> np.ndarray:
    return np.asarray(Image.open(source.path(row)).convert("RGB"))


def _loader(source: Source, spec: DrawSpec = TRAINING, batch_size: int = 8, **options: Any) -> Loader:
    return Loader(source, Sampler(len(source), batch_size, seed=7), spec, threads=1, **options)


def _tensors(batch: Batch) -> list[torch.Tensor]:
    mix = [part for draws in batch.mix for part in draws if part is not None]
    return [batch.images, *batch.augmented, batch.labels, batch.ids, *mix]


def _equal(one: Batch, two: Batch) -> bool:
    same = all(torch.equal(a, b) for a, b in zip(_tensors(one), _tensors(two), strict=True))
    return same and one.total == two.total


# --------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("kind", ["files", "arrays"])
def test_a_batch_holds_pixels_labels_and_ids(source, in_memory, kind):
    loader = _loader(source if kind == "files" else in_memory, EVALUATION, 50)
    batch = loader.next()
    assert batch.images.shape == (50, 32, 32, 3)
    assert batch.images.dtype == torch.uint8
    assert batch.labels.dtype == batch.ids.dtype == torch.int64
    assert batch.augmented == batch.augmented_pixels == ()
    assert batch.mix == ()
    assert (len(batch), batch.total) == (50, 50)
    assert batch.ids.tolist() == loader.sampler.order(0)[:50].tolist()
    assert batch.labels.tolist() == source.labels[batch.ids].tolist()
    for row, image in zip(batch.ids.tolist(), batch.images.numpy(), strict=True):
        assert np.array_equal(image, _decode(source, row))


def test_pixels_are_channels_last_and_not_copied(source):
    batch = _loader(source).next()
    assert batch.pixels.shape == (8, 3, 32, 32)
    assert batch.pixels.is_contiguous(memory_format=torch.channels_last)
    assert batch.pixels.data_ptr() == batch.images.data_ptr()
    (augmented,), (augmented_pixels,) = batch.augmented, batch.augmented_pixels
    assert augmented_pixels.data_ptr() == augmented.data_ptr()


def test_mix_draws_are_those_of_the_spec(source):
    loader = _loader(source)
    batch = loader.next()
    draws = TRAINING.draw(loader.sampler[0])
    assert len(batch.mix) == len(draws.mix) == 2
    for tensors, arrays in zip(batch.mix, draws.mix, strict=True):
        assert np.array_equal(tensors.partner, arrays.partner)
        assert np.array_equal(tensors.lam, arrays.lam)
        assert np.array_equal(tensors.center, arrays.center)
        assert tensors.cells is tensors.box is tensors.layer is None


@pytest.mark.parametrize("buffers", [0, 2])
def test_each_mixing_run_brings_the_draws_it_asked_for(source, buffers):
    mixes = (MixRun("permutation"), MixRun("first", 1, cells=5, layers=3), MixRun(run=2, box=True))
    spec = replace(TRAINING, mixes=mixes)
    loader = _loader(source, spec, 24, buffers=buffers)
    for index in range(3):
        batch, draws = loader.next(), spec.draw(loader.sampler[index])
        for tensors, arrays in zip(batch.mix, draws.mix, strict=True):
            for name, array in arrays._asdict().items():
                found = getattr(tensors, name)
                assert (found is None) == (array is None), name
                assert array is None or torch.equal(found, torch.from_numpy(array)), name
    assert [draws.cells is None for draws in batch.mix] == [True, False, True]
    assert [draws.box is None for draws in batch.mix] == [True, True, False]


@pytest.mark.parametrize("buffers", [0, 2])
@pytest.mark.parametrize("kind", ["files", "arrays", "through dali"])
def test_each_view_is_what_a_loader_with_that_view_alone_brings(source, in_memory, kind, buffers):
    runs = (ViewRun("flip"), ViewRun("crop_flip"), ViewRun("flip", 1))
    runs += (ViewRun("trivialaugment"),) if kind == "through dali" else ()
    images = source if kind == "files" else in_memory
    together = _loader(images, replace(TRAINING, views=runs), 16, buffers=buffers)
    alone = [_loader(images, replace(TRAINING, views=(run,), mixes=()), 16, buffers=buffers) for run in runs]
    assert isinstance(together._backend, GatherBackend) == (kind == "arrays")
    for _ in range(3):
        batch = together.next()
        assert len(batch.augmented) == len(batch.augmented_pixels) == len(runs)
        for view, loader in zip(batch.augmented, alone, strict=True):
            other = loader.next()
            assert torch.equal(batch.images, other.images)
            assert torch.equal(view, other.augmented[0])
    assert not torch.equal(batch.augmented[0], batch.augmented[2])


@pytest.mark.parametrize(
    "spec",
    [
        replace(TRAINING, mixes=(MixRun(), MixRun("first"))),
        replace(TRAINING, mixes=(MixRun("derangement"),)),
        replace(TRAINING, mixes=(), mode="per_batch"),
    ],
)
def test_mix_groups_are_whole(source, spec):
    with pytest.raises(ValueError, match="microbatches of 12 images are not a multiple of the mix group 8"):
        _loader(source, spec, 12)
    _loader(source, replace(TRAINING, mixes=(MixRun(cells=3, box=True),)), 12)  # nothing is shared


@pytest.mark.parametrize("kind", ["files", "arrays"])
def test_iterating_stops_at_the_end_of_the_epoch(source, in_memory, kind):
    loader = _loader(source if kind == "files" else in_memory, batch_size=64)
    assert len(loader) == 4  # 300 rows, the last 44 left out
    for epoch in (0, 1):
        batches = list(loader)
        ids = torch.cat([batch.ids for batch in batches])
        assert ids.tolist() == loader.sampler.order(epoch)[:256].tolist()
    assert loader.position == 8
    loader.seek(6)
    assert len(list(loader)) == 2  # the rest of an epoch


@pytest.mark.parametrize("kind", ["files", "arrays"])
def test_held_batches_stay_as_they_were(source, in_memory, kind):
    """Ten batches held while others are made: nothing is overwritten."""
    loader = _loader(source if kind == "files" else in_memory, batch_size=16)
    held = [loader.next() for _ in range(10)]
    copies = [[tensor.clone() for tensor in _tensors(batch)] for batch in held]
    for _ in range(10):
        loader.next()
    for batch, copy in zip(held, copies, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(_tensors(batch), copy, strict=True))


@pytest.mark.parametrize("kind", ["files", "arrays"])
def test_short_last_batches_show_every_image_once(source, in_memory, kind):
    images = source if kind == "files" else in_memory
    loaders = [
        Loader(images, Sampler(300, 128, shuffle=False, drop_last=False, world=4, rank=rank), EVALUATION, threads=1)
        for rank in range(4)
    ]
    sizes, ids = [], []
    for loader in loaders:
        batches = list(loader)
        sizes.append([len(batch) for batch in batches])
        ids += torch.cat([batch.ids for batch in batches]).tolist()
        assert [batch.total for batch in batches] == [128, 128, 44]
        for batch in batches:
            assert {len(tensor) for tensor in _tensors(batch)} == {len(batch)}
            for row, image in zip(batch.ids.tolist(), batch.images.numpy(), strict=True):
                assert np.array_equal(image, _decode(source, row))
    assert sizes == [[32, 32, 32], [32, 32, 12], [32, 32, 0], [32, 32, 0]]
    assert sorted(ids) == list(range(300))


def test_all_ranks_together_see_the_same_step(source):
    whole = _loader(source, batch_size=32).next()
    samplers = [Sampler(300, 32, seed=7, world=2, rank=rank, accumulation=2) for rank in (0, 1)]
    loaders = [Loader(source, sampler, TRAINING, threads=1) for sampler in samplers]
    parts = [loader.next() for _ in range(2) for loader in loaders]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert torch.equal(torch.cat([part.ids[part.mix[1].partner] for part in parts]), whole.ids[whole.mix[1].partner])
    assert torch.equal(torch.cat([part.augmented[0] for part in parts]), whole.augmented[0])


def test_several_loaders_at_once_do_not_disturb_each_other(source, in_memory):
    makers = [
        lambda: _loader(source, batch_size=16),
        lambda: _loader(source, EVALUATION, 20),
        lambda: _loader(in_memory, replace(TRAINING, views=(ViewRun("autoaugment"),)), 16),
        lambda: _loader(in_memory, batch_size=24),
    ]
    alone = [[loader.next() for _ in range(4)] for loader in (make() for make in makers)]
    loaders = [make() for make in makers]
    together = list(zip(*([loader.next() for loader in loaders] for _ in range(4)), strict=True))
    for expected, found in zip(alone, together, strict=True):
        assert all(_equal(one, two) for one, two in zip(expected, found, strict=True))


def test_time_spent_waiting_is_counted(source):
    loader = _loader(source)
    started = time.perf_counter()
    for _ in range(3):
        loader.next()
    assert 0 < loader.wait_seconds <= time.perf_counter() - started


# ---------------------------------------------------------------------------------------------------- resume


RESUME_AT = [("files", 1), ("files", 5), ("files", 36), ("files", 37), ("files", 38), ("arrays", 5), ("arrays", 37)]


@pytest.mark.parametrize(("kind", "position"), [*RESUME_AT, ("autoaugment", 36)])
def test_resuming_is_bit_identical(source, in_memory, kind, position):
    """Anywhere, also at the last batch of an epoch (37 batches) and at the first of the next."""
    spec = replace(TRAINING, views=(ViewRun("autoaugment"),)) if kind == "autoaugment" else TRAINING
    images = in_memory if kind == "arrays" else source
    first = _loader(images, spec)
    first.seek(position - 1)
    first.next()
    state = first.state_dict()
    assert state["position"] == position
    expected = [first.next() for _ in range(4)]
    second = _loader(images, spec)
    second.next()
    second.load_state_dict(state)
    for batch in expected:
        assert _equal(second.next(), batch)


SAVED_RUN = """
import sys, hashlib, torch
from dalikd.pipelines.draw_spec import DrawSpec, MixRun, View, ViewRun
from dalikd.pipelines.loader import Loader
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.data import open_source

source = open_source("imagefolder", sys.argv[1], "train", split=".")
mixes = (MixRun("derangement", alpha=0.5), MixRun("derangement", 1, alpha=0.5))
spec = DrawSpec(View(32, "pad_crop"), 7, (ViewRun("crop_flip"),), mixes, mix_group=8)
loader = Loader(source, Sampler(len(source), 8, seed=7), spec, threads=2, prefetch=1)
loader.load_state_dict(torch.load(sys.argv[2], weights_only=True))
digest = hashlib.sha256()
for _ in range(5):
    batch = loader.next()
    tensors = (batch.images, *batch.augmented, batch.labels, batch.ids, *batch.mix[0][:3], *batch.mix[1][:3])
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
print(digest.hexdigest())
"""


def test_resuming_in_a_fresh_process_is_bit_identical(source, small_images, tmp_path):
    loader = _loader(source)
    loader.seek(33)
    loader.next()
    torch.save(loader.state_dict(), tmp_path / "state.pt")
    digest = hashlib.sha256()
    for _ in range(5):  # over the end of the epoch
        for tensor in _tensors(loader.next()):
            digest.update(tensor.contiguous().numpy().tobytes())
    arguments = [sys.executable, "-c", SAVED_RUN, str(small_images), str(tmp_path / "state.pt")]
    resumed = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert resumed.stdout.split()[-1] == digest.hexdigest()


def test_a_state_of_something_else_is_refused(source):
    state = _loader(source).state_dict()
    others = {
        "seed": Loader(source, Sampler(300, 8, seed=8), TRAINING, threads=1),
        "batch_size": _loader(source, batch_size=16),
        "fingerprint": _loader(source.limit(30)),
    }
    for key, loader in others.items():
        what = (
            r"with other images \(imagefolder, \.\): their fingerprint"
            if key == "fingerprint"
            else f"the data loader: {key}"
        )
        with pytest.raises(ValueError, match=f"cannot resume {what} was .*; resume with the same data"):
            loader.load_state_dict(state)
        assert loader.position == 0


def test_a_closed_loader_goes_on_where_it_stood(source):
    expected = [batch for batch, _ in zip(_loader(source), range(4), strict=False)]
    loader = _loader(source)
    found = []
    for _ in range(4):
        found.append(loader.next())
        loader.close()
        loader.close()
    assert all(_equal(one, two) for one, two in zip(expected, found, strict=True))


# -------------------------------------------------------------------------------------------------- bad files

SPOILERS: dict[str, Callable[[bytes], bytes]] = {
    "text": lambda _: b"This is not an image.\n" * 20,
    "empty": lambda _: b"",
    "header": lambda content: content[:100],
    "body": lambda content: content[: len(content) // 2],
}


def _spoil(path: Path, kind: str) -> None:
    path.write_bytes(SPOILERS[kind](path.read_bytes()))


def _run_to_the_end(loader: Loader) -> list[Batch]:
    return [loader.next() for _ in range(2 * len(loader))]


@pytest.mark.parametrize("kind", SPOILERS)
def test_a_bad_file_stops_the_run_and_is_named(copy_tree, kind):
    root = copy_tree()
    expected = _run_to_the_end(_loader(open_source("imagefolder", root, "train", split=".")))
    _spoil(root / "bee" / "003.jpg", kind)
    source = open_source("imagefolder", root, "train", split=".")
    loader = _loader(source)
    bad_at = next(index for index, batch in enumerate(expected) if 11 in batch.ids.tolist())
    for index in range(bad_at):
        assert _equal(loader.next(), expected[index])
    for _ in range(2):  # and again: the loader stands before the bad batch
        with pytest.raises(BadFileError, match=r"cannot decode .*/bee/003\.jpg \(.+\); repair or remove it") as stopped:
            loader.next()
        assert "\n" not in str(stopped.value)
        assert loader.position == bad_at
    assert loader.replaced == {}


def test_a_file_that_vanished_is_named(copy_tree):
    root = copy_tree()
    source = open_source("imagefolder", root, "train", split=".")
    (root / "cat" / "005.jpg").unlink()
    with pytest.raises(BadFileError, match=r"/cat/005\.jpg \(the file is missing\)"):
        _run_to_the_end(_loader(source))


def test_with_replace_only_the_bad_samples_change(copy_tree, capfd):
    root = copy_tree()
    clean = _run_to_the_end(_loader(open_source("imagefolder", root, "train", split=".")))
    spoiled = {3: "text", 11: "empty", 12: "header", 23: "body"}  # 11 and its substitute; the last row
    for row, kind in spoiled.items():
        _spoil(root / ("ant", "bee", "cat")[row // 8] / f"{row % 8:03d}.jpg", kind)
    loader = _loader(open_source("imagefolder", root, "train", split="."), bad_files="replace")
    healed = _run_to_the_end(loader)
    assert loader.replaced == {3: 4, 11: 13, 12: 13, 23: 0}
    expected = {row: loader.replaced.get(row, row) for row in range(24)}
    assert not any(np.isin(batch.ids, list(spoiled)).any() for batch in healed)
    changed = 0
    for one, two in zip(clean, healed, strict=True):
        assert two.ids.tolist() == [expected[row] for row in one.ids.tolist()]
        kept = one.ids == two.ids
        changed += int((~kept).sum())
        assert torch.equal(one.images[kept], two.images[kept])
        assert torch.equal(one.augmented[0][kept], two.augmented[0][kept])
        assert torch.equal(torch.from_numpy(loader.source.labels)[two.ids], two.labels)
        for draws, same in zip(one.mix, two.mix, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(draws[:3], same[:3], strict=True))
    assert changed == 2 * 4  # each in each epoch
    said = capfd.readouterr().out
    for row in spoiled:
        assert said.count(f"{loader.source.path(row)} (") == 1, said


def test_replaced_rows_are_part_of_the_state(copy_tree, tmp_path):
    root = copy_tree()
    _spoil(root / "bee" / "003.jpg", "text")
    source = open_source("imagefolder", root, "train", split=".")
    first = _loader(source, bad_files="replace")
    for _ in range(len(first)):
        first.next()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = _loader(source)  # "stop": it never meets the bad file again
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.replaced == {11: 12}
    for _ in range(len(first)):
        assert _equal(first.next(), second.next())


@pytest.mark.parametrize("bad_files", ["stop", "replace"])
def test_a_mended_file_is_no_other_data_and_a_changed_one_is(copy_tree, bad_files):
    root = copy_tree()
    path = root / "bee" / "003.jpg"
    content = path.read_bytes()
    _spoil(path, "text")
    loader = _loader(open_source("imagefolder", root, "train", split="."), bad_files=bad_files)
    with contextlib.suppress(BadFileError):
        _run_to_the_end(loader)
    for mend in (lambda: None, lambda: path.write_bytes(content), lambda: path.write_bytes(content + b"1")):
        mend()  # and once more: it is named by the state of the run that went on
        again = _loader(open_source("imagefolder", root, "train", split="."))
        again.load_state_dict(loader.state_dict())
        assert again.replaced == loader.replaced
        loader = again
    _spoil(root / "cat" / "003.jpg", "text")
    with pytest.raises(
        ValueError, match=r"fingerprint was \w{20}, now it is \w{20} \(the classes, or the images' names, "
    ):
        _loader(open_source("imagefolder", root, "train", split=".")).load_state_dict(loader.state_dict())


def test_a_header_that_asks_for_more_memory_than_there_is_names_its_file(copy_tree):
    root = copy_tree()
    png = io.BytesIO()
    Image.new("L", (8, 8)).save(png, "PNG")
    content = png.getvalue()
    header = b"IHDR" + struct.pack(">II", 2_000_000, 1_900_000) + content[24:29]
    content = content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]
    (root / "bee" / "003.jpg").write_bytes(content)
    loader = _loader(open_source("imagefolder", root, "train", split="."))
    with pytest.raises(BadFileError, match=r"bee/003.jpg \(its header gives 2,000,000 x 1,900,000 pixels"):
        _run_to_the_end(loader)


def test_when_nothing_can_be_decoded_replacing_ends(copy_tree):
    root = copy_tree()
    for path in root.glob("*/*.jpg"):
        _spoil(path, "text")
    loader = _loader(open_source("imagefolder", root, "train", split="."), bad_files="replace", bad_files_limit=24)
    with pytest.raises(BadFileError, match="no image of the data set can be decoded"):
        loader.next()


def test_more_replaced_files_than_allowed_stop_the_run(copy_tree):
    root = copy_tree()
    for row in range(0, 24, 4):
        _spoil(root / ("ant", "bee", "cat")[row // 8] / f"{row % 8:03d}.jpg", "text")
    source = open_source("imagefolder", root, "train", split=".")
    loader = _loader(source, bad_files="replace", bad_files_limit=5)
    message = (
        r"6 of 24 images cannot be decoded, more than --data.bad_files_limit 5 allows; the last ones are .*\d\.jpg: "
    )
    with pytest.raises(BadFileError, match=message):
        _run_to_the_end(loader)
    with pytest.raises(BadFileError, match=message):  # nor does a resumed run go on, where the limit stays
        _loader(source, bad_files_limit=5).load_state_dict(loader.state_dict())
    again = _loader(source, bad_files_limit=6)
    again.load_state_dict(loader.state_dict())
    _run_to_the_end(again)
    assert sorted(again.replaced) == list(range(0, 24, 4))


@pytest.mark.parametrize(("images", "limit"), [(24, 10), (50_000, 500), (1_281_167, 1000)])
def test_by_default_one_in_a_hundred_may_be_replaced(source, images, limit):
    many = replace(source, files=None, arrays=np.empty((images, 1, 1, 3), np.uint8), labels=np.zeros(images, np.int64))
    assert _loader(many)._limit == limit


def test_what_is_no_file_is_known_before_the_first_batch(copy_tree, capsys):
    """DALI would wait for a pipe for ever."""
    root = copy_tree()
    os.mkfifo(root / "bee" / "0pipe.jpg")
    (root / "bee" / "0pipe_link.jpg").symlink_to(root / "bee" / "0pipe.jpg")
    (root / "cat" / "gone.jpg").symlink_to(root / "nowhere")
    os.truncate(root / "cat" / "000.jpg", 9 * 178_000_000)
    source = open_source("imagefolder", root, "train", split=".")
    with pytest.raises(
        BadFileError, match=r"bee/0pipe.jpg \(the file cannot be read: it is a pipe, not a file\), .*; repair"
    ):
        _loader(source)
    loader = _loader(source, DrawSpec(View(32, "random_resized_crop"), 7), bad_files="replace")
    said = capsys.readouterr().out
    assert said.count("dalikd: cannot decode") == 1
    assert "bee/0pipe_link.jpg (the file cannot be read: it is a pipe" in said
    assert "cat/gone.jpg (the file is missing: it is a link to nothing)" in said
    assert "cat/000.jpg (the file cannot be read: its 1,602,000,000 bytes are more than" in said
    assert loader.replaced == {16: 19, 17: 19, 18: 19, 26: 0}
    _run_to_the_end(loader)


def test_a_batch_that_does_not_come_is_told(copy_tree, monkeypatch, capsys):
    """Here for a pipe that has taken the place of a file; its reader goes on once a writer has come and gone."""
    root = copy_tree()
    monkeypatch.setattr("dalikd.pipelines.loader._PATIENCE", 0.2)
    source = open_source("imagefolder", root, "train", split=".")
    pipe, empty = root / "bee" / "003.jpg", root / "empty"
    empty.touch()
    pipe.unlink()
    os.mkfifo(pipe)
    loader = Loader(source, Sampler(24, 24, seed=7), TRAINING, threads=1, bad_files="replace")
    told: list[str] = []

    def free() -> None:
        while not told or "has not come" not in told[-1]:
            told.append(capsys.readouterr().out)
            time.sleep(0.1)
        writer = os.open(pipe, os.O_WRONLY)
        empty.replace(pipe)
        os.close(writer)

    thread = threading.Thread(target=free)
    thread.start()
    batch = loader.next()
    thread.join()
    assert "dalikd: batch 0 has not come within 0.2 s; it holds " in told[-1]
    assert "bee/003.jpg cannot be read: it is a pipe, not a file" in told[-1]
    assert 11 not in batch.ids.tolist()
    assert loader.replaced == {11: 12}
    assert loader._waits is None
    loader.close()


def test_an_error_that_no_file_explains_is_passed_on(copy_tree, monkeypatch):
    root = copy_tree()
    _spoil(root / "bee" / "003.jpg", "text")
    monkeypatch.setattr("dalikd.pipelines.loader.find_bad_files", lambda *_, **__: [])
    with pytest.raises(
        BadFileError, match=r"DALI fails on the batch that .*; DALI says: nvImageCodec failure"
    ) as stopped:
        _run_to_the_end(_loader(open_source("imagefolder", root, "train", split="."), bad_files="replace"))
    assert "\n" not in str(stopped.value)


def test_what_dali_must_not_be_asked_about_is_named_and_replaced(copy_tree, crashing_jpeg2000, crashing_tiff, capfd):
    """DALI decodes the first two, to wrong pixels; damaged JPEG 2000 and TIFF end the process that decodes them."""
    root = copy_tree()
    photo = Image.open(root / "ant" / "000.jpg").copy()
    photo.save(root / "ant" / "001.jpg", "TIFF", tiffinfo={274: 6})
    (root / "bee" / "001.jpg").write_bytes(b"P6\n32 32\n15\n" + bytes(32 * 32 * 3))
    (root / "bee" / "005.jpg").write_bytes(crashing_jpeg2000)
    (root / "bee" / "006.jpg").write_bytes(crashing_tiff)
    photo.save(root / "cat" / "005.jpg", "JPEG2000")
    photo.save(root / "cat" / "006.jpg", "PNG", icc_profile=bytes(3_000_000))  # well, though Pillow refuses it
    photo.save(root / "cat" / "007.jpg", "TIFF")
    loader = _loader(open_source("imagefolder", root, "train", split="."), bad_files="replace")
    _run_to_the_end(loader)
    assert loader.replaced == {1: 2, 9: 10, 13: 15, 14: 15}
    said = capfd.readouterr().out
    assert all(
        said.count(words) == count
        for words, count in {"orientation tag (6)": 1, "highest value is 15": 1, "JPEG 2000": 1, "TIFF ends": 1}.items()
    )


@pytest.mark.parametrize("crop", ["pad_crop", "random_resized_crop"])
def test_jpeg_2000_is_read_whatever_its_name(copy_tree, crop):
    """Its pixels are those of the same images in other files, in every batch, from any position on."""
    root, spec = copy_tree(), DrawSpec(View(32, crop), 7)
    pixels = {path: Image.open(path).copy() for path in sorted(root.glob("*/*.jpg"))}
    for path, image in pixels.items():
        image.save(path, "PNG")
    expected = _run_to_the_end(_loader(open_source("imagefolder", root, "train", split="."), spec))
    for number, (path, image) in enumerate(pixels.items()):
        if number % 3:
            image.save(path, "JPEG2000", no_jp2=number % 3 == 1)
    source = open_source("imagefolder", root, "train", split=".")
    loader = _loader(source, spec)
    assert all(_equal(one, two) for one, two in zip(_run_to_the_end(loader), expected, strict=True))
    loader.seek(2)
    assert _equal(loader.next(), expected[2])


def test_an_image_of_other_sides_than_before_is_cut_as_it_is_now(copy_tree):
    """The windows are placed before its header is read again."""
    root, spec = copy_tree(), DrawSpec(View(32, "random_resized_crop"), 7)
    loader = _loader(open_source("imagefolder", root, "train", split="."), spec)
    for name, size in (("ant/003.jpg", (20, 90)), ("bee/003.jpg", (64, 33))):
        Image.open(root / name).resize(size).save(root / name)
    expected = _run_to_the_end(_loader(open_source("imagefolder", root, "train", split="."), spec))
    assert all(_equal(one, two) for one, two in zip(_run_to_the_end(loader), expected, strict=True))


@pytest.mark.parametrize("crop", ["pad_crop", "random_resized_crop"])
def test_cmyk_without_app14_is_what_pillow_sees(copy_tree, crop):
    root = copy_tree()
    path = root / "bee" / "003.jpg"
    other = open_source("imagefolder", root, "train", split=".")
    before = _run_to_the_end(_loader(other, DrawSpec(View(32, crop), 7)))
    Image.open(path).convert("CMYK").save(path, "JPEG", quality=95)
    encoded = path.read_bytes()
    place = encoded.index(b"\xff\xee\0\x0eAdobe")
    path.write_bytes(encoded[:place] + encoded[place + 16 :])
    after = _run_to_the_end(_loader(open_source("imagefolder", root, "train", split="."), DrawSpec(View(32, crop), 7)))
    for one, two in zip(before, after, strict=True):
        own = one.ids == 11
        assert torch.equal(one.ids, two.ids)
        assert torch.equal(one.images[~own], two.images[~own])
        if own.any():  # it was black
            assert (one.images[own].float() - two.images[own].float()).abs().mean() < 12


def test_a_name_that_is_no_utf8_is_printed(copy_tree, capfdbinary):
    root = copy_tree()
    (root / "bee" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"")
    loader = _loader(open_source("imagefolder", root, "train", split="."), bad_files="replace")
    _run_to_the_end(loader)
    assert loader.replaced == {16: 17}
    assert rb"bee/caf\xe9.jpg (the file is empty)" in capfdbinary.readouterr().out


# ------------------------------------------------------------------------------------------------------ speed


@pytest.mark.slow
@pytest.mark.parametrize("crop", ["pad_crop", "random_resized_crop"])
def test_the_python_side_costs_at_most_20_microseconds_a_sample(source, crop):
    """Rows, draws and paths of a batch of 256: about half of that on a quiet machine, where DALI decodes a photo in
    1700 microseconds."""
    view = View(224 if crop == "random_resized_crop" else 32, crop)
    spec = DrawSpec(view, 7, (ViewRun("crop_flip"),), (MixRun("derangement"),))
    loader = _loader(source, spec, 256)
    backend = loader._backend
    assert isinstance(backend, DaliBackend)
    backend.feed(0)  # orders are made
    times = []
    for position in range(30):
        started = time.thread_time()
        backend.feed(position)  # in a thread of its own, as a rule
        times.append(time.thread_time() - started)
    cost = float(np.median(times)) / 256 * 1e6
    print(f"{crop}: {cost:.1f} us a sample")
    assert cost < 20


# --------------------------------------------------------------------------------------------- what goes along


def test_attached_arrays_travel_with_their_rows(source):
    loader = _loader(source, attach=lambda plan: {"twice": 2 * plan.rows, "place": np.full((len(plan.rows), 3), 7)})
    for _ in range(3):
        batch = loader.next()
        assert torch.equal(batch.extras["twice"], 2 * batch.ids)
        assert batch.extras["place"].shape == (8, 3)
    assert _loader(source).next().extras == {}


def test_attached_arrays_of_a_short_batch_are_short(source):
    sampler = Sampler(len(source), 64, shuffle=False, drop_last=False, world=2, rank=1)
    loader = Loader(source, sampler, EVALUATION, threads=1, attach=lambda plan: {"rows": plan.rows})
    sizes = [len(batch.extras["rows"]) for batch in loader]
    assert sizes == [32, 32, 32, 32, 12]


# ---------------------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize(
    ("cores", "processes", "threads"), [(192, "8", 16), (64, "8", 8), (4, "8", 1), (192, None, 16), (6, None, 6)]
)
def test_a_machines_processes_share_its_cores(source, monkeypatch, cores, processes, threads):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    backend = Loader(source, Sampler(len(source), 8), EVALUATION)._backend
    assert isinstance(backend, DaliBackend)
    assert backend._options.threads == threads
