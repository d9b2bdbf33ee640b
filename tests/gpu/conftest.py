"""What tests on a GPU read. Images that are arrays need no DALI: tests on them run where it is not installed."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture
def needs_dali() -> None:
    pytest.importorskip("nvidia.dali")


@pytest.fixture
def two_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("fewer than two CUDA devices")


@pytest.fixture(scope="session")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a CIFAR-10 of 330 training and 40 test images, noise around a colour for each class."""
    folder = tmp_path_factory.mktemp("cifar") / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(0)
    colours = random.integers(0, 176, (10, 3, 1), dtype=np.uint8)

    def write(name: str, count: int) -> None:
        labels = [number % 10 for number in range(count)]
        pixels = colours[labels] + random.integers(0, 80, (count, 3, 1024), dtype=np.uint8)
        _dump(folder / name, {b"data": pixels.reshape(count, 3072), b"labels": labels})

    for number in range(1, 6):
        write(f"data_batch_{number}", 66)
    write("test_batch", 40)
    _dump(folder / "batches.meta", {b"label_names": [f"class{number}".encode() for number in range(10)]})
    return ["--data.name", "cifar10", "--data.root", str(folder.parent)]


def _dump(path: Path, content: dict[bytes, object]) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))
