import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dalikd.pipelines.backends import Context, DaliBackend, DaliOptions, DeviceTransfer, GatherBackend, can_gather
from dalikd.pipelines.data import open_source
from dalikd.pipelines.doctor import Decoder
from dalikd.pipelines.draw_spec import AugmentedView, Batch, DrawSpec, View, ViewRun
from dalikd.pipelines.loader import Loader
from dalikd.pipelines.resident import Resident, ResidentViews, crop_and_flip
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.sources import Source


@pytest.fixture(scope="module")
def on_disk(small_images: Path) -> Source:
    return open_source("imagefolder", small_images, "train", split=".")


@pytest.fixture(scope="module")
def in_memory(on_disk: Source) -> Source:
    images = [np.asarray(Image.open(on_disk.path(row)).convert("RGB")) for row in range(len(on_disk))]
    return replace(on_disk, files=None, arrays=np.stack(images))


def _runs(*kinds: AugmentedView) -> tuple[ViewRun, ...]:
    return tuple(ViewRun(kind, run) for run, kind in enumerate(kinds))


def _batches(source: Source, spec: DrawSpec, backend: type[DaliBackend] | type[GatherBackend]) -> list[Batch]:
    loader = Loader(source, Sampler(len(source), 50, seed=4), spec, threads=1)
    if backend is DaliBackend:
        cpu = torch.device("cpu")
        context = Context(source, loader.sampler, spec, cpu, DeviceTransfer(cpu), Decoder)
        loader._backend = DaliBackend(context, DaliOptions(1))
    assert type(loader._backend) is backend
    batches = [loader.next() for _ in range(3)]
    loader.close()
    return batches


@pytest.mark.parametrize("border", ["zero", "reflect"])
@pytest.mark.parametrize("views", [(), ("flip",), ("crop_flip",), ("crop_flip", "flip", "crop_flip")])
@pytest.mark.parametrize("crop", ["pad_crop", "center_crop"])
def test_the_gather_is_bit_equal_to_the_graph(on_disk, in_memory, crop, views, border):
    spec = DrawSpec(View(32, crop, resize=32, padding=5, border=border), 4, _runs(*views))
    gathered = _batches(in_memory, spec, GatherBackend)
    for other in (_batches(in_memory, spec, DaliBackend), _batches(on_disk, spec, DaliBackend)):
        for one, two in zip(gathered, other, strict=True):
            assert torch.equal(one.ids, two.ids)
            assert torch.equal(one.images, two.images)
            assert len(one.augmented) == len(two.augmented) == len(views)
            assert all(map(torch.equal, one.augmented, two.augmented))
            shown = [one.images, *one.augmented]
            assert not any(torch.equal(a, b) for a, b in itertools.combinations(shown, 2))


def test_what_has_to_be_resized_or_warped_goes_through_dali(in_memory):
    plain = View(32, "center_crop", resize=32)
    assert can_gather(in_memory, DrawSpec(plain))
    for view in (replace(plain, resize=36), View(28, "pad_crop"), View(32, "random_resized_crop")):
        assert not can_gather(in_memory, DrawSpec(view)), view
    assert can_gather(in_memory, DrawSpec(plain, views=_runs("flip", "crop_flip")))
    for policy in ("autoaugment", "randaugment", "trivialaugment"):
        assert not can_gather(in_memory, DrawSpec(plain, views=_runs("flip", policy)))


def test_a_resized_evaluation_of_arrays_is_that_of_the_files(on_disk, in_memory):
    """Arrays have their size, but the view enlarges before it crops."""
    spec = DrawSpec(View(32, "center_crop", resize=36), 4)
    for one, two in zip(_batches(in_memory, spec, DaliBackend), _batches(on_disk, spec, DaliBackend), strict=True):
        assert torch.equal(one.images, two.images)


@pytest.mark.parametrize(("border", "mode"), [("zero", "constant"), ("reflect", "reflect")])
def test_crop_and_flip_is_padding_cutting_and_mirroring(border, mode):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8))
    rows = torch.tensor([5, 0, 0, 3])
    crop = torch.tensor([[0, 0], [6, 6], [3, 3], [1, 5]])
    flip = torch.tensor([0, 1, 0, 1])
    found = crop_and_flip(images, rows, crop, flip, 3, border).numpy()
    padded = np.pad(images.numpy(), ((0, 0), (3, 3), (3, 3), (0, 0)), mode=mode)
    for result, row, (y, x), mirror in zip(found, rows.tolist(), crop.tolist(), flip.tolist(), strict=True):
        expected = padded[row, y : y + 8, x : x + 8]
        assert np.array_equal(result, expected[:, ::-1] if mirror else expected)


def test_views_own_their_pixels():
    """Writing into a batch leaves the data set as it was."""
    arrays = np.full((4, 8, 8, 3), 7, np.uint8)
    views = ResidentViews(Resident.from_arrays(arrays, torch.device("cpu")))
    images, augmented = views(torch.tensor([1, 2]), {})
    assert augmented == ()
    images.zero_()
    assert (views(torch.tensor([1, 2]), {})[0] == 7).all()
