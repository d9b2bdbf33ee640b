import dataclasses

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from dalikd.pipelines.data import open_source
from dalikd.pipelines.draw_spec import View
from dalikd.pipelines.sources import Source
from dalikd.pipelines.windows import WindowViews
from dalikd.tools.bench import sides
from dalikd.tools.bench.sides import BACKENDS, Job, cannot, open_side, runnable
from dalikd.trainers.augmentation import AUGMENTATIONS

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")
LOADERS = ["dalikd", "torchvision-pil", "torchvision-io", "timm"]
ON_CPU = [*LOADERS, "decode"]
COLOR = (40, 120, 200)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Source:
    """Twelve pictures of one colour each side of a class: every crop shows the same pixels."""
    root = tmp_path_factory.mktemp("plain")
    for number in range(12):
        path = root / f"c{number % 2}" / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (50 + number, 40), COLOR).save(path)
    return open_source("imagefolder", root, "train", split=".")


def _job(source, **changes):
    fields = {
        "view": View(24, "random_resized_crop"),
        "augmentation": "identity",
        "batch_size": 4,
        "device": CPU,
        "images": 40,
        **changes,
    }
    return Job(source=source, **fields)


def _take(name, job, count=2):
    side = open_side(name, job)
    try:
        return [next(side.batches) for _ in range(count)]
    finally:
        side.batches.close()


def _expected(source):
    pixels = torch.tensor(COLOR) / 255
    return ((pixels - torch.tensor(source.mean)) / torch.tensor(source.std))[:, None, None].expand(4, 3, 24, 24)


@pytest.mark.parametrize("name", LOADERS)
def test_every_side_ends_in_the_same_normalised_batch(plain, name):
    """Whether files or arrays are read, and after the last image."""
    arrays = dataclasses.replace(plain, files=None, arrays=np.full((12, 24, 24, 3), COLOR, np.uint8))
    crop = View(24, "pad_crop", padding=2, border="reflect")
    jobs = [_job(plain, images=12, workers=0), *([_job(arrays, view=crop)] if name != "timm" else [])]
    for (images,) in (batch for job in jobs for batch in _take(name, job, 4)):
        assert images.dtype == torch.float32
        assert torch.allclose(images, _expected(plain), atol=1e-5)


@pytest.mark.parametrize("name", ["dalikd", "torchvision-pil", "torchvision-io"])
@pytest.mark.parametrize("crop", ["random_resized_crop", "pad_crop"])
@pytest.mark.parametrize("augmentation", ["flip", "crop_flip", "autoaugment"])
def test_a_view_comes_beside_the_base_view(plain, name, crop, augmentation):
    view = View(24, crop, padding=3, border="reflect")
    images, augmented = _take(name, _job(plain, view=view, augmentation=augmentation, dtype=torch.bfloat16), 1)[0]
    assert images.shape == augmented.shape == (4, 3, 24, 24)
    assert images.dtype == augmented.dtype == torch.bfloat16
    assert torch.allclose(images.float(), _expected(plain), atol=0.02)
    if augmentation != "autoaugment":
        assert torch.allclose(augmented.float(), _expected(plain), atol=0.02)


def test_zero_padding_shows_in_every_side(plain):
    view = View(24, "pad_crop", padding=12)
    black = float((0 - plain.mean[0]) / plain.std[0])
    for name in ("dalikd", "torchvision-pil", "torchvision-io"):
        images = torch.cat([batch[0] for batch in _take(name, _job(plain, view=view), 6)])
        share = (images[:, 0] - black).abs().lt(1e-4).float().mean()
        assert 0.2 < share < 0.7, name  # 7/16 for uniform shifts of up to half the side


@pytest.mark.parametrize("name", ["cutout", "mixup", "cutmix", "cutmixpick_teacher"])
def test_dalikd_mixes_on_the_device(plain, name):
    images, candidates = _take("dalikd", _job(plain, augmentation=name), 1)[0]
    runs = 2 if name == "cutmixpick_teacher" else 1
    assert candidates.shape == (4 * runs, 3, 24, 24)
    if name == "cutout":  # the mean's colour is zero
        assert (candidates.abs() < 1e-2).any()
    else:
        assert torch.allclose(candidates, images[:1].expand_as(candidates), atol=1e-5)


def test_decode_decodes_the_windows_that_dalikd_resizes(photos, monkeypatch):
    taken = []
    resize = WindowViews.__call__
    monkeypatch.setattr(
        WindowViews,
        "__call__",
        lambda self, windows, draws: taken.append(_pixels(windows)) or resize(self, windows, draws),
    )
    job = _job(open_source("imagefolder", photos, "train", split="."))
    _take("dalikd", job, 3)
    decoded = [_pixels(batch[0]) for batch in _take("decode", job, 3)]
    assert len({pixels.shape for batch in decoded for pixels in batch}) > 6
    for ours, theirs in zip(decoded, taken, strict=True):
        assert all(np.array_equal(one, other) for one, other in zip(ours, theirs, strict=True))


def _pixels(windows) -> list[np.ndarray]:
    return [np.array(windows[place]) for place in range(len(windows))]


def test_pixels_of_another_type_are_converted_on_the_device(plain):
    """The conversion of half as many bytes would be the CPU's, if both were asked for at once."""
    asked = []

    class Spy(torch.Tensor):
        def to(self, *arguments, **more):
            asked.append((*arguments, *more))
            return super().to(*arguments, **more)

    (images,) = next(sides._on_device(_job(plain, dtype=torch.bfloat16), [(torch.zeros(4, 3).as_subclass(Spy), 0)]))
    assert images.dtype == torch.bfloat16
    assert asked == [(CPU, "non_blocking"), (torch.bfloat16,)]


@pytest.mark.parametrize("name", ["torchvision-io", "timm"])
def test_workers_go_when_a_side_is_closed(plain, name):
    before = set(psutil.Process().children())
    side = open_side(name, _job(plain, workers=2))
    next(side.batches)
    assert side.ahead == 5
    started = [child for child in psutil.Process().children() if child not in before]
    workers = [child for child in started if "tracker" not in " ".join(child.cmdline())]  # that of semaphores stays
    assert len(workers) == 2
    side.batches.close()
    assert psutil.wait_procs(workers, timeout=10)[1] == []


def test_the_other_loaders_meet_every_picture_once_in_an_epoch(tmp_path):
    for number in range(8):
        (tmp_path / "c").mkdir(exist_ok=True)
        Image.new("RGB", (24, 24), (number * 30, 0, 0)).save(tmp_path / "c" / f"{number}.png")
    source = open_source("imagefolder", tmp_path, "train", split=".")
    batches = _take("torchvision-io", _job(source, workers=0), 4)
    reds = [round(float(value), 3) for (images,) in batches for value in images[:, 0, 12, 12]]
    assert len(set(reds[:8])) == len(set(reds[8:])) == 8
    assert reds[:8] != reds[8:]


def test_runnable_checks_names():
    assert runnable(["all"], CPU) == ON_CPU
    assert runnable(["timm", "dalikd", "timm"], CPU) == ["timm", "dalikd"]
    assert runnable(["all"], torch.device("cuda")) == list(BACKENDS)
    with pytest.raises(ValueError, match=r"dalkid is unknown: did you mean dalikd\?"):
        runnable(["dalkid"], CPU)
    with pytest.raises(ValueError, match=r"dalikd-mixed needs a GPU .*: there are dalikd, torchvision-pil"):
        runnable(["dalikd-mixed"], CPU)


def test_what_a_loader_lacks_is_named(plain):
    job = _job(plain)
    assert [cannot(name, job) for name in BACKENDS] == [None] * len(BACKENDS)
    assert cannot("timm", dataclasses.replace(job, view=View(24, "pad_crop"))) == "pad_crop"
    for name in AUGMENTATIONS:
        changed = dataclasses.replace(job, augmentation=name)
        assert cannot("dalikd", changed) is cannot("dalikd-mixed", changed) is None
        assert (cannot("torchvision-io", changed) is None) == (name in ("identity", "flip", "crop_flip", "autoaugment"))
        assert (cannot("timm", changed) is None) == (name == "identity")
    assert cannot("decode", dataclasses.replace(job, augmentation="flip")) == "flip"
    arrays = dataclasses.replace(plain, files=None, arrays=np.zeros((12, 8, 8, 3), np.uint8))
    assert cannot("decode", dataclasses.replace(job, source=arrays)) == "files"
    assert cannot("timm", job, "cold") is not None
    assert cannot("torchvision-pil", job, "cold") is None
