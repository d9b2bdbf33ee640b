"""The whole of `bench loader`, on images of 32 pixels and with times too short to mean anything."""

import re

import pytest
import torch

from dalikd.pipelines.data import open_source
from dalikd.pipelines.draw_spec import View
from dalikd.tools.bench import images, loader, startup
from dalikd.tools.bench.loader import Meter
from dalikd.tools.bench.sides import Job, Side

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")
SIZES = ("--data.image_size", 32, "--data.threads", 1, "--workers", 0, "--batch_size", 20, "--images", 20)


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
    assert [row["loader"] for row in record.rows] == ["dalikd", "torchvision-pil", "torchvision-io", "timm", "decode"]
    assert all(row["images/s"]["repetitions"] == row["CPU ms/image"]["repetitions"] == 5 for row in record.rows)
    assert record.rows[0]["dalikd / this"] is None
    ours, theirs = (row["images/s"]["values"] for row in record.rows[:2])
    assert record.rows[1]["dalikd / this"]["values"] == [a / b for a, b in zip(ours, theirs, strict=True)]
    assert record.title == (
        "32-pixel training views (random resized crop, flip), normalised float32, batches of 20; "
        "source: files; page cache: warm; augmentation: identity"
    )
    assert record.page_cache.startswith("warm; ")
    assert record.pictures is not None
    assert record.pictures["number"] == 300
    assert record.config["data"]["image_size"] == 32
    assert re.fullmatch(r"dalikd's loader on the main thread, an image .*: [\d.]+ µs\.", record.notes[-1])
    assert "| timm |" in out


def test_what_a_loader_lacks_is_told(measured):
    record, _ = measured("--backends", "dalikd", "torchvision-io", "timm", "--augmentations", "identity", "cutmix")
    found = [(row["augmentation"], row["loader"]) for row in record.rows]
    assert found == [("identity", "dalikd"), ("identity", "torchvision-io"), ("cutmix", "dalikd")]
    assert record.notes[:2] == [
        "timm is left out where it has none of these: pad_crop.",
        "torchvision-io is left out where it has none of these: cutmix.",
    ]


def test_the_same_images_from_every_store(measured):
    record, _ = measured("--backends", "dalikd", "--sources", "all")
    assert [row["source"] for row in record.rows] == ["files", "resident", "webdataset", "tfrecord"]
    assert [row["page cache"] for row in record.rows] == ["warm", "no files", "warm", "warm"]


def test_cold_means_that_nothing_lay_in_memory(measured, monkeypatch):
    monkeypatch.setattr(images, "cached_share", lambda _: 0.0)
    dropped = []
    monkeypatch.setattr(images, "drop_from_page_cache", lambda paths: dropped.append(len(paths)))
    record, _ = measured("--backends", "dalikd", "--cache", "both")
    assert [row["page cache"] for row in record.rows] == ["warm", "cold"]
    assert record.page_cache.endswith("cold; 0 % of the files' pages lay in memory before a measurement.")
    assert dropped == [300] * 6


def test_random_images_need_no_data_set(measured):
    record, _ = measured("--random", 60, "--backends", "dalikd", "torchvision-io", data=())
    assert [row["loader"] for row in record.rows] == ["dalikd", "torchvision-io"]
    assert record.stem.partition("-loader-")[2] == "random-32-cpu"
    assert record.page_cache == "no files."


@pytest.mark.parametrize("threads", ["null", 1])
def test_a_sweep_prints_config_lines_and_keeps_one_pipeline_open(measured, monkeypatch, threads):
    monkeypatch.setattr(loader, "cores", lambda: 1)
    monkeypatch.setattr(loader, "_PREFETCH", (1, 2))
    opened = []

    def open_side(*_):
        assert all(taken.closed for taken in opened)
        opened.append(_Taken())
        return opened[-1].side

    monkeypatch.setattr(loader, "open_side", open_side)
    record, out = measured("--sweep", "true", "--data.threads", threads)
    tried = [("prefetch", 1), ("prefetch", 2)]
    tried = tried if threads == 1 else [("threads", 1), ("threads", 2), *tried]
    assert [(row["setting"], row["value"]) for row in record.rows] == tried
    assert len(opened) == len(tried) * 6
    assert re.search(r"\ndata:\n  threads: \d\n  prefetch: ", out)
    assert record.variant.endswith("-sweep-1-threads" if threads == 1 else "-sweep")


def test_a_sweep_takes_the_smallest_that_is_good_enough(monkeypatch):
    assert loader.choose({1: 50.0, 2: 98.5, 4: 100.0, 8: 90.0}) == 2
    assert loader.choose({1: 50.0, 2: 97.0, 4: 100.0}) == 4
    monkeypatch.setattr(loader, "cores", lambda: 16)
    assert list(loader._settings("dalikd")) == ["threads", "prefetch"]
    settings = loader._settings("dalikd-mixed")
    assert settings["threads"] == (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    assert settings["hw_decoder_load"] == (0.0, 1.0)


def test_startup_measures_scan_and_cache(measured, monkeypatch):
    monkeypatch.setattr(startup, "_SETTLED_SECONDS", 2.1)
    record, _ = measured("--startup", 500)
    assert [row["what"] for row in record.rows] == [
        "scan (first start)",
        "open from the cached list",
        "open and hash (for checkpoints)",
        "open, build, first batch of 20",
    ]
    assert record.notes[0] == "The tree: 500 files in 500 class folders, hard links to 1 of the images."
    assert record.notes[1].startswith("The cached list takes 0.")


@pytest.mark.parametrize("links", [True, False])
def test_a_tree_grows_from_links_or_copies(small_images, tmp_path, monkeypatch, links):
    def refuse(*_):
        raise PermissionError

    if not links:
        monkeypatch.setattr("os.link", refuse)
    paths = sorted(small_images.glob("*/*.jpg"))[:3]
    monkeypatch.setattr(startup, "_MOST_LINKS", 4)
    monkeypatch.setattr(startup, "_CLASSES", 5)
    text = startup.grow_tree(paths, tmp_path / "tree", 10)
    files = sorted((tmp_path / "tree").glob("*/*"))
    assert (
        text == f"The tree: 10 files in 5 class folders, {'hard links to' if links else 'copies of'} 3 of the images."
    )
    assert [path.parent.name for path in files] == [f"class{number // 2:04d}" for number in range(10)]
    assert [path.read_bytes() for path in files] == [paths[number // 4].read_bytes() for number in range(10)]
    assert len({path.stat().st_ino for path in files}) == (3 if links else 10)
    assert all(path.stat().st_nlink == 1 for path in paths)


def test_orders_are_measured_in_processes_of_their_own(measured):
    record, _ = measured("--orders", 1000, 2000, data=())
    assert [row["images"] for row in record.rows] == ["1,000", "2,000"]
    assert all(row["order of an epoch, s"]["low"] > 0 for row in record.rows)
    seconds, held, peak = startup.order_cost(1 << 20, 2)
    assert len(seconds) == 2
    assert peak >= held > 8 << 20  # two arrays


@pytest.mark.parametrize(("wanted", "taken"), [(20, 3 + 2), (21, 3 + 3), (1, 3 + 1), (None, None)])
def test_a_measurement_leaves_out_what_lay_ready_and_ends_in_time(small_images, wanted, taken):
    source = open_source("imagefolder", small_images, "train", split=".")
    job, counted = Job(source, View(32, "pad_crop"), "identity", 10, torch.device("cpu")), _Taken()
    meter = Meter(counted.side, job, 0.05, wanted)
    rate = meter()
    assert len(meter.cpu) == 1
    if taken is not None:
        assert counted.count == taken
    else:
        assert 0.5 * rate * 0.05 < 10 * (counted.count - 3) <= 1.5 * rate * 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", 4], "--rounds 4: give at least 5"),
        (["--backends", "dalikd-mixed", "--device", "cpu"], "--backends dalikd-mixed needs a GPU"),
        (["--backends", "dali"], "--backends dali is unknown: did you mean dalikd?"),
        (["--augmentations", "cutmx"], 'unknown --augmentation "cutmx": did you mean cutmix'),
        (["--sources", "tars"], "--sources tars is unknown: there are files, resident, webdataset, tfrecord"),
        (["--batch_size", 0], "--batch_size 0: give a number above 0"),
        (["--data.threads", 0], "--data.threads 0: give at least 1"),
        (["--data.hw_decoder_load", 2], "--data.hw_decoder_load 2.0: give a share from 0 to 1"),
        (["--seconds", ".nan"], "--seconds nan: give a number above 0"),
        (["--workers", -1], "--workers -1"),
        (["--sweep", "true", "--startup", 100], "--sweep, --startup and --orders measure different things"),
        (["--random", 10], "--random takes the place of a data set: leave out --data.root"),
        (["--sources", "resident", "--data.crop", "random_resized_crop"], "--sources resident keeps squares"),
        (["--startup", 3, "--batch_size", 4], "--startup 3: give at least --batch_size (4) files"),
        (["--cache", "cold", "--batch_size", 200], "--cache cold needs more than"),
        (["--backends", "timm"], "nothing to measure: timm is left out where it has none of these: pad_crop."),
        (["--output", "/dev/null/x"], "--output"),
        (["--data.root", "nowhere"], "nowhere"),
        (["--data.root", "null", "--random", 600, "--sweep", "true"], "give --data.root"),
        (["--data.root", "null", "--random", 600, "--startup", 600], "give --data.root"),
    ],
)
def test_mistakes_are_one_line(refused, small_images, tmp_path, arguments, message):
    data = ["--data.root", small_images, "--data.train_split", ".", "--data.image_size", 32, "--workers", 0]
    assert message in refused("loader", "--output", tmp_path, *data, *arguments)
    assert list(tmp_path.iterdir()) == []
