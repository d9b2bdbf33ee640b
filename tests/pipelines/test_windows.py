from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as v2

from dalikd.pipelines.data import open_source
from dalikd.pipelines.draw_spec import DrawSpec, View, ViewRun
from dalikd.pipelines.loader import Loader
from dalikd.pipelines.resident import crop_and_flip
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.sources import Source

VIEW = View(64, "random_resized_crop", padding=8)


@pytest.fixture(scope="module")
def source(photos: Path) -> Source:
    return open_source("imagefolder", photos, "train", split=".")


def _loader(source: Source, spec: DrawSpec, batch_size: int = 12, **options) -> Loader:
    return Loader(source, Sampler(len(source), batch_size, seed=5), spec, threads=2, **options)


def _window(height: int, width: int, tries: np.ndarray, offsets: np.ndarray) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop.get_params for given draws: top, left, height, width."""
    for area, ratio in tries:
        w = int(np.floor(np.sqrt(area * height * width * ratio) + 0.5))
        h = int(np.floor(np.sqrt(area * height * width / ratio) + 0.5))
        if 0 < w <= width and 0 < h <= height:
            return int(offsets[0] * (height - h + 1)), int(offsets[1] * (width - w + 1)), h, w
    raise AssertionError("no try fits these photos")


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_view_is_torchvisions_resized_crop_exactly(source, interpolation):
    loader = _loader(source, DrawSpec(replace(VIEW, interpolation=interpolation), 5))
    for index in range(3):
        batch, draws = loader.next(), loader._backend.plan(index).draws.views
        flips = 0
        for place, row in enumerate(batch.ids.tolist()):
            image = torch.from_numpy(np.array(Image.open(source.path(row)).convert("RGB"))).permute(2, 0, 1)
            window = _window(*image.shape[1:], draws["tries"][place], draws["offsets"][place])
            expected = v2.resized_crop(image, *window, [64, 64], InterpolationMode(interpolation), antialias=True)
            if draws["flip"][place]:
                expected, flips = expected.flip(2), flips + 1
            assert torch.equal(batch.images[place], expected.permute(1, 2, 0)), (row, window)
        assert 0 < flips < len(batch)


@pytest.mark.parametrize("augmented", ["flip", "crop_flip", "autoaugment", "randaugment", "trivialaugment"])
def test_every_augmentation_has_the_same_base_view(source, augmented):
    plain, other = (_loader(source, DrawSpec(VIEW, 5, views)) for views in ((), (ViewRun(augmented),)))
    for _ in range(3):
        one, two = plain.next(), other.next()
        assert torch.equal(one.images, two.images)
        (view,) = two.augmented
        assert view.shape == two.images.shape
        assert not torch.equal(view, two.images)


@pytest.mark.parametrize("augmented", ["flip", "crop_flip", "autoaugment"])
def test_augmented_views_are_those_of_the_same_images_in_memory(source, augmented):
    """The base views, stored as arrays, through the engines for arrays: the same draws make the same pixels."""
    loader = _loader(source, DrawSpec(VIEW, 5, (ViewRun(augmented),)))
    for index in range(3):
        batch, draws = loader.next(), loader._backend.plan(index).draws.views
        if augmented == "autoaugment":
            expected = _through_dali(batch.images.numpy(), draws)
        else:
            crop = torch.from_numpy(draws.get("augmented_crop0", np.zeros((len(batch), 2), np.int32)))
            padding = VIEW.padding if augmented == "crop_flip" else 0
            flip = torch.from_numpy(draws["augmented_flip0"])
            expected = crop_and_flip(batch.images, torch.arange(len(batch)), crop, flip, padding, "zero")
        assert torch.equal(batch.augmented[0], expected)


def test_each_view_is_what_a_loader_with_that_view_alone_brings(source):
    runs = (ViewRun("trivialaugment"), ViewRun("flip"), ViewRun("randaugment", 1, ops=1), ViewRun("crop_flip"))
    batch = _loader(source, DrawSpec(VIEW, 5, runs)).next()
    assert len(batch.augmented) == 4
    for run, view in zip(runs, batch.augmented, strict=True):
        alone = _loader(source, DrawSpec(VIEW, 5, (run,))).next()
        assert torch.equal(batch.images, alone.images)
        assert torch.equal(view, alone.augmented[0]), run


def _through_dali(images: np.ndarray, draws: dict[str, np.ndarray]) -> torch.Tensor:
    from dalikd.pipelines.graphs import build_graph

    names = ("operation0", "magnitude0", "sign0")
    inputs = (list(images), *(np.ascontiguousarray(draws[name]) for name in names))
    view = View(VIEW.size, "square")
    graph = build_graph(
        lambda _: inputs,
        view,
        (ViewRun("autoaugment"),),
        reader="arrays",
        batch_size=len(images),
        threads=1,
        device_id=None,
    )
    base, augmented = (torch.from_dlpack(output.as_tensor()).clone() for output in graph.run())
    assert torch.equal(base, torch.from_numpy(images))
    return augmented


@pytest.mark.parametrize("augmented", ["none", "autoaugment"])
def test_a_sample_does_not_depend_on_its_batch_or_on_threads(source, augmented):
    spec = DrawSpec(VIEW, 5, () if augmented == "none" else (ViewRun(augmented),))
    found = {}
    for batch_size, threads in ((12, 1), (4, 3)):
        loader = Loader(source, Sampler(len(source), batch_size, seed=5), spec, threads=threads)
        batches = [loader.next() for _ in range(12 // batch_size)]
        views = [batch.images if augmented == "none" else batch.augmented[0] for batch in batches]
        found[batch_size] = torch.cat(views)
    assert torch.equal(found[12], found[4])


def test_resuming_and_closing_change_nothing(source):
    spec = DrawSpec(VIEW, 5, (ViewRun("flip"), ViewRun("trivialaugment")))
    straight = _loader(source, spec, 6)
    expected = [straight.next() for _ in range(4)]
    other = _loader(source, spec, 6)
    other.next()
    other.close()  # frees both pipelines; the position stays
    for one in expected[1:]:
        two = other.next()
        assert torch.equal(one.images, two.images)
        assert all(map(torch.equal, one.augmented, two.augmented))
    held = [[view.clone() for view in one.augmented] for one in expected]
    straight.next()
    assert all(all(map(torch.equal, one.augmented, two)) for one, two in zip(expected, held, strict=True))
