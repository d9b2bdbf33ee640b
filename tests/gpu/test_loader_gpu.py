import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dalikd.pipelines.backends import can_gather
from dalikd.pipelines.data import open_source
from dalikd.pipelines.draw_spec import Batch, DrawSpec, MixRun, View, ViewRun
from dalikd.pipelines.loader import Loader, decode_source
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.sources import Source

pytestmark = pytest.mark.gpu

VIEWS = (ViewRun("crop_flip"),)
MIXES = (MixRun("derangement", alpha=0.5), MixRun("derangement", 1, alpha=0.5))
TRAINING = DrawSpec(View(32, "pad_crop"), 7, VIEWS, MIXES, mix_group=8)
PHOTOS = DrawSpec(View(224, "random_resized_crop", padding=28), 7, VIEWS, (MixRun("derangement"),), mix_group=12)


@pytest.fixture(scope="module")
def photo_source(photos: Path) -> Source:
    return open_source("imagefolder", photos, "train", split=".")


@pytest.fixture(scope="module")
def small_source(small_images: Path) -> Source:
    return open_source("imagefolder", small_images, "train", split=".")


@pytest.fixture(scope="module")
def in_memory(small_source: Source) -> Source:
    paths = [small_source.path(row) for row in range(len(small_source))]
    images = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    return replace(small_source, files=None, arrays=np.stack(images))


@pytest.fixture
def no_sync() -> Iterator[Callable[[], None]]:
    """Call it to make every synchronising torch call an error for the rest of the test."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def _loader(source: Source, spec: DrawSpec, batch_size: int, device: str = "cuda", **options: Any) -> Loader:
    """One decoder for all images, unless the options say otherwise: a batch that two share has other pixels."""
    if not can_gather(source, spec, options.get("resident")):
        pytest.importorskip("nvidia.dali")
    options = {"hw_decoder_load": 0.0, **options}
    return Loader(source, Sampler(len(source), batch_size, seed=7), spec, device=device, threads=2, **options)


def _tensors(batch: Batch) -> list[Tensor]:
    mix = [tensor for draws in batch.mix for tensor in draws if tensor is not None]
    return [batch.images, *batch.augmented, batch.labels, batch.ids, *mix]


def _mean_differences(one: Tensor, two: Tensor) -> Tensor:
    """Mean absolute difference of each image, in grey levels, on the CPU."""
    return (one.cpu().float() - two.cpu().float()).abs().mean((1, 2, 3))


# ------------------------------------------------------------------------------------------------- same pixels


@pytest.mark.parametrize("load", [0.0, 1.0])
@pytest.mark.parametrize(
    "view",
    [
        View(224, "random_resized_crop"),
        View(224, "center_crop", resize=256),
        View(64, "center_crop", resize=64),
        View(64, "pad_crop", padding=8, border="reflect"),
    ],
    ids=lambda view: f"{view.crop}-{view.size}",
)
def test_mixed_decode_shows_what_the_cpu_shows(photo_source, view, load):
    """The same rows and windows; the decoders may round and interpolate chroma otherwise, which shows most in a small
    window that is enlarged."""
    spec = replace(PHOTOS, view=view)
    on_cpu, on_gpu = (_loader(photo_source, spec, 12, device, hw_decoder_load=load) for device in ("cpu", "cuda"))
    for _ in range(3):
        one, two = on_cpu.next(), on_gpu.next()
        assert all(tensor.device.type == "cuda" for tensor in _tensors(two))
        assert all(torch.equal(a, b.cpu()) for a, b in zip(_tensors(one)[2:], _tensors(two)[2:], strict=True))
        for ours, theirs in ((one.images, two.images), (one.augmented[0], two.augmented[0])):
            differences = _mean_differences(ours, theirs)
            assert differences.mean() < 2
            assert differences.max() < 8  # another image or window differs by dozens


@pytest.mark.parametrize("load", [0.0, 1.0])
def test_a_image_does_not_depend_on_its_batch(photo_source, load):
    spec = replace(PHOTOS, mixes=())
    few, many = (_loader(photo_source, spec, size, hw_decoder_load=load).next() for size in (5, 12))
    assert torch.equal(few.ids, many.ids[:5])
    assert torch.equal(few.images, many.images[:5])


@pytest.mark.parametrize("kind", ["autoaugment", "randaugment", "trivialaugment"])
def test_a_policy_on_the_gpu_is_that_of_the_cpu(in_memory, kind):
    """From the same pixels. One level of rounding can become many where a later step equalises or solarises, so the
    bound is on the average over the images."""
    spec = replace(TRAINING, views=(ViewRun(kind),))
    on_cpu, on_gpu = (_loader(in_memory, spec, 256, device) for device in ("cpu", "cuda"))
    one, two = on_cpu.next(), on_gpu.next()
    assert torch.equal(one.images, two.images.cpu())
    assert _mean_differences(one.augmented[0], two.augmented[0]).mean() < 2


@pytest.mark.parametrize("buffers", [0, 2])
@pytest.mark.parametrize("kind", ["photos", "resident"])
def test_each_view_is_what_a_loader_with_that_view_alone_brings(photo_source, in_memory, kind, buffers):
    """One decode and one base view for all; in fixed buffers, too, no view lies over another."""
    source, spec, size = (photo_source, PHOTOS, 12) if kind == "photos" else (in_memory, TRAINING, 24)
    runs = (ViewRun("flip"), ViewRun("crop_flip"), ViewRun("flip", 1))
    runs += (ViewRun("trivialaugment"), ViewRun("randaugment")) if kind == "photos" else ()
    together = _loader(source, replace(spec, views=runs), size, buffers=buffers)
    alone = [_loader(source, replace(spec, views=(run,)), size, buffers=buffers) for run in runs]
    for _ in range(3):
        batch = together.next()
        assert len(batch.augmented) == len(runs)
        for view, loader in zip(batch.augmented, alone, strict=True):
            other = loader.next()
            assert torch.equal(batch.images, other.images)
            assert torch.equal(view, other.augmented[0])


def test_all_kinds_of_draws_arrive_on_the_gpu(in_memory):
    mixes = (MixRun("permutation"), MixRun("first", 1, cells=5, layers=3), MixRun(run=2, box=True))
    on_cpu, on_gpu = (_loader(in_memory, replace(TRAINING, mixes=mixes), 24, device) for device in ("cpu", "cuda"))
    for _ in range(3):
        for one, two in zip(on_cpu.next().mix, on_gpu.next().mix, strict=True):
            for name in one._fields:
                expected, found = getattr(one, name), getattr(two, name)
                assert (expected is None) == (found is None), name
                assert expected is None or torch.equal(expected, found.cpu()), name


@pytest.mark.parametrize("border", ["zero", "reflect"])
@pytest.mark.parametrize("views", [(), ("flip",), ("crop_flip",), ("flip", "crop_flip")])
def test_the_gather_on_the_gpu_equals_the_cpu(in_memory, views, border):
    spec = replace(TRAINING, view=View(32, "pad_crop", border=border), views=tuple(map(ViewRun, views)))
    on_cpu, on_gpu = (_loader(in_memory, spec, 64, device) for device in ("cpu", "cuda"))
    for _ in range(3):
        one, two = _tensors(on_cpu.next()), _tensors(on_gpu.next())
        assert all(b.device.type == "cuda" for b in two)
        assert all(torch.equal(a, b.cpu()) for a, b in zip(one, two, strict=True))


def test_resuming_under_mixed_decode_is_bit_identical(photo_source):
    first = _loader(photo_source, PHOTOS, 12)
    for _ in range(2):
        first.next()
    state = first.state_dict()
    second = _loader(photo_source, PHOTOS, 12)
    second.load_state_dict(state)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(_tensors(first.next()), _tensors(second.next()), strict=True))


# --------------------------------------------------------------------------------------------------- bad files

BAD_HEADERS = """
import sys
from dalikd.pipelines.draw_spec import DrawSpec, View
from dalikd.pipelines.loader import BadFileError, Loader
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.data import open_source

source = open_source("imagefolder", sys.argv[1], "train", split=".")
view = View(32, sys.argv[2], resize=32)
loader = Loader(source, Sampler(len(source), 4), DrawSpec(view), device="cuda", threads=2)
refused = []
for position in range(len(loader)):
    loader.seek(position)
    try:
        loader.next()
    except BadFileError as error:
        assert "cannot decode " in str(error), error
        refused += [path for path in map(source.path, range(len(source))) if path in str(error)]
print("refused", *sorted(refused))
"""


@pytest.mark.usefixtures("needs_dali")
@pytest.mark.parametrize("crop", ["random_resized_crop", "pad_crop", "center_crop"])
def test_bad_files_are_named_and_never_crash_the_process(small_images, tmp_path, crop):
    """No image, an empty file, half a header, and a scan that is cut short, which a decoder may fill up with grey."""

    def cut(content: bytes) -> bytes:
        scan = content.index(b"\xff\xda")
        return content[: scan + (len(content) - scan) // 2]

    spoilers = {
        1: lambda _: b"This is not an image.\n" * 20,
        4: lambda _: b"",
        9: lambda content: content[:100],
        14: cut,
    }
    bad = []
    for number, path in enumerate(sorted(small_images.glob("*/00[0-7].jpg"))):
        target = tmp_path / path.parent.name / path.name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(spoilers[number](path.read_bytes()) if number in spoilers else path.read_bytes())
        bad += [str(target)] if number in spoilers else []
    command = [sys.executable, "-c", BAD_HEADERS, str(tmp_path), crop]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.splitlines()[-1].split()[1:] == bad


def test_with_replace_the_run_goes_on(small_images, tmp_path):
    for path in sorted(small_images.glob("*/00[0-7].jpg")):
        target = tmp_path / path.parent.name / path.name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    clean = _loader(open_source("imagefolder", tmp_path, "train", split="."), TRAINING, 8)
    expected = [clean.next() for _ in range(3)]
    (tmp_path / "bee" / "003.jpg").write_bytes(b"This is not an image.\n" * 20)
    healed = _loader(open_source("imagefolder", tmp_path, "train", split="."), TRAINING, 8, bad_files="replace")
    for one in expected:
        two = healed.next()
        kept = one.ids == two.ids
        assert torch.equal(one.images[kept], two.images[kept])
    assert healed.replaced == {11: 12}


# ------------------------------------------------------------------------------------------------- the stream


def _checksum(images: Tensor) -> Tensor:
    """A number that depends on every byte and its place; computed on the device, not read."""
    flat = images.reshape(-1).long()
    return (flat * (torch.arange(len(flat), device=flat.device) % 8191 + 1)).sum()


def _checksums(
    source: Source, batches: int, busy: Callable[[], None], after: Callable[[], None], buffers: int = 0
) -> list[int]:
    loader = _loader(source, PHOTOS, 48, buffers=buffers)
    sums = []
    for _ in range(batches):
        busy()
        batch = loader.next()
        sums.append(_checksum(batch.images) + sum(map(_checksum, batch.augmented)))
        del batch
        after()
    loader.close()
    return torch.stack(sums).tolist()


@pytest.mark.parametrize("buffers", [0, 2])
def test_batches_under_load_are_whole(photo_source, buffers):
    """Canary for torn batches: the host runs far ahead of a busy stream and drops each batch at once, so that a buffer
    given back or filled again too early would be overwritten before it is read."""
    assert photo_source.files is not None
    rows = np.tile(np.arange(len(photo_source)), 20)
    source = replace(photo_source, files=photo_source.files.take(rows), labels=photo_source.labels[rows])
    matrix = torch.randn(4096, 4096, device="cuda")

    def load() -> None:
        for _ in range(40):  # some 100 ms of work, many times what a batch takes
            torch.mm(matrix, matrix)

    def nothing() -> None:
        pass

    quiet = _checksums(source, 20, nothing, torch.cuda.synchronize)
    assert quiet == _checksums(source, 20, nothing, torch.cuda.synchronize), "decoding itself is not reproducible"
    assert len(set(quiet)) == 20
    assert quiet == _checksums(source, 20, load, nothing, buffers)


def test_fixed_buffers_are_used_in_turn(photo_source):
    owned, fixed = _loader(photo_source, PHOTOS, 12), _loader(photo_source, PHOTOS, 12, buffers=2)
    places = []
    for _ in range(6):
        one, two = owned.next(), fixed.next()
        assert all(torch.equal(a, b) for a, b in zip(_tensors(one), _tensors(two), strict=True))
        places.append([tensor.data_ptr() for tensor in _tensors(two)])
    assert places[0] == places[2] == places[4]
    assert places[1] == places[3] == places[5]
    assert places[0] != places[1]


@pytest.mark.usefixtures("needs_dali")
@pytest.mark.parametrize("load", [0.0, 1.0])
@pytest.mark.parametrize("size", [32, 24])
def test_resident_images_are_those_of_the_files(small_source, size, load):
    """Decoded in other batches, by the same decoder."""
    spec = replace(TRAINING, view=View(size, "pad_crop"))
    resident = decode_source(small_source, spec.view, device=torch.device("cuda"), threads=2, hw_decoder_load=load)
    assert resident.pixels.device.type == "cuda"
    from_files = _loader(small_source, spec, 32, hw_decoder_load=load)
    gathered = _loader(small_source, spec, 32, resident=resident)
    for _ in range(3):
        one, two = _tensors(from_files.next()), _tensors(gathered.next())
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("kind", ["photos", "arrays"])
def test_the_second_gpu_gets_the_same_batches(photo_source, in_memory, kind):
    """While the first one is torch's current device."""
    source, spec, size = (photo_source, PHOTOS, 12) if kind == "photos" else (in_memory, TRAINING, 24)
    first, second = (_loader(source, spec, size, device, buffers=2) for device in ("cuda:0", "cuda:1"))
    for _ in range(4):
        one, two = _tensors(first.next()), _tensors(second.next())
        assert {tensor.device.index for tensor in two} == {1}
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(one, two, strict=True))


def test_batches_on_another_stream_are_whole(photo_source):
    """A loader that is used under a side stream follows that stream."""
    expected = _loader(photo_source, PHOTOS, 12)
    sums = [_checksum(expected.next().images).item() for _ in range(4)]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        loader = _loader(photo_source, PHOTOS, 12)
        found = torch.stack([_checksum(loader.next().images) for _ in range(4)])
    side.synchronize()
    assert found.tolist() == sums


@pytest.mark.parametrize("buffers", [0, 3])
@pytest.mark.parametrize("kind", ["files", "gather", "arrays through dali"])
def test_the_next_batch_does_not_synchronise(small_source, in_memory, no_sync, kind, buffers):
    spec = replace(TRAINING, views=(ViewRun("autoaugment"),)) if kind == "arrays through dali" else TRAINING
    loader = _loader(small_source if kind == "files" else in_memory, spec, 32, buffers=buffers)
    for _ in range(4):
        loader.next()  # warm-up: graphs, pinned buffers and the allocator's first blocks
    torch.cuda.synchronize()
    no_sync()
    for _ in range(8):  # over the end of an epoch
        batch = loader.next()
        assert batch.pixels.shape == (32, 3, 32, 32)
