"""The whole of `bench loader`, on images of 32 pixels and with times too short to mean anything."""

import dataclasses
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from dalikd.pipelines.data import open_source
from dalikd.pipelines.draw_spec import View
from dalikd.pipelines.windows import WindowViews
from dalikd.tools.bench import loader
from dalikd.tools.bench.loader import LoaderOptions, measure
from dalikd.tools.bench.sides import BACKENDS, Job, Side, cannot, open_side, runnable
from dalikd.trainers.augmentation import AUGMENTATIONS

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")
CPU = torch.device("cpu")
SIZES = ("--data.image_size", 32, "--data.threads", 1, "--workers", 0, "--batch_size", 20, "--images", 20)
PEERS = ["torchvision-pil", "torchvision-io", "timm"]
COLOR = (40, 120, 200)


@pytest.fixture
def measured(bench, small_images):
    """Calls `dalikd bench loader` on 300 images of 32 pixels."""

    def call(*words, data=("--data.root", str(small_images), "--data.train_split", ".")):
        return bench("loader", *data, *SIZES, *words)

    return call


class _Taken:
    """A side that counts what is asked of it."""

    def __init__(self):
        self.count, self.closed = 0, False
        self.side = Side(self._batches(), ahead=3)

    def _batches(self):
        try:
            while True:
                self.count += 1
                yield ()
        finally:
            self.closed = True


def test_a_row_for_every_loader(measured):
    record, out = measured("--data.crop", "random_resized_crop")
    assert [row["loader"] for row in record.rows] == ["dalikd", *PEERS, "decode"]
    assert all(row["images/s"]["repetitions"] == row["CPU ms/image"]["repetitions"] == 2 for row in record.rows)
    assert record.rows[0]["dalikd / this"] is None
    ours, theirs = (row["images/s"]["values"] for row in record.rows[:2])
    assert record.rows[1]["dalikd / this"]["values"] == [a / b for a, b in zip(ours, theirs, strict=True)]
    assert record.title == (
        "32-pixel training views (random resized crop, flip), normalised float32, batches of 20; "
        "source: files; page cache: warm; augmentation: identity"
    )
    assert record.page_cache == "warm; 100% of the files' bytes were read before."
    assert record.images is not None
    assert record.images["number"] == 300
    assert record.config["data"]["image_size"] == 32
    assert re.fullmatch(r"dalikd's loader on the main thread, an image .*: [\d.]+ µs\.", record.notes[-1])
    assert "| timm |" in out


def test_stores_and_augmentations_have_columns_and_what_a_loader_lacks_is_told(measured):
    more = ("--augmentations", "identity", "cutmix", "--sources", "files", "tfrecord")
    record, _ = measured("--backends", "dalikd", "torchvision-io", "timm", *more)
    found = [(row["source"], row["augmentation"], row["loader"]) for row in record.rows]
    assert found == [
        *(("files", "identity", "dalikd"), ("files", "identity", "torchvision-io"), ("tfrecord", "identity", "dalikd")),
        *(("files", "cutmix", "dalikd"), ("tfrecord", "cutmix", "dalikd")),
    ]
    assert "-sources-augmentations" in record.variant
    assert record.notes[:2] == [
        "timm is left out where it has none of these: pad_crop, tfrecord.",
        "torchvision-io is left out where it has none of these: tfrecord, cutmix.",
    ]


@pytest.mark.parametrize("threads", ["null", 1])
def test_a_sweep_prints_config_lines_and_keeps_one_pipeline_open(measured, monkeypatch, threads):
    opened = []

    def open_side(*_):
        assert all(taken.closed for taken in opened)
        opened.append(_Taken())
        return opened[-1].side

    monkeypatch.setattr(loader, "open_side", open_side)
    record, out = measured("--sweep", "true", "--data.threads", threads)
    tried = [("prefetch", count) for count in (1, 2, 3, 5)]
    tried = tried if threads == 1 else [("threads", 1), ("threads", 2), *tried]
    assert [(row["setting"], row["value"]) for row in record.rows] == tried
    assert len(opened) == len(tried) * 3
    assert re.search(r"\ndata:\n  threads: \d\n  prefetch: ", out)
    assert record.variant.endswith("-sweep-1-threads" if threads == 1 else "-sweep")


def test_a_sweep_takes_the_smallest_that_is_good_enough(monkeypatch):
    assert loader.choose({1: 50.0, 2: 98.5, 4: 100.0, 8: 90.0}) == 2
    assert loader.choose({1: 50.0, 2: 97.0, 4: 100.0}) == 4
    monkeypatch.setattr(loader, "cores", lambda: 16)
    assert list(loader.settings("dalikd")) == ["threads", "prefetch"]
    settings = loader.settings("dalikd-mixed")
    assert settings["threads"] == (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    assert settings["hw_decoder_load"] == (0.0, 1.0)


def test_startup_measures_scan_and_cache(measured, monkeypatch):
    monkeypatch.setattr(loader, "_SETTLED_SECONDS", 2.1)
    monkeypatch.setattr(loader, "_MOST_LINKS", 15)
    record, _ = measured("--startup", 40)
    assert [row["what"] for row in record.rows] == [
        "scan (first start)",
        "open from the cached list",
        "open and hash (for checkpoints)",
        "open, build, first batch of 20",
    ]
    assert record.notes[0] == "The tree: 40 files in 40 class folders, hard links to 3 of the images."


def _is_closed(port: int) -> bool:
    with socket.socket() as asked:
        return asked.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.full
def test_startup_measures_the_list_of_a_store(measured, small_images, monkeypatch):
    pytest.importorskip("botocore")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).parents[2] / "serve_objects.py"
    process = subprocess.Popen([sys.executable, script, small_images, "--port", str(port), "--milliseconds", "1"])
    while _is_closed(port):
        time.sleep(0.02)
    for name, value in (("ACCESS_KEY_ID", "any"), ("SECRET_ACCESS_KEY", "any")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    try:
        data = ["--data.root", "s3://any", "--data.train_split", ".", "--data.threads", 1]
        record, _ = measured("--startup", 0, "--rounds", 1, data=data)
    finally:
        process.kill()
        process.wait()
    assert record.title == "Start of a data set of 300 objects"
    assert [row["what"] for row in record.rows] == [
        "list (first start)",
        "open from the remembered list",
        "open, build, first batch of 20",
    ]


def test_orders_have_time_and_memory(measured):
    record, _ = measured("--orders", 1000, 1 << 18, data=())
    assert [row["images"] for row in record.rows] == ["1,000", "262,144"]
    assert all(row["order of an epoch, s"]["low"] > 0 for row in record.rows)
    assert record.rows[1]["peak while ordering, MB"] >= record.rows[1]["two orders, MB"] > 2  # two arrays


@pytest.mark.parametrize(("wanted", "taken"), [(20, 3 + 2), (21, 3 + 3), (None, None)])
def test_a_measurement_leaves_out_what_lay_ready_and_ends_in_time(source, wanted, taken):
    job, counted, cpu = Job(source, View(32, "pad_crop"), 10, CPU), _Taken(), []
    rate = measure(counted.side, job, LoaderOptions(seconds=0.05, images=wanted), cpu)
    assert len(cpu) == 1
    assert counted.count == taken or 0.5 * rate * 0.05 < 10 * (counted.count - 3) <= 1.5 * rate * 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backends", "dalikd-mixed", "--device", "cpu"], "--backends dalikd-mixed needs a GPU"),
        (["--augmentations", "cutmx"], 'unknown --augmentation "cutmx": did you mean cutmix'),
        (["--sources", "tars"], "--sources tars is unknown: there are files, webdataset, tfrecord"),
        (["--batch_size", 0], "--batch_size 0: give at least 1"),
        (["--seconds", ".nan"], "--seconds nan: give a number above 0"),
        (["--sweep", "true", "--startup", 100], "--sweep, --startup and --orders measure different things"),
        (["--random", 10], "--random takes the place of a data set: leave out --data.root"),
        (["--startup", 3, "--batch_size", 4], "--startup 3: give at least --batch_size (4) files"),
        (["--startup", 0], "--startup 0 is for images in object storage: give --data.root s3://"),
        (["--backends", "timm"], "nothing to measure: timm is left out where it has none of these: pad_crop."),
        (["--data.root", "null", "--random", 600, "--sweep", "true"], "give --data.root"),
        (["--data.root", "null", "--random", 600, "--startup", 600], "give --data.root"),
    ],
)
def test_mistakes_are_one_line(refused, small_images, tmp_path, arguments, message):
    data = ["--data.root", small_images, "--data.train_split", ".", "--data.image_size", 32, "--workers", 0]
    assert message in refused("loader", "--output", tmp_path, *data, *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Twelve images of one colour each side of a class: every crop shows the same pixels."""
    root = tmp_path_factory.mktemp("plain")
    for number in range(12):
        path = root / f"c{number % 2}" / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (50 + number, 40), COLOR).save(path)
    return open_source("imagefolder", root, "train", split=".")


def _take(name, source, count=2, **changes):
    sizes = {"augmentation": "identity", "batch_size": 4, "device": CPU, "workers": 0, "images": 40}
    side = open_side(name, Job(source=source, **{"view": View(24, "random_resized_crop"), **sizes, **changes}))
    try:
        return [next(side.batches) for _ in range(count)]
    finally:
        side.batches.close()


@pytest.mark.parametrize("name", ["dalikd", *PEERS])
def test_every_side_ends_in_the_same_normalised_batch(plain, name):
    """Whether files or arrays are read, and after the last image; padding is black in all of them."""
    colors = (torch.tensor(COLOR) / 255 - torch.tensor(plain.mean)) / torch.tensor(plain.std)
    batches = _take(name, plain, 4, images=12, dtype=torch.bfloat16)
    if name != "timm":
        arrays = dataclasses.replace(plain, files=None, arrays=np.full((12, 24, 24, 3), COLOR, np.uint8))
        batches += _take(name, arrays, view=View(24, "pad_crop", padding=2, border="reflect"))
        black = float((0 - plain.mean[0]) / plain.std[0])
        padded = torch.cat([batch[0] for batch in _take(name, plain, 6, view=View(24, "pad_crop", padding=12))])
        share = (padded[:, 0] - black).abs().lt(1e-4).float().mean()
        assert 0.2 < share < 0.7  # 7/16 for uniform shifts of up to half the side
    for (images,), dtype in zip(batches, [torch.bfloat16] * 4 + [torch.float32] * 2, strict=False):
        assert images.dtype == dtype
        assert torch.allclose(images.float(), colors[:, None, None].expand(4, 3, 24, 24), atol=0.02)


@pytest.mark.parametrize(
    ("loader", "name"),
    [
        *(("dalikd", "flip"), ("dalikd", "cutmixpick_teacher"), ("torchvision-pil", "flip")),
        *(("torchvision-io", "crop_flip"), ("torchvision-io", "autoaugment")),
    ],
)
def test_augmented_images_come_beside_the_base_view(plain, loader, name):
    images, candidates = _take(loader, plain, 1, augmentation=name)[0]
    assert candidates.shape == (8 if name == "cutmixpick_teacher" else 4, 3, 24, 24)
    if name in ("flip", "cutmixpick_teacher"):  # others change colours, or pad
        assert torch.allclose(candidates, images[:1].expand_as(candidates), atol=1e-5)


def test_decode_decodes_the_windows_that_dalikd_resizes(photos, monkeypatch):
    def pixels(windows):
        return [np.array(windows[place]) for place in range(len(windows))]

    taken, resize = [], WindowViews.__call__
    monkeypatch.setattr(
        WindowViews,
        "__call__",
        lambda self, windows, draws: taken.append(pixels(windows)) or resize(self, windows, draws),
    )
    source = open_source("imagefolder", photos, "train", split=".")
    _take("dalikd", source, 3)
    decoded = [pixels(batch[0]) for batch in _take("decode", source, 3)]
    assert len({one.shape for batch in decoded for one in batch}) > 6
    for ours, theirs in zip(decoded, taken, strict=True):
        assert all(np.array_equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_workers_go_when_a_side_is_closed(plain):
    before = set(psutil.Process().children())
    side = open_side("timm", Job(plain, View(24, "random_resized_crop"), 4, CPU, workers=2, images=40))
    next(side.batches)
    assert side.ahead == 5
    started = [child for child in psutil.Process().children() if child not in before]
    workers = [child for child in started if "tracker" not in " ".join(child.cmdline())]  # that of semaphores stays
    assert len(workers) == 2
    side.batches.close()
    assert psutil.wait_procs(workers, timeout=10)[1] == []


def test_the_other_loaders_meet_every_image_once_in_an_epoch(tmp_path):
    (tmp_path / "c").mkdir()
    for number in range(8):
        Image.new("RGB", (24, 24), (number * 30, 0, 0)).save(tmp_path / "c" / f"{number}.png")
    batches = _take("torchvision-io", open_source("imagefolder", tmp_path, "train", split="."), 4)
    reds = [round(float(value), 3) for (images,) in batches for value in images[:, 0, 12, 12]]
    assert len(set(reds[:8])) == len(set(reds[8:])) == 8
    assert reds[:8] != reds[8:]


def test_what_a_loader_can_do_is_known(plain):
    assert runnable(["all"], CPU) == ["dalikd", *PEERS, "decode"]
    assert runnable(["timm", "dalikd", "timm"], CPU) == ["timm", "dalikd"]
    assert runnable(["all"], torch.device("cuda")) == list(BACKENDS)
    job = Job(plain, View(24, "random_resized_crop"), 4, CPU)
    assert [cannot(name, job) for name in BACKENDS] == [None] * len(BACKENDS)
    assert cannot("timm", dataclasses.replace(job, view=View(24, "pad_crop"))) == "pad_crop"
    for name in AUGMENTATIONS:
        changed = dataclasses.replace(job, augmentation=name)
        assert cannot("dalikd", changed) is cannot("dalikd-mixed", changed) is None
        assert (cannot("torchvision-io", changed) is None) == (name in ("identity", "flip", "crop_flip", "autoaugment"))
        assert (cannot("decode", changed) is None) == (name == "identity")
    arrays = dataclasses.replace(plain, files=None, arrays=np.zeros((12, 8, 8, 3), np.uint8))
    assert cannot("decode", dataclasses.replace(job, source=arrays)) == "resident"
