"""The whole of `bench loader`, on pictures of 32 pixels and with times too short to mean anything."""

import re
from pathlib import Path

import pytest
import torch

from dalikd.pipelines.draw_spec import View
from dalikd.pipelines.sources import open_source
from dalikd.tools.bench import images, loader, main, startup
from dalikd.tools.bench.loader import Meter
from dalikd.tools.bench.record import load
from dalikd.tools.bench.sides import Job, Side

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")


@pytest.fixture(autouse=True)
def no_rest(monkeypatch):
    """Processes need no rest where nothing is concluded."""
    monkeypatch.setattr(loader, "settle", lambda: None)


@pytest.fixture
def bench(tmp_path, small_images, capsys):
    """Calls `dalikd bench loader` on 300 pictures of 32 pixels; returns its record and what it printed."""

    def call(*arguments, data=("--data.root", str(small_images), "--data.train_split", ".")):
        common = ["--data.image_size", "32", "--data.threads", "1", "--workers", "0", "--batch_size", "20"]
        main(["loader", *data, *common, "--images", "20", "--output", str(tmp_path / "x.json"), *map(str, arguments)])
        found = load(tmp_path / "x.json")
        assert found is not None
        return found, capsys.readouterr().out

    return call


def _refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(["loader", *map(str, arguments)])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    return error


def test_a_row_for_every_loader(bench):
    record, out = bench("--data.crop", "random_resized_crop")
    assert [row["loader"] for row in record.rows] == ["dalikd", "torchvision-pil", "torchvision-io", "timm", "decode"]
    assert all(row["images/s"]["repetitions"] == row["CPU ms/image"]["repetitions"] == 5 for row in record.rows)
    assert [row["dalikd / this"] is None for row in record.rows] == [True, *[False] * 4]
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


def test_what_a_loader_lacks_is_said(bench):
    record, _ = bench("--backends", "dalikd", "torchvision-io", "timm", "--augmentations", "identity", "cutmix")
    assert [(row["augmentation"], row["loader"]) for row in record.rows] == [
        ("identity", "dalikd"),
        ("identity", "torchvision-io"),
        ("cutmix", "dalikd"),
    ]
    assert record.notes[:2] == [
        "timm is left out where it has none of these: pad_crop.",
        "torchvision-io is left out where it has none of these: cutmix.",
    ]


def test_the_same_pictures_from_every_store(bench):
    record, _ = bench("--backends", "dalikd", "--sources", "all")
    assert [row["source"] for row in record.rows] == ["files", "resident", "webdataset", "tfrecord"]
    assert [row["page cache"] for row in record.rows] == ["warm", "no files", "warm", "warm"]


def test_cold_means_that_nothing_lay_in_memory(bench, monkeypatch):
    monkeypatch.setattr(images, "cached_share", lambda _: 0.0)
    dropped = []
    monkeypatch.setattr(images, "drop_from_page_cache", lambda paths: dropped.append(len(paths)))
    record, _ = bench("--backends", "dalikd", "--cache", "both")
    assert [row["page cache"] for row in record.rows] == ["warm", "cold"]
    assert record.page_cache.endswith("cold; 0 % of the files' pages lay in memory before a measurement.")
    assert dropped == [300] * 6


def test_random_pictures_need_no_data_set(bench):
    record, _ = bench("--random", 60, "--backends", "dalikd", "torchvision-io", data=())
    assert [row["loader"] for row in record.rows] == ["dalikd", "torchvision-io"]
    assert record.stem.partition("-loader-")[2] == "random-32-cpu"
    assert record.page_cache == "no files."


def test_a_sweep_prints_config_lines_and_keeps_one_pipeline_open(bench, monkeypatch):
    monkeypatch.setattr(loader, "cores", lambda: 1)
    monkeypatch.setattr(loader, "_PREFETCH", (1, 2))
    opened = []

    def open_side(*_):
        assert all(taken.closed for taken in opened)
        opened.append(_Taken())
        return opened[-1].side

    monkeypatch.setattr(loader, "open_side", open_side)
    record, out = bench("--sweep", "true", "--data.threads", "null")
    assert [(row["setting"], row["value"]) for row in record.rows] == [
        ("threads", 1),
        ("threads", 2),
        ("prefetch", 1),
        ("prefetch", 2),
    ]
    assert len(opened) == 4 * 6
    assert "\ndata:\n  threads: " in out
    assert "\n  prefetch: " in out


def test_a_sweep_keeps_to_the_threads_that_are_given(bench, monkeypatch):
    monkeypatch.setattr(loader, "_PREFETCH", (1, 2))
    record, out = bench("--sweep", "true")
    assert [(row["setting"], row["value"]) for row in record.rows] == [("prefetch", 1), ("prefetch", 2)]
    assert record.variant.endswith("-sweep-1-threads")
    assert "\ndata:\n  threads: 1\n  prefetch: " in out


def test_a_sweep_takes_the_smallest_that_is_good_enough():
    assert loader.choose({1: 50.0, 2: 98.5, 4: 100.0, 8: 90.0}) == 2
    assert loader.choose({1: 50.0, 2: 97.0, 4: 100.0}) == 4


def test_a_sweep_covers_the_hardware_decoder_on_a_gpu(monkeypatch):
    monkeypatch.setattr(loader, "cores", lambda: 16)
    assert list(loader._settings("dalikd")) == ["threads", "prefetch"]
    settings = loader._settings("dalikd-mixed")
    assert settings["threads"] == (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    assert settings["hw_decoder_load"][0] == 0.0
    assert settings["hw_decoder_load"][-1] == 1.0


def test_startup_measures_scan_and_cache(bench, monkeypatch):
    monkeypatch.setattr(startup, "_SETTLED_SECONDS", 2.1)
    record, _ = bench("--startup", 500)
    assert [row["what"] for row in record.rows] == [
        "scan (first start)",
        "open from the cached list",
        "open and hash (for checkpoints)",
        "open, build, first batch of 20",
    ]
    assert record.notes[0] == "The tree: 500 files in 500 class folders, hard links to 1 of the images."
    assert record.notes[1].startswith("The cached list takes 0.")


def test_a_tree_grows_from_links_to_copies(small_images, tmp_path, monkeypatch):
    paths = sorted(small_images.glob("*/*.jpg"))[:3]
    monkeypatch.setattr(startup, "_MOST_LINKS", 4)
    monkeypatch.setattr(startup, "_CLASSES", 5)
    text = startup.grow_tree(paths, tmp_path / "tree", 10)
    files = sorted((tmp_path / "tree").glob("*/*"))
    assert text == "The tree: 10 files in 5 class folders, hard links to 3 of the images."
    assert [path.parent.name for path in files] == [f"class{number // 2:04d}" for number in range(10)]
    assert [path.read_bytes() for path in files] == [paths[number // 4].read_bytes() for number in range(10)]
    assert len({path.stat().st_ino for path in files}) == 3
    assert all(path.stat().st_nlink == 1 for path in paths)


def test_a_tree_grows_without_hard_links(small_images, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr("os.link", refuse)
    paths = sorted(small_images.glob("*/*.jpg"))[:1]
    text = startup.grow_tree(paths, tmp_path / "tree", 4)
    assert text.endswith("copies of 1 of the images.")
    assert len({path.stat().st_ino for path in (tmp_path / "tree").glob("*/*")}) == 4


def test_orders_are_measured_in_processes_of_their_own(bench):
    record, _ = bench("--orders", 1000, 2000, data=())
    assert [row["images"] for row in record.rows] == ["1,000", "2,000"]
    assert all(row["order of an epoch, s"]["low"] > 0 for row in record.rows)


def test_memory_of_orders_is_that_of_two_arrays():
    seconds, held, peak = startup.order_cost(1 << 20, 2)
    assert len(seconds) == 2
    assert held > 8 << 20
    assert peak >= held


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


@pytest.mark.parametrize(("wanted", "taken"), [(20, 3 + 2), (21, 3 + 3), (1, 3 + 1)])
def test_a_measurement_leaves_out_what_lay_ready(small_images, wanted, taken):
    source = open_source("imagefolder", small_images, "train", split=".")
    job, counted = Job(source, View(32, "pad_crop"), "identity", 10, CPU), _Taken()
    meter = Meter(counted.side, job, 1.0, wanted)
    assert meter() > 0
    assert counted.count == taken
    assert len(meter.cpu) == 1


def test_a_measurement_ends_after_its_time(small_images):
    source = open_source("imagefolder", small_images, "train", split=".")
    job, counted = Job(source, View(32, "pad_crop"), "identity", 10, CPU), _Taken()
    rate = Meter(counted.side, job, 0.05)()
    assert 0.5 * rate * 0.05 < 10 * (counted.count - 3) <= 1.5 * rate * 0.05


def test_stores_are_named_after_what_a_source_is(small_images, tmp_path):
    source = open_source("imagefolder", small_images, "train", split=".")
    view = View(32, "pad_crop")
    assert images.own_store(source) == "files"
    for store in images.STORES:
        found = images.open_store(store, source, view, tmp_path)
        assert images.own_store(found) == store
        assert len(found) == 300
        assert (found.labels == source.labels).all()
        assert bool(images.stored_files(found)) == (store != "resident")
        assert all(Path(path).is_file() for path in images.stored_files(found))


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
    ],
)
def test_mistakes_are_one_line(capsys, small_images, tmp_path, arguments, message):
    data = ["--data.root", small_images, "--data.train_split", ".", "--data.image_size", 32, "--workers", 0]
    error = _refused(capsys, "--output", tmp_path, *data, *arguments)
    assert message in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", [("--sweep", "true"), ("--startup", 600)])
def test_modes_that_need_files_say_so(capsys, tmp_path, mode):
    assert "give --data.root" in _refused(capsys, "--random", 600, "--output", tmp_path, *mode)


def test_a_missing_data_set_is_named(capsys, tmp_path):
    error = _refused(capsys, "--data.root", tmp_path / "nowhere", "--output", tmp_path)
    assert "nowhere" in error
