from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dalikd.pipelines import resident as resident_module
from dalikd.pipelines.backends import DaliBackend, GatherBackend
from dalikd.pipelines.data import open_source
from dalikd.pipelines.draw_spec import DrawSpec, MixRun, View, ViewRun
from dalikd.pipelines.loader import BadFileError, Loader, can_be_resident, decode_source
from dalikd.pipelines.resident import Resident
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.sources import Source

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(small_images: Path) -> Source:
    return open_source("imagefolder", small_images, "train", split=".")


def _loader(source: Source, spec: DrawSpec, **options) -> Loader:
    return Loader(source, Sampler(len(source), 48, seed=3), spec, threads=1, **options)


@pytest.mark.parametrize("size", [32, 24])  # as stored, and resized
@pytest.mark.parametrize(
    ("crop", "views"), [("pad_crop", ()), ("pad_crop", (ViewRun("crop_flip"), ViewRun("flip"))), ("center_crop", ())]
)
def test_resident_batches_are_those_of_the_files(source, size, crop, views):
    view = View(size, crop, resize=size, padding=3)
    spec = DrawSpec(view, 3, views, (MixRun("derangement"),), mix_group=16)
    from_files = _loader(source, spec)
    resident = _loader(source, spec, resident=decode_source(source, view, device=CPU, threads=1))
    assert isinstance(from_files._backend, DaliBackend)
    assert isinstance(resident._backend, GatherBackend)
    for _ in range(8):  # across the end of the epoch
        one, two = from_files.next(), resident.next()
        assert torch.equal(one.ids, two.ids)
        assert torch.equal(one.labels, two.labels)
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.mix[0].partner, two.mix[0].partner)
        assert len(one.augmented) == len(two.augmented) == len(views)
        assert all(map(torch.equal, one.augmented, two.augmented))
    assert resident.state_dict() == from_files.state_dict()  # a run may be resumed either way


def test_what_dali_alone_can_augment_is_read_from_the_files(source):
    view = View(32, "pad_crop")
    resident = decode_source(source, view, device=CPU, threads=1)
    spec = DrawSpec(view, views=(ViewRun("flip"), ViewRun("autoaugment")))
    assert isinstance(_loader(source, spec, resident=resident)._backend, DaliBackend)


def test_views_that_cut_windows_are_refused(source):
    assert not can_be_resident(View(32, "center_crop", resize=36))
    with pytest.raises(ValueError, match=r"--data.resident true .* --data.crop pad_crop"):
        decode_source(source, View(32, "random_resized_crop"), device=CPU)


def test_a_set_larger_than_the_memory_is_refused_before_decoding(source, monkeypatch):
    monkeypatch.setattr(resident_module, "_free_bytes", lambda _: 300 * 32 * 32 * 4)
    with pytest.raises(ValueError, match=r"300 images of 32 x 32 pixels need 0.0 GiB .* leave out --data.resident"):
        decode_source(source, View(32, "pad_crop"), device=CPU)
    monkeypatch.setattr(resident_module, "_free_bytes", lambda _: 300 * 32 * 32 * 5)
    assert Resident.empty(300, 32, CPU).pixels.shape == (300, 32, 32)


def test_a_bad_image_is_replaced_as_in_the_files(source, tmp_path):
    rows = range(24)
    for row in rows:
        path = Path(source.path(row))
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        (tmp_path / path.parent.name / path.name).write_bytes(path.read_bytes() if row != 5 else b"no image")
    spoiled = open_source("imagefolder", tmp_path, "train", split=".")
    view = View(32, "pad_crop")
    with pytest.raises(BadFileError, match="cannot decode"):
        decode_source(spoiled, view, device=CPU, threads=1)
    resident = decode_source(spoiled, view, device=CPU, threads=1, bad_files="replace")
    assert len(resident.replaced) == 1
    sampler = Sampler(len(spoiled), 8, seed=1)
    loader = Loader(spoiled, sampler, DrawSpec(view, 1), resident=resident)
    other = Loader(spoiled, replace_sampler(sampler), DrawSpec(view, 1), threads=1, bad_files="replace")
    for _ in range(3):
        one, two = loader.next(), other.next()
        assert torch.equal(one.ids, two.ids)
        assert torch.equal(one.images, two.images)
    assert loader.replaced == other.replaced


def replace_sampler(sampler: Sampler) -> Sampler:
    return Sampler(sampler.size, sampler.batch_size, sampler.seed)


def test_square_is_what_pad_crop_starts_from(source):
    view = View(24, "pad_crop", padding=3)
    square = _loader(source, DrawSpec(replace(view, crop="square"), 3)).next()
    cut = _loader(source, DrawSpec(view, 3))
    batch = cut.next()
    draws = cut._backend.plan(0).draws.views
    straight = [row for row in range(48) if draws["crop"][row].tolist() == [3, 3]]
    assert straight  # the middle window is the square itself
    for row in straight:
        expected = square.images[row].flip(1) if draws["flip"][row] else square.images[row]
        assert torch.equal(batch.images[row], expected)
