"""Images that every test may read, processes that start at once, and the rules that a test marked `gpu` needs a CUDA
device, and one marked `full` the option `--full`."""

import gc
import json
import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageDraw
from torch.utils._python_dispatch import TorchDispatchMode

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores, and threads of torch that wait for work spin
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

_PHOTOS = {  # width, height
    "bird/landscape": (500, 375),
    "bird/portrait": (375, 500),
    "bird/odd_landscape": (501, 335),
    "bird/odd_portrait": (257, 401),
    "boat/almost_square": (301, 300),
    "boat/square": (224, 224),
    "boat/panorama": (800, 200),
    "boat/tower": (150, 601),
    "tree/gray": (320, 240),
    "tree/turned": (400, 300),
    "tree/tiny": (21, 17),
    "tree/large": (640, 427),
}
_EXIF_ORIENTATION = 0x0112


@pytest.fixture(scope="session", autouse=True)
def _as_many_threads_under_any_load() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))


@pytest.fixture(scope="session", autouse=True)
def _compile_what_is_asked_for() -> Iterator[None]:
    """On a machine with a GPU as on any other."""
    with pytest.MonkeyPatch.context() as patch:
        if "dalikd.trainers.options" in sys.modules:
            patch.setattr("dalikd.trainers.options.automatic_mode", lambda _: "off")
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="all cases, not some of each kind")


@pytest.fixture(scope="session")
def full(pytestconfig: pytest.Config) -> bool:
    """Whether all cases are asked for, which takes hours; else some of each kind."""
    return bool(pytestconfig.getoption("--full"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: what begins last decides how long one of two workers runs alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """What is imported by now stays: each collection of garbage, as at the end of every loader, would go through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _look_at_each_object_once() -> None:
    """What files of tests before have imported and kept stays too."""
    gc.freeze()


class Forked:
    """A process: `dalikd COMMAND …`, or a script, that needs no time for imports.

    Args:
        folder: for what it prints.
        words: a command and its arguments, or a script and its.
        environment: its own variables.
    """

    def __init__(self, folder: Path, *words: object, **environment: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_IMPORTS)
        folder.mkdir(parents=True, exist_ok=True)
        self._streams = folder / "out", folder / "err"
        for stream in self._streams:
            stream.touch()
        names = {
            "words": [str(word) for word in words],
            "streams": tuple(map(str, self._streams)),
            "environment": {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        }
        self._process = context.Process(target=runpy.run_path, args=(str(_FORKED), names, "__main__"))
        self._process.start()

    @property
    def out(self) -> str:
        return self._streams[0].read_text()

    @property
    def err(self) -> str:
        return self._streams[1].read_text()

    def runs(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> int | None:
        """With signal 9. Returns the exit code."""
        self._process.kill()
        self._process.join()
        return self._process.exitcode

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def wait(self, seconds: float = 300) -> int:
        """Its exit code; one that takes longer is killed, and that is a failure."""
        self._process.join(seconds)
        code = self._process.exitcode
        if code is None:
            self.kill()
        assert code is not None, (f"it still ran after {seconds} s", self.out, self.err)
        return code

    def end(self) -> str:
        """Wait until it has ended well. Returns what it has printed."""
        code = self.wait()
        assert code == 0, (code, self.out, self.err)
        return self.out


_FORKED = Path(__file__).with_name("forked.py")
_IMPORTS = [
    *("dalikd.tools.study", "dalikd.tools.cache", "dalikd.pipelines.graphs", "torch._dynamo"),
    *("torch.utils.tensorboard", "matplotlib.backends.backend_agg", "scipy.stats"),
]


@pytest.fixture(scope="session")
def start_forked() -> type[Forked]:
    return Forked


@pytest.fixture(scope="session")
def start_joined() -> Callable[..., list[Forked]]:
    """Starts several, joined as a launcher joins them."""

    def start(processes: int, folder: Path, *words: object) -> list[Forked]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks = map(str, range(processes))
        return [Forked(folder / rank, *words, RANK=rank, LOCAL_RANK=rank, **shared) for rank in ranks]

    return start


# reading a scalar, shapes that depend on data, and tensors made of Python numbers (a blocking copy on a GPU)
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh")


class NoSync(TorchDispatchMode):
    """Raises at every operation that would make the host wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith(_WAITS) or (name.startswith("index") and _has_mask(args[1])):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def _has_mask(indices: Any) -> bool:
    """Whether an indexing operation selects by a bool tensor, whose count of true values the host has to know."""
    return isinstance(indices, list | tuple) and any(i is not None and i.dtype == torch.bool for i in indices)


@pytest.fixture
def no_sync() -> Callable[[], NoSync]:
    return NoSync


@pytest.fixture
def sync_is_an_error() -> Iterator[Callable[[], None]]:
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if item.get_closest_marker("full") is not None and not item.config.getoption("--full"):
        pytest.skip("only with --full")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve JPEGs in three class folders: portrait, landscape, odd sides, extreme aspect ratios, one gray
    (`tree/gray.jpg`), one with EXIF orientation 6 (`tree/turned.jpg`), one tiny (`tree/tiny.jpg`)."""
    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(20)
    for name, size in _PHOTOS.items():
        image = _draw_photo(random, *size)
        (root / name).parent.mkdir(exist_ok=True)
        path = root / f"{name}.jpg"
        exif = Image.Exif()
        if name == "tree/turned":
            exif[_EXIF_ORIENTATION] = 6
        image = image.convert("L") if name == "tree/gray" else image
        image.save(path, quality=90, exif=exif)
    return root


@pytest.fixture(scope="session")
def small_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 JPEGs of 32x32 pixels in three class folders of 100."""
    root = tmp_path_factory.mktemp("small_images")
    random = np.random.default_rng(21)
    for name in ("ant", "bee", "cat"):
        (root / name).mkdir()
        for number in range(100):
            _draw_photo(random, 32, 32).save(root / name / f"{number:03d}.jpg", quality=95)
    return root


def _draw_photo(random: np.random.Generator, width: int, height: int) -> Image.Image:
    """A image with what photographs have: slow gradients, soft blobs, hard edges and a little grain."""
    coarse = random.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(smooth)
    for _ in range(6):
        left, right = sorted(random.integers(0, width, 2).tolist())
        top, bottom = sorted(random.integers(0, height, 2).tolist())
        color = tuple(random.integers(0, 256, 3).tolist())
        (pen.ellipse if random.random() < 0.5 else pen.rectangle)((left, top, right, bottom), fill=color)
    grain = random.normal(0, 4, (height, width, 1))
    return Image.fromarray((np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8))


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes the folder of a finished run of made-up figures: two epochs of ten steps, ten images a second."""

    def make(
        name: str,
        augmentation: str = "identity",
        seed: int = 0,
        loss: float = 1.0,
        top1: float = 0.5,
        config: dict[str, Any] | None = None,
        results: dict[str, Any] | None = None,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        data = {"name": "imagefolder", "root": "gone"}
        options = {"data": data, "model": "resnet8", "seed": seed, "augmentation": augmentation, "epochs": 2}
        options |= {"schedule": {"name": "cosine", "final": 0.0}, "mix": {"group": 8}, "batch_size": 16}
        options |= {"loss": {"class_path": "dalikd.kd.losses.KD", "init_args": {"kd_weight": 0.9}}} | (config or {})
        val = {"loss": loss, "top1": top1, "top5": 1.0, "images": 200}
        whole = {"finished": True, "epochs": 2.0, "steps": 20, "command": "distill", "seed": seed, "data": data}
        whole |= {"last": {"epoch": 2, "val": val}, "best": {"epoch": 1, "val": {**val, "top1": 1 - top1}}}
        whole |= {"fingerprint": {"train": "t", "val": "v"}, "versions": {"torch": "2"}, "batch_size": 16}
        whole |= {"teacher": {"name": "resnet20", "weights": "t.safetensors", "sha256": "abc"}}
        whole |= {"model": options["model"], "augmentation": augmentation} | (results or {})
        log = [
            {"step": step, "epoch": step / 10, "train": {"loss": loss + 1 / step, "kd": loss}, "lr": 0.1}
            | {"images_per_second": 10.0, "data_wait_share": 0.25}
            for step in (5, 10, 15, 20)
        ]
        log += [{"step": step, "epoch": step // 10, "epoch_train": {"loss": loss}, "val": val} for step in (10, 20)]
        (folder / "config.yaml").write_text(yaml.safe_dump(options))
        (folder / "results.json").write_text(json.dumps(whole))
        (folder / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in log))
        return folder

    return make


@pytest.fixture
def write_measurement(tmp_path: Path) -> Callable[..., Path]:
    """Writes what `dalikd measure` would of the teacher of `make_run`."""

    def write(stddev: dict[str, float | None], **changed: Any) -> Path:
        path = tmp_path / "measure.json"
        rows = [
            {"augmentation": name, "stddev": value, "stderr": value and value / 10, "entropy": 1.0, "windows": 9}
            | {"images": 99}
            for name, value in stddev.items()
        ]
        whole = {"results": rows, "mode": "per_sample", "mix_group": 8, "mix": {"group": 8}, "window": 64, "epochs": 1}
        whole |= {"seed": 0, "precision": "fp32", "confidence": 0.95, "separation": None, "stopped": None}
        whole |= {"teacher": {"name": "resnet20", "weights": "t.safetensors", "sha256": "abc"}, "student": None}
        whole |= {"data": {"name": "imagefolder"}, "fingerprint": "t", "versions": {"torch": "2"}}
        path.write_text(json.dumps(whole | changed))
        return path

    return write
