"""A small data set, a small net by name, and a way to call commands."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dalikd.kd.backbones import factory
from dalikd.tools import cache, distill, evaluate, export, measure, probe, recipes, train
from dalikd.tools.cli import build_parser

COMMANDS = {
    "train": train.main,
    "distill": distill.main,
    "probe": probe.main,
    "measure": measure.main,
    "cache": cache.main,
    "evaluate": evaluate.main,
    "export": export.main,
    "recipes": recipes.main,
}


class SmallNet(nn.Module):
    """Enough of a net for a command line."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, num_classes)

    def stage_modules(self) -> list[nn.Module]:
        """What manifold mixup may mix after."""
        return [self.conv, self.norm, self.fc]

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(images)).relu().mean((2, 3)))


class Ended(NamedTuple):
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="module", autouse=True)
def small_model() -> Iterator[None]:
    """Lets commands that run in this process build the net by the name "small", in this folder's tests alone."""
    factory._BUILDERS["small"] = SmallNet
    yield
    factory._BUILDERS.pop("small", None)


@pytest.fixture(scope="module", autouse=True)
def fresh_parsers() -> None:
    """Parsers that remember no class of another test."""
    build_parser.cache_clear()


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Calls a command in this process as the console script would."""

    def call(name: str, *arguments: object) -> Ended:
        capsys.readouterr()
        code = 0
        try:
            COMMANDS[name]([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        return Ended(code, *capsys.readouterr())

    return call


def write_tree(root: Path, counts: dict[str, int], classes: int = 3) -> Path:
    """An ImageFolder of tinted 32x32 JPEGs."""
    random = np.random.default_rng(0)
    for split, count in counts.items():
        for number in range(count):
            label = number % classes
            image = random.integers(0, 120, (32, 32, 3), dtype=np.uint8)
            image[..., 0] += np.uint8(60 * label)
            path = root / split / f"class{label}" / f"{number:03d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path, quality=95)
    return root


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, 99 training and 30 validation images."""
    return write_tree(tmp_path_factory.mktemp("tree"), {"train": 99, "val": 30})


@pytest.fixture
def own_tree(tmp_path: Path) -> Path:
    """The same, for a test to spoil."""
    return write_tree(tmp_path / "tree", {"train": 99, "val": 30})


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the small net, for three classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "small.pt"
    torch.save(SmallNet(3).state_dict(), path)
    return path


@pytest.fixture
def data_options() -> Callable[[Path], list[object]]:
    def make(root: Path) -> list[object]:
        return ["--data.root", root, "--data.image_size", 32, "--data.threads", 1, "--device", "cpu"]

    return make


@pytest.fixture
def options(tree: Path, data_options: Callable[[Path], list[object]]) -> list[object]:
    """The data, and a model: what every command needs."""
    return [*data_options(tree), "--model", "small"]


@pytest.fixture
def training(options: list[object]) -> list[object]:
    """Two epochs of six steps."""
    return [*options, "--batch_size", 16, "--mix.group", 8, "--epochs", 2]


@pytest.fixture
def teacher(weights: Path) -> list[object]:
    return ["--teacher.name", "small", "--teacher.weights", weights]
